"""The tile of a product of matrices that a block of threads computes on a GPU's ordinary cores (`FFMA`).

    sums[row, column] = sum over depth of a[row, depth] * b[column, depth]

Operands come in chunks of four numbers, stage by stage (see `mma_ring`).  A thread has quads of four neighbouring rows
and of four neighbouring columns.  The lanes of a warp load chunks of neighbouring quads at once, for which those of
every fourth row lie side by side, so that no two lanes are at one bank.  Where `slices` of warps share the depth of
each stage, they hand each other their sums through shared memory, and add them up in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.ffma_params import LANE_COLUMNS, LANE_ROWS, NUMBERS, FfmaParams
from cnnc.backends.cuda.launches import barrier
from cnnc.backends.cuda.machine import LANES
from cnnc.backends.cuda.mma_ring import Operand, Ring, Store, Sums, staged
from cnnc.backends.lower import loops

__all__ = ["ffma_product"]

_MOST_UNROLLED = 128
"""Sums of a thread, times the chunks of depth, whose products follow one another without a branch."""


@dataclass(frozen=True)
class _Shared(Ring):
    """Lines one after the other, of a chunk of depth, or ACROSS of one place in depth."""

    @property
    def pitch(self) -> int:
        """From one line to the next: one chunk more where neighbouring threads copy to neighbouring lines."""
        return self.line if self.across else self.line + 1

    @property
    def chunks(self) -> int:
        """All of it, counted in chunks."""
        return self.tile.stages * self.lines * self.pitch

    def place(self, stage: Any, line: Any, position: Any) -> Any:
        """Give the place of a chunk, counted in chunks; those of every fourth row are neighbours."""
        if not self.across:
            position = position % NUMBERS * (self.rows // NUMBERS) + position // NUMBERS
        return self.start + (stage * self.lines + line) * self.pitch + position

    def load(self, registers: Any, first: Any, memory: Any, stage: Any, chunk: Any, quad: Any) -> Any:
        """Load four numbers in depth of four rows."""

        def one(i: Any) -> Any:
            line, position = (chunk * NUMBERS + i, quad) if self.across else (chunk, quad * NUMBERS + i)
            numbers = loops.load(memory, self.place(stage, line, position))
            return loops.store(registers, numbers, first + i * NUMBERS, lanes=NUMBERS)

        return loops.unrolled(NUMBERS, one, "i")

    def number(self, row: Any, depth: Any) -> Any:
        """Tell which of the 16 numbers is that of a row and a place in depth."""
        return depth * NUMBERS + row if self.across else row * NUMBERS + depth


@dataclass(frozen=True)
class _Thread:
    """A thread: which slice it is of, its number there, and its first quads of rows and of columns."""

    tile: FfmaParams
    member: Any
    own: Any

    @property
    def row(self) -> Any:
        """The first quad of rows."""
        tile, warp, lane = self.tile, self.own // LANES, self.own % LANES
        return warp // tile.warps_across * (tile.warp_rows // NUMBERS) + lane // LANE_COLUMNS

    @property
    def column(self) -> Any:
        """The first quad of columns."""
        tile, warp, lane = self.tile, self.own // LANES, self.own % LANES
        return warp % tile.warps_across * (tile.warp_columns // NUMBERS) + lane % LANE_COLUMNS

    def put(self, store: Store, number: Any, take: Callable[[Any], Any], neighbours: int) -> Any:
        """Store four neighbouring sums, so many at once, by their number among the thread's."""
        across = self.tile.thread_columns // NUMBERS
        i, j = number // across, number % across
        row = (self.row + i // NUMBERS * LANE_ROWS) * NUMBERS + i % NUMBERS
        column = (self.column + j * LANE_COLUMNS) * NUMBERS

        def piece(p: Any) -> Any:
            return store(row, column + p * neighbours, lambda which: take(p * neighbours + which))

        return loops.unrolled(NUMBERS // neighbours, piece, "piece")


def ffma_product(
    tile: FfmaParams, a: Operand, b: Operand, number: Any, steps: tuple[Any, Any], neighbours: int
) -> Sums:
    """Write the product of a tile over the steps [first, last), each of `tile.depth` chunks; there may be none.

    Sums are stored by so many neighbours.
    """
    left = _Shared(a, tile.rows, 0, tile)
    right = _Shared(b, tile.columns, left.chunks, tile)
    memory = loops.buffer("shared", (left.chunks + right.chunks,), "float32x4", "shared.dyn")
    sums = loops.buffer("sums", (tile.sums,), scope="local")
    thread = _Thread(tile, number // tile.slice_threads, number % tile.slice_threads)
    chunks = tile.depth // tile.slices
    # So many in a row, that loads of the next go on beside products.
    unroll = min(chunks, _MOST_UNROLLED // tile.sums)

    def multiply(stage: Any) -> Any:
        def chunk(turn: Any, u: Any) -> Any:
            own = (turn * unroll + u) * tile.slices + thread.member
            return _multiply(thread, memory, sums, (left, right), stage, own)

        return loops.loop(chunks // unroll, lambda turn: loops.unrolled(unroll, lambda u: chunk(turn, u), "u"), "turn")

    compute = loops.sequence(
        loops.alloc(memory),
        loops.alloc(sums),
        loops.unrolled(tile.sums, lambda i: loops.store(sums, tirx.const(0.0, "float32"), i)),
        staged((left, right), memory, number, steps, multiply),
    )

    def finish(store: Store) -> Any:
        def put(quad: Any) -> Any:
            return thread.put(store, quad, lambda which: loops.load(sums, quad * NUMBERS + which), neighbours)

        if tile.slices > 1:
            return _add_slices(thread, sums, store, neighbours)
        return loops.unrolled(tile.sums // NUMBERS, put, "quad")

    return Sums(compute, finish)


def _add_slices(thread: _Thread, sums: Any, store: Store, neighbours: int) -> Any:
    """Add up what slices have, each some quads of sums, and store that."""
    tile, quads = thread.tile, thread.tile.sums // NUMBERS
    shares = loops.buffer("shares", (tile.slices, quads, tile.slice_threads), "float32x4", "shared")
    total = loops.buffer("total", (NUMBERS,), scope="local")

    def share(quad: Any) -> Any:
        numbers = loops.load(sums, quad * NUMBERS, lanes=NUMBERS)
        return loops.store(shares, numbers, thread.member, quad, thread.own)

    def finish(turn: Any) -> Any:
        quad = turn * tile.slices + thread.member

        def add(member: Any) -> Any:
            added = loops.load(total, 0, lanes=NUMBERS) + loops.load(shares, member, quad, thread.own)
            return loops.store(total, added, 0, lanes=NUMBERS)

        summed = loops.sequence(
            loops.store(total, loops.load(shares, 0, quad, thread.own), 0, lanes=NUMBERS),
            loops.unrolled(tile.slices - 1, add, "slice", start=1),
            thread.put(store, quad, lambda which: loops.load(total, which), neighbours),
        )
        return summed if quads % tile.slices == 0 else loops.when(quad < quads, summed)

    return loops.sequence(
        loops.alloc(shares),
        loops.alloc(total),
        loops.unrolled(quads, share, "quad"),
        barrier(),
        loops.unrolled(-(-quads // tile.slices), finish, "turn"),
    )


def _multiply(thread: _Thread, memory: Any, sums: Any, rings: tuple[_Shared, _Shared], stage: Any, chunk: Any) -> Any:
    """Multiply a chunk of depth: a thread's rows by four of its columns after the other."""
    tile, (left, right) = thread.tile, rings
    high, wide = tile.thread_rows // NUMBERS, tile.thread_columns // NUMBERS
    block = NUMBERS * NUMBERS
    a = loops.buffer("a", (high * block,), scope="local")
    b = loops.buffer("b", (block,), scope="local")

    def load_rows(q: Any) -> Any:
        return left.load(a, q * block, memory, stage, chunk, thread.row + q * LANE_ROWS)

    def add(depth: Any, i: Any, q: Any, j: Any) -> Any:
        at = i * tile.thread_columns + q * NUMBERS + j
        row = loops.load(a, i // NUMBERS * block + left.number(i % NUMBERS, depth))
        return loops.store(sums, loops.load(sums, at) + row * loops.load(b, right.number(j, depth)), at)

    def columns(q: Any) -> Any:
        return loops.sequence(
            right.load(b, 0, memory, stage, chunk, thread.column + q * LANE_COLUMNS),
            loops.loop(
                NUMBERS,
                lambda depth: loops.loop(
                    tile.thread_rows, lambda i: loops.loop(NUMBERS, lambda j: add(depth, i, q, j), "j"), "i"
                ),
                "depth",
            ),
        )

    return loops.sequence(
        loops.alloc(a),
        loops.alloc(b),
        loops.unrolled(high, load_rows, "q"),
        loops.unrolled(wide, columns, "q"),
    )
