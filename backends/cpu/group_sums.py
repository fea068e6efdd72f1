"""Sums of convolutions with a few channels in each group: input vectors are multiplied as they are.

    y[l] = sum over d of s[d][l ^ d],   s[d][l] = sum over r, s of x[l] * weight of input lane l for output lane l ^ d

A group is a power of two of neighbouring lanes, so l ^ d for d below its size runs over the lanes of l's group.  Lanes
move once for each of a pixel's sums, when they are complete, and not once for each product.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from cnnc.backends.cpu.window_shape import WindowShape
from cnnc.backends.cpu.windows import Sums, Tap
from cnnc.backends.lower import loops

__all__ = ["sums_by_distance"]


def sums_by_distance(weight: Any, group: int, shape: WindowShape) -> Sums:
    """Give what a pixel gathers for groups of `group` channels; the weight is OIHW{block}o."""
    block = shape.block
    if group == 1:

        def product(total: Any, x: Any, tap: Tap) -> Any:
            return total + x * loops.widened(weight, tap.channel, 0, tap.row, tap.column, 0, lanes=block)

        return Sums(0.0, product)
    turned = loops.buffer("turned", (shape.kh, shape.kw, group, block))

    def prepare(channel: Any) -> Any:
        """Write a slice's weights by distance, which takes it a few of the permutations this saves."""

        def turn(row: Any, column: Any, distance: int) -> Any:
            lanes = [loops.const(lane % group * block + (lane ^ distance)) for lane in range(block)]
            read = [loops.widened(weight, channel, j, row, column, 0, lanes=block) for j in range(group)]
            return loops.store(turned, tirx.Shuffle(read, lanes), row, column, distance, 0, lanes=block)

        def tap(row: Any, column: Any) -> Any:
            return loops.sequence(*(turn(row, column, distance) for distance in range(group)))

        rows = loops.loop(shape.kh, lambda r: loops.loop(shape.kw, lambda c: tap(r, c), "kernel_column"), "kernel_row")
        return loops.sequence(loops.alloc(turned), rows)

    def step(total: Any, x: Any, tap: Tap) -> Any:
        return total + x * loops.load(turned, tap.row, tap.column, tap.part, 0, lanes=block)

    return Sums(0.0, step, group, lambda sums: _merged(sums, block), prepare)


def _merged(sums: list[Any], block: int) -> Any:
    """Bring the sums of all distances to their lanes: those at d and d ^ half are half apart."""
    while len(sums) > 1:
        half = len(sums) // 2
        lanes = [loops.const(lane ^ half) for lane in range(block)]
        sums = [near + tirx.Shuffle([far], lanes) for near, far in zip(sums[:half], sums[half:], strict=True)]
    return sums[0]
