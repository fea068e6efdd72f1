"""Splitting rows of numbers, as all channels of a pixel, into int8 digits of one scale (see int8_digits.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from cnnc.backends.cpu.digit_sizes import IN_A_STEP
from cnnc.backends.cpu.int8_digits import biased, digits, larger, scale_of, unit_of
from cnnc.backends.cpu.machine import TILE_LINE
from cnnc.backends.cpu.reduce_lanes import lane_max
from cnnc.backends.lower import loops

__all__ = ["split_row"]


def split_row(
    blocks: int,
    read: Callable[[Any], Any],
    put: Callable[[Any, int, Any], Any],
    put_unit: Callable[[Any], Any],
    before: Callable[[Any], Any] = lambda block: None,
) -> Any:
    """Write the statements that split a row of `blocks` vectors of float32.

    `read` gives the vector of a block, after the statements of `before`; `put` stores a vector of digits of a step of
    blocks, and `put_unit` the unit of the row.
    """
    biggest = loops.buffer("biggest", (TILE_LINE,), "int32", scope="local")
    most = loops.buffer("most", (1,), "int32", scope="local")
    numbers = loops.buffer("numbers", (IN_A_STEP, TILE_LINE), "uint32", scope="local")

    def look(block: Any) -> Any:
        found = larger(loops.load(biggest, 0, lanes=TILE_LINE), read(block))
        return loops.sequence(before(block), loops.store(biggest, found, 0, lanes=TILE_LINE))

    def split(step: Any, present: int) -> Any:
        scale = tirx.Broadcast(scale_of(loops.load(most, 0)), TILE_LINE)
        vectors = [read(step * IN_A_STEP + j) if j < present else None for j in range(IN_A_STEP)]
        found = digits([loops.load(numbers, j, 0, lanes=TILE_LINE) for j in range(IN_A_STEP)])
        return loops.sequence(
            *(loops.store(numbers, biased(v, scale), j, 0, lanes=TILE_LINE) for j, v in enumerate(vectors)),
            *(put(step, digit, value) for digit, value in enumerate(found)),
        )

    whole, left = divmod(blocks, IN_A_STEP)
    return loops.sequence(
        loops.alloc(biggest),
        loops.alloc(most),
        loops.alloc(numbers),
        loops.store(biggest, tirx.Broadcast(tirx.const(0, "int32"), TILE_LINE), 0, lanes=TILE_LINE),
        loops.loop(blocks, look, "block"),
        loops.store(most, lane_max(loops.load(biggest, 0, lanes=TILE_LINE), TILE_LINE), 0),
        put_unit(unit_of(loops.load(most, 0))),
        loops.loop(whole, lambda step: split(step, IN_A_STEP), "step") if whole else None,
        split(loops.const(whole), left) if left else None,
    )
