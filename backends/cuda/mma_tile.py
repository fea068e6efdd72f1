"""The tile of a product of matrices that a block of threads computes with tensor cores.

    sums[row, column] = sum over depth of a[row, depth] * b[column, depth]

Both operands come in chunks, stage by stage (see `mma_ring`).  Chunks of neighbouring rows lie side by side in shared
memory, so that neither storing them nor loading matrices of 8 rows (`ldmatrix`) ever has two threads at one bank.  A
warp keeps the sums of its own tile in registers, from which the caller takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnnc.backends.cuda import tensor_cores
from cnnc.backends.cuda.launches import address, call
from cnnc.backends.cuda.machine import LANES
from cnnc.backends.cuda.mma_params import MMA_COLUMNS, MMA_ROWS, MmaParams
from cnnc.backends.cuda.mma_ring import HALF_ROWS, Operand, Order, Ring, Store, Sums, staged
from cnnc.backends.lower import loops
from cnnc.ir.types import DType

__all__ = ["MatrixRing", "store_fragments", "tile_product"]


@dataclass(frozen=True)
class MatrixRing(Ring):
    """Lines one after the other, which `ldmatrix` loads by the address of each row."""

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

    def load_rows(self, registers: Any, memory: Any, stage: Any, pair: Any, row: Any, lane: Any) -> Any:
        """Load 16 rows of two chunks as a first operand: rows 0 and 8 of the first chunk, then of the second."""
        chunk, half = pair * 2 + lane // 16, lane // 8 % 2 * HALF_ROWS
        return self._load(registers, memory, stage, chunk, row + half, lane)

    def load_columns(self, registers: Any, memory: Any, stage: Any, pair: Any, column: Any, lane: Any) -> Any:
        """Load 16 columns of two chunks as two second operands: both chunks of columns 0, then of columns 8."""
        chunk, half = pair * 2 + lane // 8 % 2, lane // 16 * HALF_ROWS
        return self._load(registers, memory, stage, chunk, column + half, lane)

    def _load(self, registers: Any, memory: Any, stage: Any, chunk: Any, row: Any, lane: Any) -> Any:
        """Load four matrices, the lanes' of 8 rows from `row` on, at a chunk of depth (each may differ by lane)."""
        if not self.across:
            return call(tensor_cores.LOAD, registers, address(memory, self.place(stage, chunk, row + lane % 8)))
        place = self.place(stage, chunk * HALF_ROWS + lane % 8, row // HALF_ROWS)
        return call(tensor_cores.LOAD_TRANSPOSED, registers, address(memory, place))


def tile_product(tile: MmaParams, dtype: DType, a: Operand, b: Operand, thread: Any, steps: tuple[Any, Any]) -> Sums:
    """Write the product of a tile over the steps [first, last), each of `tile.depth` chunks.

    Both are expressions; there may be no step at all.
    """
    left = MatrixRing(a, tile.rows, 0, tile)
    right = MatrixRing(b, tile.columns, left.chunks, tile)
    memory = loops.buffer("shared", (left.chunks + right.chunks,), "uint32x4", "shared.dyn")
    sums = loops.buffer("sums", (tile.sums,), scope="local")
    warp, lane = thread // LANES, thread % LANES
    row = warp // tile.warps_across * tile.warp_rows
    column = warp % tile.warps_across * tile.warp_columns

    def multiply(stage: Any) -> Any:
        return _multiply(tile, dtype, memory, sums, (left, row), (right, column), stage, lane)

    compute = loops.sequence(
        loops.alloc(memory),
        loops.alloc(sums),
        loops.unrolled(tile.sums, lambda i: loops.store(sums, tirx.const(0.0, "float32"), i)),
        staged((left, right), memory, thread, steps, multiply),
    )
    high, wide = tile.warp_rows // MMA_ROWS, tile.warp_columns // MMA_COLUMNS
    return Sums(compute, lambda store: store_fragments(sums, (high, MMA_ROWS, wide), (row, column), lane, store))


def _multiply(
    tile: MmaParams,
    dtype: DType,
    memory: Any,
    sums: Any,
    rows: tuple[MatrixRing, Any],
    columns: tuple[MatrixRing, Any],
    stage: Any,
    lane: Any,
) -> Any:
    """Multiply a stage, two chunks of depth at a time, in the tile of a warp."""
    (left, row), (right, column) = rows, columns
    high, wide = tile.warp_rows // MMA_ROWS, tile.warp_columns // MMA_COLUMNS
    a = loops.buffer("a", (4 * high,), "uint32", "local")
    b = loops.buffer("b", (2 * wide,), "uint32", "local")

    def load_left(pair: Any, i: Any) -> Any:
        return left.load_rows(address(a, i * 4), memory, stage, pair, row + i * MMA_ROWS, lane)

    def load_right(pair: Any, j: Any) -> Any:
        return right.load_columns(address(b, j * 4), memory, stage, pair, column + j * 16, lane)

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
            loops.unrolled(high, lambda i: load_left(pair, i), "i"),
            loops.unrolled(wide // 2, lambda j: load_right(pair, j), "j"),
            rounded(a, 4 * high),
            rounded(b, 2 * wide),
            loops.unrolled(high, products, "i"),
        )

    return loops.sequence(loops.alloc(a), loops.alloc(b), loops.unrolled(tile.depth // 2, step, "pair"))


def store_fragments(sums: Any, shape: tuple[int, int, int], first: tuple[Any, Any], lane: Any, store: Store) -> Any:
    """Store a thread's part of fragments of 16 by 8 sums, by pairs of neighbouring columns.

    A warp has `shape` of them: so many down, each so many rows after the one before, and so many side by side.
    """
    high, rows, wide = shape
    row, column = first

    def pair(i: Any, half: Any, j: Any) -> Any:
        start = (i * wide + j) * 4 + half * 2
        return store(
            row + i * rows + half * HALF_ROWS + lane // 4,
            column + j * MMA_COLUMNS + lane % 4 * 2,
            lambda which: loops.load(sums, start + which),
        )

    return loops.unrolled(
        high,
        lambda i: loops.unrolled(2, lambda half: loops.unrolled(wide, lambda j: pair(i, half, j), "j"), "half"),
        "i",
    )
