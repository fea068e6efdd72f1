"""The tile of a product of matrices that a block of threads computes with tensor cores.

    sums[row, column] = sum over depth of a[row, depth] * b[column, depth]

Both operands come in chunks: 16 bytes of a row, of neighbours in depth.  `depth` chunks of all rows and columns are a
stage; while one is multiplied, those after it are on their way into shared memory (`cp.async`).  Chunks of neighbouring
rows lie side by side there, so that neither storing them nor loading matrices of 8 rows (`ldmatrix`) ever has two
threads at one bank.  A warp keeps the sums of its own tile in registers, from which the caller takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tvm import tirx

from cnnc.backends.cuda import tensor_cores
from cnnc.backends.cuda.launches import address, barrier, call
from cnnc.backends.cuda.mma_params import LANES, MMA_COLUMNS, MMA_ROWS, MmaParams
from cnnc.backends.lower import loops
from cnnc.ir.types import DType

__all__ = ["HALF_ROWS", "Operand", "Order", "Sums", "tile_product"]

Chunk = Callable[[Any, Any], tuple[Any, Any]]
"""The address of a chunk in memory, and whether it is there, by its row in the tile and its number in depth."""

Store = Callable[[Any, Any, Any], Any]
"""Stores two neighbouring sums: (row in the tile, column in the tile, function of 0 and 1 that gives them)."""

HALF_ROWS = 8
"""Of the matrices that tensor cores load: also the 16-bit numbers in a chunk."""


class Order(Enum):
    """What neighbouring threads copy: what is neighbours in memory, as they should.

    ROWS: chunks of neighbouring rows.  DEPTH: neighbouring chunks of a row, in matrices of long rows.  ACROSS: a chunk
    is no part of a row, but a number each of 8 neighbouring rows, as in a matrix that is transposed.  Only numbers of
    16 bits are transposed on their way into registers; `chunk` then gets the chunk of rows, and the place in depth.
    """

    ROWS = "rows"
    DEPTH = "depth"
    ACROSS = "across"


@dataclass(frozen=True)
class Operand:
    """An operand of a product: where its chunks are, and how they lie in memory."""

    chunk: Chunk
    order: Order = Order.ROWS


@dataclass(frozen=True)
class Sums:
    """What `tile_product` gives: statements that compute, and then store the sums of a thread."""

    compute: Any
    finish: Callable[[Store], Any]


@dataclass(frozen=True)
class _Shared:
    """An operand's part of shared memory, a ring of stages, each of `lines` lines of `line` chunks side by side."""

    operand: Operand
    rows: int
    start: int
    tile: MmaParams

    @property
    def _across(self) -> bool:
        return self.operand.order is Order.ACROSS

    @property
    def line(self) -> int:
        """The chunks of a line: of one place in depth."""
        return self.rows // HALF_ROWS if self._across else self.rows

    @property
    def lines(self) -> int:
        """The lines of a stage."""
        return self.tile.depth * HALF_ROWS if self._across else self.tile.depth

    @property
    def pitch(self) -> int:
        """From one line to the next: one chunk more where the chunks of different lines are used at once."""
        return self.line if self.operand.order is Order.ROWS else self.line + 1

    @property
    def chunks(self) -> int:
        """All of it."""
        return self.tile.stages * self.lines * self.pitch

    def place(self, stage: Any, line: Any, position: Any) -> Any:
        """Give the place of a chunk, counted in chunks."""
        return self.start + (stage * self.lines + line) * self.pitch + position

    def fetch(self, memory: Any, thread: Any, step: Any, stage: Any) -> Any:
        """Start to copy the chunks of a step into a stage."""
        chunks = self.lines * self.line

        def one(turn: Any) -> Any:
            number = turn * self.tile.threads + thread
            line, position = number // self.line, number % self.line
            if self.operand.order is Order.DEPTH:
                line, position = number % self.lines, number // self.lines
            source, valid = self.operand.chunk(position, step * self.lines + line)
            copy = call(tensor_cores.COPY, address(memory, self.place(stage, line, position)), source, valid)
            return copy if chunks % self.tile.threads == 0 else loops.when(number < chunks, copy)

        return loops.unrolled(-(-chunks // self.tile.threads), one, "turn")

    def load(self, registers: Any, memory: Any, stage: Any, chunk: Any, row: Any, lane: Any) -> Any:
        """Load four matrices, the lanes' of 8 rows from `row` on, at a chunk of depth (each may differ by lane)."""
        if not self._across:
            return call(tensor_cores.LOAD, registers, address(memory, self.place(stage, chunk, row + lane % 8)))
        place = self.place(stage, chunk * HALF_ROWS + lane % 8, row // HALF_ROWS)
        return call(tensor_cores.LOAD_TRANSPOSED, registers, address(memory, place))


def tile_product(tile: MmaParams, dtype: DType, a: Operand, b: Operand, thread: Any, steps: tuple[Any, Any]) -> Sums:
    """Write the product of a tile over the steps [first, last), each of `tile.depth` chunks.

    Both are expressions; there may be no step at all.
    """
    left = _Shared(a, tile.rows, 0, tile)
    right = _Shared(b, tile.columns, left.chunks, tile)
    memory = loops.buffer("shared", (left.chunks + right.chunks,), "uint32x4", "shared.dyn")
    sums = loops.buffer("sums", (tile.sums,), scope="local")
    warp, lane = thread // LANES, thread % LANES
    row = warp // tile.warps_across * tile.warp_rows
    column = warp % tile.warps_across * tile.warp_columns
    first, last = steps

    def fetch(step: Any, stage: Any) -> Any:
        both = loops.sequence(left.fetch(memory, thread, step, stage), right.fetch(memory, thread, step, stage))
        return loops.sequence(loops.when(step < last, both), call(tensor_cores.COMMIT))

    def turn(step: Any) -> Any:
        ahead = step + (tile.stages - 1)
        return loops.sequence(
            call(tensor_cores.wait(tile.stages - 2)),
            barrier(),
            fetch(first + ahead, ahead % tile.stages),
            _multiply(tile, dtype, memory, sums, (left, row), (right, column), step % tile.stages, lane),
        )

    compute = loops.sequence(
        loops.alloc(memory),
        loops.alloc(sums),
        loops.unrolled(tile.sums, lambda i: loops.store(sums, tirx.const(0.0, "float32"), i)),
        loops.unrolled(tile.stages - 1, lambda stage: fetch(first + stage, stage), "stage"),
        loops.loop(last - first, turn, "step"),
    )
    return Sums(compute, lambda store: _finish(tile, sums, row, column, lane, store))


def _multiply(
    tile: MmaParams,
    dtype: DType,
    memory: Any,
    sums: Any,
    rows: tuple[_Shared, Any],
    columns: tuple[_Shared, Any],
    stage: Any,
    lane: Any,
) -> Any:
    """Multiply a stage, two chunks of depth at a time, in the tile of a warp."""
    (left, row), (right, column) = rows, columns
    high, wide = tile.warp_rows // MMA_ROWS, tile.warp_columns // MMA_COLUMNS
    a = loops.buffer("a", (4 * high,), "uint32", "local")
    b = loops.buffer("b", (2 * wide,), "uint32", "local")

    def load_rows(pair: Any) -> Callable[[Any], Any]:
        # Matrices: rows 0 and 8 of the first chunk, then of the second.
        def load(i: Any) -> Any:
            chunk, half = pair * 2 + lane // 16, lane // 8 % 2 * HALF_ROWS
            return left.load(address(a, i * 4), memory, stage, chunk, row + i * MMA_ROWS + half, lane)

        return load

    def load_columns(pair: Any) -> Callable[[Any], Any]:
        # Matrices: both chunks of columns 0, then of columns 8.
        def load(j: Any) -> Any:
            chunk, half = pair * 2 + lane // 8 % 2, lane // 16 * HALF_ROWS
            return right.load(address(b, j * 4), memory, stage, chunk, column + j * 16 + half, lane)

        return load

    def products(i: Any) -> Any:
        return loops.unrolled(
            wide,
            lambda j: call(
                tensor_cores.MMA[dtype], address(sums, (i * wide + j) * 4), address(a, i * 4), address(b, j * 2)
            ),
            "j",
        )

    def rounded(buffer: Any, registers: int) -> Any:
        return call(tensor_cores.round_tf32(registers), address(buffer, 0)) if dtype is DType.F32 else None

    def step(pair: Any) -> Any:
        return loops.sequence(
            loops.unrolled(high, load_rows(pair), "i"),
            loops.unrolled(wide // 2, load_columns(pair), "j"),
            rounded(a, 4 * high),
            rounded(b, 2 * wide),
            loops.unrolled(high, products, "i"),
        )

    return loops.sequence(loops.alloc(a), loops.alloc(b), loops.unrolled(tile.depth // 2, step, "pair"))


def _finish(tile: MmaParams, sums: Any, row: Any, column: Any, lane: Any, store: Store) -> Any:
    """Store a thread's sums, by pairs of neighbouring columns."""
    high, wide = tile.warp_rows // MMA_ROWS, tile.warp_columns // MMA_COLUMNS

    def pair(i: Any, half: Any, j: Any) -> Any:
        first = (i * wide + j) * 4 + half * 2
        return store(
            row + i * MMA_ROWS + half * 8 + lane // 4,
            column + j * MMA_COLUMNS + lane % 4 * 2,
            lambda which: loops.load(sums, first + which),
        )

    return loops.unrolled(
        high,
        lambda i: loops.unrolled(2, lambda half: loops.unrolled(wide, lambda j: pair(i, half, j), "j"), "half"),
        "i",
    )
