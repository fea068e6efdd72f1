"""The tile of a product of matrices of `wgmma_tile`, whose stages are filled by copies of whole boxes (TMA).

    sums[row, column] = sum over depth of a[row, depth] * b[column, depth]

One thread starts the copies; addresses, and zeros for what is outside of an operand, are the hardware's.  Each stage
has a barrier in shared memory at which all threads wait for its bytes, phase by phase; a barrier of the block then says
that all groups are done with the products of the stage before the last, which the next copies overwrite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tvm import tirx

from cnnc.backends.cuda import tma, wgmma
from cnnc.backends.cuda.launches import address, barrier, call
from cnnc.backends.cuda.machine import CHUNK_BYTES, LANES
from cnnc.backends.cuda.mma_params import GROUP_ROWS, GROUP_THREADS, MMA_COLUMNS, MMA_ROWS, SWIZZLED, TmaParams
from cnnc.backends.cuda.mma_ring import HALF_ROWS, Sums
from cnnc.backends.cuda.mma_tile import store_fragments
from cnnc.backends.cuda.tensor_maps import MappedBuffer
from cnnc.backends.lower import loops
from cnnc.ir.types import DType

__all__ = ["BoxCopy", "BoxedOperand", "Lines", "boxed_product"]

_PRODUCT_CHUNKS = 2
"""What an instruction takes of the depth."""


class Lines(Enum):
    """How a stage of an operand lies in shared memory.

    DEPTH: rows of 128 bytes, swizzled.  ACROSS: lines of 64 rows at a place in depth, swizzled, all of them before
    those of the next 64.  CHUNKS: the chunks of all rows, one place in depth after the other, as matrices of eight rows
    that need no swizzle.
    """

    DEPTH = "depth"
    ACROSS = "across"
    CHUNKS = "chunks"


@dataclass(frozen=True)
class BoxCopy:
    """A copy of a box to a stage, from this chunk of it on: the function, and the box's place in the tensor."""

    chunk: int
    function: str
    place: tuple[Any, ...]


@dataclass(frozen=True)
class BoxedOperand:
    """An operand: its map, how stages lie, and the copies that fill one, by the tile's first row and first chunk."""

    map: MappedBuffer
    lines: Lines
    copies: Callable[[Any, Any], Sequence[BoxCopy]]


@dataclass(frozen=True)
class _Stages:
    """An operand's part of shared memory, counted in chunks."""

    operand: BoxedOperand
    rows: int
    start: int
    tile: TmaParams

    @property
    def stage(self) -> int:
        """The chunks of a stage."""
        return self.rows * self.tile.depth

    @property
    def chunks(self) -> int:
        """All of it."""
        return self.tile.stages * self.stage

    @property
    def across(self) -> bool:
        """Whether neighbours in memory are of neighbouring rows."""
        return self.operand.lines is Lines.ACROSS

    def fetch(self, memory: Any, full: Any, first_row: Any, step: Any, stage: Any) -> Any:
        """Start the copies of a step into a stage."""
        copies, source = self.operand.copies(first_row, step * self.tile.depth), self.operand.map.address
        place = self.start + stage * self.stage
        return loops.sequence(
            *(call(c.function, address(memory, place + c.chunk), source, full, *c.place) for c in copies)
        )

    def descriptor(self, memory: Any, stage: Any, product: Any, row: Any) -> Any:
        """Describe the operand of the stage's product of this number, from a row on."""
        chunk, start = product * _PRODUCT_CHUNKS, self.start + stage * self.stage
        if self.operand.lines is Lines.CHUNKS:
            place = address(memory, start + chunk * self.rows + row)
            return tirx.call_extern(
                "uint64", wgmma.DESCRIPTOR_OF_MATRICES, place, self.rows * CHUNK_BYTES, HALF_ROWS * CHUNK_BYTES
            )
        block = self.tile.depth * HALF_ROWS * SWIZZLED
        first = row // GROUP_ROWS * block + chunk * HALF_ROWS * SWIZZLED if self.across else row * SWIZZLED + chunk
        leading = block * CHUNK_BYTES if self.across else CHUNK_BYTES
        return tirx.call_extern(
            "uint64", wgmma.DESCRIPTOR, address(memory, start + first), leading, HALF_ROWS * SWIZZLED * CHUNK_BYTES
        )


def boxed_product(
    tile: TmaParams,
    dtype: DType,
    operands: tuple[BoxedOperand, BoxedOperand],
    first_places: tuple[Any, Any],
    thread: Any,
    steps: tuple[Any, Any],
) -> Sums:
    """Write the product of a tile, from a row and a column on, over the steps [first, last), each a stage.

    There may be no step at all.
    """
    left = _Stages(operands[0], tile.rows, 0, tile)
    right = _Stages(operands[1], tile.columns, left.chunks, tile)
    first_barrier = left.chunks + right.chunks
    memory = tirx.decl_buffer(
        (first_barrier + tile.barrier_chunks,), "uint32x4", "shared", scope="shared.dyn", data_alignment=wgmma.ALIGNMENT
    )
    sums = loops.buffer("sums", (tile.sums,), scope="local")
    group, warp, lane = thread // GROUP_THREADS, thread % GROUP_THREADS // LANES, thread % LANES
    high, ahead = tile.group_rows // GROUP_ROWS, tile.stages - 2
    first, last = steps

    def full(stage: Any) -> Any:
        return address(memory, first_barrier + stage)

    def fetch(step: Any, stage: Any) -> Any:
        start = loops.sequence(
            call(tma.EXPECT, full(stage), (left.stage + right.stage) * CHUNK_BYTES),
            left.fetch(memory, full(stage), first_places[0], step, stage),
            right.fetch(memory, full(stage), first_places[1], step, stage),
        )
        return loops.when(tirx.all(thread == 0, step < last), start)

    def multiply(stage: Any, product: Any, i: Any) -> Any:
        name = wgmma.multiply(dtype, tile.columns, left.across, right.across)
        row = group * tile.group_rows + i * GROUP_ROWS
        a_there = left.descriptor(memory, stage, product, row)
        b_there = right.descriptor(memory, stage, product, 0)
        return call(name, address(sums, i * (tile.columns // 2)), a_there, b_there)

    def turn(step: Any) -> Any:
        stage = step % tile.stages

        def products(number: Any) -> Any:
            return loops.unrolled(high, lambda i: multiply(stage, number, i), "i")

        return loops.sequence(
            call(tma.WAIT, full(stage), step // tile.stages % 2),
            barrier(),
            call(wgmma.fence(tile.sums), address(sums, 0)),
            loops.unrolled(tile.depth // _PRODUCT_CHUNKS, products, "product"),
            call(wgmma.COMMIT),
            fetch(first + step + ahead, (step + ahead) % tile.stages),
            call(wgmma.wait(1, tile.sums), address(sums, 0)),
        )

    make_barriers = loops.sequence(
        loops.unrolled(tile.stages, lambda stage: call(tma.INIT, full(stage), 1), "stage"), call(tma.FENCE)
    )
    compute = loops.sequence(
        loops.alloc(memory),
        loops.alloc(sums),
        loops.when(thread == 0, make_barriers),
        barrier(),
        loops.unrolled(tile.sums, lambda i: loops.store(sums, tirx.const(0.0, "float32"), i)),
        loops.unrolled(ahead, lambda stage: fetch(first + stage, stage), "stage"),
        loops.loop(last - first, turn, "step"),
        call(wgmma.wait(0, tile.sums), address(sums, 0)),
    )
    row, fragments = group * tile.group_rows + warp * MMA_ROWS, (high, GROUP_ROWS, tile.columns // MMA_COLUMNS)
    return Sums(compute, lambda store: store_fragments(sums, fragments, (row, 0), lane, store))
