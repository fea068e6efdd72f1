"""Pooling on blocked channels (NCHWc): the maximum, minimum or sum of windows, and reductions of whole images.

    y[n, c, h, w] = max (min, sum) over r, s of x[n, c, h * stride + r * dilation - pad, ...]

Padding takes part in nothing.  An average is the sum with a division after it, which is the epilogue's business.
A NaN in a window is its maximum and minimum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.segments import row_segments

if TYPE_CHECKING:
    from cnnc.backends.cpu.body import Body
    from cnnc.backends.cpu.windows import WindowShape

__all__ = ["PoolKind", "PoolParams", "build", "build_global", "cost", "space"]

PoolKind = Literal["max", "min", "sum"]


@dataclass(frozen=True)
class PoolParams:
    """Register tiles of at most `pixels` pixels; slices of `rows` output rows of one channel block."""

    pixels: int
    rows: int


def space(shape: WindowShape, machine: Machine) -> Iterator[PoolParams]:
    """Give the tile sizes worth considering."""
    for rows in sorted({-(-shape.oh // parts) for parts in (1, 2, 4, 8) if parts <= shape.oh}):
        yield PoolParams(machine.registers // 4, rows)


def cost(shape: WindowShape, params: PoolParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    cycles = 0.0
    for segment in row_segments(
        shape.w, shape.ow, shape.kw, shape.stride[1], shape.pad[1], shape.dilation[1], params.pixels
    ):
        taps = sum((run.last - run.first) * (run.end - run.begin) for run in segment.runs)
        cycles += segment.count * (8.0 + 0.5 * segment.pixels + shape.kh * (2.0 + taps))
    row_blocks = -(-shape.oh // params.rows)
    slices = shape.n * shape.blocks * row_blocks
    waves = -(-slices // machine.threads)
    uneven = -(-slices // 8) * 8 / slices
    moved = 4.0 * shape.n * shape.blocks * shape.block * (shape.h * shape.w + shape.oh * shape.ow)
    far = moved / machine.memory_bytes / machine.threads
    return max((cycles * params.rows + 40.0) * waves, far) * (1.0 + 0.01 * uneven) / machine.hertz


def build(shape: WindowShape, kind: PoolKind, params: PoolParams, body: Body) -> Any:
    """Make the kernel of sliding windows: a PrimFunc of the body's inputs and the output; the operand is x."""
    from cnnc.backends.cpu.windows import window_kernel

    def step(total: Any, x: Any, *_: Any) -> Any:
        return _combine(kind, total, x)

    return window_kernel(shape, body.bind(shape.output_shape), params.pixels, params.rows, _START[kind], step)


def build_global(shape: WindowShape, kind: PoolKind, body: Body) -> Any:
    """Make the kernel that reduces whole images, the window of `shape` being the input; one slice a channel block."""
    from tvm import tirx

    from cnnc.backends.cpu import loops

    bound = body.bind(shape.output_shape)
    x, y = bound.operands[0], bound.output()
    pixels = shape.h * shape.w
    chains = min(CHAINS, pixels)

    def one_slice(index: Any) -> Any:
        image, block = index // shape.blocks, index % shape.blocks
        parts = loops.buffer("parts", (chains, shape.block), scope="local")

        def add(part: Any, pixel: Any) -> Any:
            value = loops.load(x, image, block, pixel // shape.w, pixel % shape.w, 0, lanes=shape.block)
            total = _combine(kind, loops.load(parts, part, 0, lanes=shape.block), value)
            return loops.store(parts, total, part, 0, lanes=shape.block)

        def clear(part: Any) -> Any:
            return loops.store(parts, tirx.Broadcast(tirx.const(_START[kind], "float32"), shape.block), part, 0, lanes=shape.block)

        def turn(first: Any) -> Any:
            return loops.unrolled(chains, lambda part: add(part, first * chains + part), "part")

        def merge(lane: Any) -> Any:
            total = loops.load(parts, 0, lane)
            for part in range(1, chains):
                total = _combine(kind, total, loops.load(parts, part, lane))
            value = bound.value(total, (image, block, 0, 0, lane))
            if shape.c % shape.block:
                value = tirx.Select(block * shape.block + lane < shape.c, value, tirx.const(0, y.dtype))
            return loops.store(y, value, image, block, 0, 0, lane)

        done = pixels // chains * chains
        return loops.sequence(
            loops.alloc(parts),
            loops.unrolled(chains, clear, "part"),
            loops.loop(pixels // chains, turn, "turn"),
            loops.unrolled(pixels - done, lambda part: add(part, done + part), "rest") if done < pixels else None,
            loops.vectorized(shape.block, merge),
        )

    return loops.function([*bound.inputs, y], loops.parallel(shape.n * shape.blocks, one_slice))


CHAINS = 8
"""Independent sums of a whole image, to hide the latency of each."""

_START = {"max": float("-inf"), "min": float("inf"), "sum": 0.0}


def _combine(kind: PoolKind, total: Any, x: Any) -> Any:
    from tvm import tirx

    if kind == "sum":
        return total + x
    # Maximum and minimum instructions give their second operand if either is NaN: right for a NaN in x.
    better = tirx.max(total, x) if kind == "max" else tirx.min(total, x)
    return tirx.Select(tirx.isnan(total), total, better)
