"""The register tile of matrix products: rows of broadcast numbers times vectors, summed over steps.

    sums[r, v] = sum over k of left(r, k) * right(k, v)

What reads the operands and what becomes of the sums is handed in, so that fully connected layers, products of
activations and attention share one innermost loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.segments import even_split

__all__ = [
    "RegisterTile",
    "best_tile",
    "covering_cycles",
    "register_tile",
    "step_cycles",
    "store_sums",
    "vector_starts",
    "vector_width",
]

UNROLL = 4
"""Steps for each turn of the innermost loop, where their number allows."""


@dataclass(frozen=True)
class RegisterTile:
    """`rows` x `vectors` sums of `lanes` numbers each, over `steps` terms."""

    rows: int
    vectors: int
    lanes: int
    steps: int


def register_tile(
    tile: RegisterTile,
    left: Callable[[Any, Any], Any],
    right: Callable[[Any, Any], Any],
    finish: Callable[[Callable[[Any, Any, Any], Any]], Any],
) -> Any:
    """Write the loops of one tile.

    `left(r, k)` gives a number, `right(k, v)` a vector, `finish(total)` the statements that store the sums, of which
    `total(r, v, lane)` is one number.
    """
    from tvm import tirx

    from cnnc.backends.lower import loops

    rows, vectors, lanes = tile.rows, tile.vectors, tile.lanes
    sums = loops.buffer("sums", (rows, vectors, lanes), scope="local")

    def each(statement: Callable[[Any, Any], Any]) -> Any:
        # The innermost loop runs over the smaller side, whose operands stay in registers.
        if vectors > rows:
            return loops.unrolled(vectors, lambda v: loops.unrolled(rows, lambda r: statement(r, v), "r"), "v")
        return loops.unrolled(rows, lambda r: loops.unrolled(vectors, lambda v: statement(r, v), "v"), "r")

    def clear(r: Any, v: Any) -> Any:
        zero = tirx.const(0.0, "float32")
        return loops.store(sums, tirx.Broadcast(zero, lanes) if lanes > 1 else zero, r, v, 0, lanes=lanes)

    def add(k: Any, r: Any, v: Any) -> Any:
        number = left(r, k)
        product = (tirx.Broadcast(number, lanes) if lanes > 1 else number) * right(k, v)
        return loops.store(sums, loops.load(sums, r, v, 0, lanes=lanes) + product, r, v, 0, lanes=lanes)

    step = math.gcd(tile.steps, UNROLL)

    def turn(first: Any) -> Any:
        return loops.unrolled(step, lambda u: each(lambda r, v: add(first * step + u, r, v)), "u")

    return loops.sequence(
        loops.alloc(sums),
        each(clear),
        loops.loop(tile.steps // step, turn, "k"),
        finish(lambda r, v, lane: loops.load(sums, r, v, lane)),
    )


def store_sums(
    tile: RegisterTile,
    numbers: int,
    value: Callable[[Any, Any, Any], Any],
    store: Callable[[Any, Any, Any, Any], Any],
) -> Any:
    """Write `store(r, v, lane, value(r, v, lane))` for the first `numbers` lanes of every sum of a tile."""
    from cnnc.backends.cpu import epilogue
    from cnnc.backends.lower import loops

    places = list(product(range(tile.rows), range(tile.vectors)))
    if numbers == tile.lanes:
        return epilogue.finish(
            places, numbers, lambda at, i: value(at[0], at[1], i), lambda at, i, x: store(at[0], at[1], i, x)
        )

    def one(r: int, v: int) -> Any:
        return loops.loop(numbers, lambda i: store(r, v, i, value(r, v, i)), "lane")

    return loops.sequence(*(one(*place) for place in places))


def best_tile(machine: Machine, rows: int, vectors: int) -> tuple[int, int]:
    """Give the (rows, vectors) of the tiles that cover `rows` x `vectors` sums, split evenly, in the fewest cycles.

    Of equals it is the one with most rows, which reads vectors least often.
    """
    choices = [
        (round(covering_cycles(machine, rows, vectors, r, v), 3), -r, r, v)
        for r in range(1, min(rows, machine.registers - 2) + 1)
        for v in range(1, min(vectors, machine.registers // 2) + 1)
        if machine.fits(r, v)
    ]
    _, _, r, v = min(choices)
    return r, v


def covering_cycles(machine: Machine, rows: int, vectors: int, most_rows: int, most_vectors: int) -> float:
    """Count the cycles of one step of all tiles that cover `rows` x `vectors` sums, split evenly."""
    parts = product(even_split(rows, most_rows), even_split(vectors, most_vectors))
    return sum(m * n * step_cycles(machine, r, v) for (r, m), (v, n) in parts)


def step_cycles(machine: Machine, rows: int, vectors: int) -> float:
    """Count the cycles of one step of a tile: arithmetic, its latency, or loads; and the loop around it."""
    loads = (rows + vectors) / machine.loads
    return max(rows * vectors / machine.fma_ports, float(machine.fma_latency), loads) + LOOP_CYCLES


LOOP_CYCLES = 0.4
"""What the loop around a tile costs for each step."""


def vector_width(extent: int, lanes: int) -> int:
    """Give the lanes of vectors that cover an extent: those of a register, fewer where it is shorter."""
    return min(lanes, 1 << (extent.bit_length() - 1))


def vector_starts(index: Any, extent: int, lanes: int) -> Any:
    """Give where vector number `index` of those that cover an extent starts.

    The last one begins early enough to end with the extent, so it may repeat some of the one before.
    """
    from tvm import tirx

    from cnnc.backends.lower import loops

    return index * lanes if extent % lanes == 0 else tirx.min(index * lanes, loops.const(extent - lanes))
