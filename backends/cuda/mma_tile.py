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
from typing import Any

from tvm import tirx

from cnnc.backends.cuda import tensor_cores
from cnnc.backends.cuda.launches import address, barrier, call
from cnnc.backends.cuda.mma_params import LANES, MMA_COLUMNS, MMA_ROWS, MmaParams
from cnnc.backends.lower import loops
from cnnc.ir.types import DType

__all__ = ["Operand", "Sums", "tile_product"]

Chunk = Callable[[Any, Any], tuple[Any, Any]]
"""The address of a chunk in memory, and whether it is there, by its row in the tile and its number in depth."""

Store = Callable[[Any, Any, Any], Any]
"""Stores two neighbouring sums: (row in the tile, column in the tile, function of 0 and 1 that gives them)."""


@dataclass(frozen=True)
class Operand:
    """An operand of a product: where its chunks are, and whether neighbouring threads take neighbours in depth.

    That is for matrices whose rows are long in memory; elsewhere neighbours among the rows are neighbours there.
    """

    chunk: Chunk
    along_depth: bool = False


@dataclass(frozen=True)
class Sums:
    """What `tile_product` gives: statements that compute, and then store the sums of a thread."""

    compute: Any
    finish: Callable[[Store], Any]


@dataclass(frozen=True)
class _Shared:
    """An operand's part of shared memory, a ring of stages: `rows` chunks of a depth lie side by side."""

    operand: Operand
    rows: int
    start: int
    tile: MmaParams

    @property
    def pitch(self) -> int:
        """From one depth to the next: one more than the rows where neighbours in depth are stored at once."""
        return self.rows + (1 if self.operand.along_depth else 0)

    def place(self, stage: Any, chunk: Any, row: Any) -> Any:
        """Give the place of a chunk, counted in chunks."""
        return self.start + (stage * self.tile.depth + chunk) * self.pitch + row

    def fetch(self, memory: Any, thread: Any, step: Any, stage: Any) -> Any:
        """Start to copy the chunks of a step into a stage."""
        chunks = self.rows * self.tile.depth

        def one(turn: Any) -> Any:
            number = turn * self.tile.threads + thread
            if self.operand.along_depth:
                row, chunk = number // self.tile.depth, number % self.tile.depth
            else:
                row, chunk = number % self.rows, number // self.rows
            source, valid = self.operand.chunk(row, step * self.tile.depth + chunk)
            copy = call(tensor_cores.COPY, address(memory, self.place(stage, chunk, row)), source, valid)
            return copy if chunks % self.tile.threads == 0 else loops.when(number < chunks, copy)

        return loops.unrolled(-(-chunks // self.tile.threads), one, "turn")


def tile_product(tile: MmaParams, dtype: DType, a: Operand, b: Operand, thread: Any, steps: tuple[Any, Any]) -> Sums:
    """Write the product of a tile over the steps [first, last), each of `tile.depth` chunks.

    Both are expressions; there may be no step at all.
    """
    left = _Shared(a, tile.rows, 0, tile)
    right = _Shared(b, tile.columns, tile.stages * tile.depth * left.pitch, tile)
    memory = loops.buffer("shared", (right.start + tile.stages * tile.depth * right.pitch,), "uint32x4", "shared.dyn")
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
            place = left.place(stage, pair * 2 + lane // 16, row + i * MMA_ROWS + lane % 16)
            return call(tensor_cores.LOAD, address(a, i * 4), address(memory, place))

        return load

    def load_columns(pair: Any) -> Callable[[Any], Any]:
        # Matrices: both chunks of columns 0, then of columns 8.
        def load(j: Any) -> Any:
            place = right.place(stage, pair * 2 + lane // 8 % 2, column + j * 16 + lane // 16 * 8 + lane % 8)
            return call(tensor_cores.LOAD, address(b, j * 4), address(memory, place))

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
