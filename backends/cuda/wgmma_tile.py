"""The tile of a product of matrices that groups of four warps compute from shared memory (`wgmma`).

    sums[row, column] = sum over depth of a[row, depth] * b[column, depth]

A stage has 128 bytes of depth, eight chunks that change places by the row's number, so that neither storing them nor
multiplying ever has two threads at one bank.  Products are asynchronous: while those of a stage go on, all warps meet
at the next.  A stage is overwritten when the products of the stage after it have been started and its own are done, so
copies are two stages less ahead than there are.  A group has its own rows, and all columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnnc.backends.cuda import tensor_cores, wgmma
from cnnc.backends.cuda.launches import address, barrier, call
from cnnc.backends.cuda.machine import CHUNK_BYTES, LANES
from cnnc.backends.cuda.mma_params import GROUP_ROWS, GROUP_THREADS, MMA_COLUMNS, MMA_ROWS, SWIZZLED, WgmmaParams
from cnnc.backends.cuda.mma_ring import HALF_ROWS, Operand, Ring, Sums
from cnnc.backends.cuda.mma_tile import store_fragments
from cnnc.backends.lower import loops
from cnnc.ir.types import DType

__all__ = ["warpgroup_product"]

_PRODUCT_CHUNKS = 2
"""What an instruction takes of the depth."""


@dataclass(frozen=True)
class _Swizzled(Ring):
    """Lines of 128 bytes: of a row, its depth; ACROSS, of a place in depth, 64 rows, of which the next 64 follow."""

    @property
    def chunks(self) -> int:
        """All of it, counted in chunks."""
        return self.tile.stages * self.lines * self.line

    @property
    def _block(self) -> int:
        """The chunks of a stage that are of 64 rows ACROSS."""
        return self.lines * SWIZZLED

    def place(self, stage: Any, line: Any, position: Any) -> Any:
        """Give the place of a chunk, counted in chunks."""
        stage_start = self.start + stage * (self.lines * self.line)
        if not self.across:
            return stage_start + position * SWIZZLED + (line ^ position % SWIZZLED)
        block_start = stage_start + position // SWIZZLED * self._block
        return block_start + line * SWIZZLED + (position % SWIZZLED ^ line % SWIZZLED)

    def descriptor(self, memory: Any, stage: Any, product: Any, row: Any) -> Any:
        """Describe the operand of the stage's product of this number, from a row on."""
        chunk = product * _PRODUCT_CHUNKS
        first = row * SWIZZLED + chunk
        if self.across:
            first = row // GROUP_ROWS * self._block + chunk * HALF_ROWS * SWIZZLED
        place = address(memory, self.start + stage * (self.lines * self.line) + first)
        line_bytes = SWIZZLED * CHUNK_BYTES
        leading = self._block * CHUNK_BYTES if self.across else CHUNK_BYTES
        return tirx.call_extern("uint64", wgmma.DESCRIPTOR, place, leading, HALF_ROWS * line_bytes)


def warpgroup_product(
    tile: WgmmaParams, dtype: DType, a: Operand, b: Operand, thread: Any, steps: tuple[Any, Any]
) -> Sums:
    """Write the product of a tile over the steps [first, last), each a stage; there may be no step at all."""
    left = _Swizzled(a, tile.rows, 0, tile)
    right = _Swizzled(b, tile.columns, left.chunks, tile)
    memory = tirx.decl_buffer(
        (left.chunks + right.chunks,), "uint32x4", "shared", scope="shared.dyn", data_alignment=wgmma.ALIGNMENT
    )
    sums = loops.buffer("sums", (tile.sums,), scope="local")
    group, warp, lane = thread // GROUP_THREADS, thread % GROUP_THREADS // LANES, thread % LANES
    high, ahead = tile.group_rows // GROUP_ROWS, tile.stages - 2
    first, last = steps

    def fetch(step: Any, stage: Any) -> Any:
        both = loops.sequence(left.fetch(memory, thread, step, stage), right.fetch(memory, thread, step, stage))
        return loops.sequence(loops.when(step < last, both), call(tensor_cores.COMMIT))

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
            call(tensor_cores.wait(ahead - 1)),
            call(wgmma.PUBLISH),
            barrier(),
            call(wgmma.fence(tile.sums), address(sums, 0)),
            loops.unrolled(tile.depth // _PRODUCT_CHUNKS, products, "product"),
            call(wgmma.COMMIT),
            fetch(first + step + ahead, (step + ahead) % tile.stages),
            call(wgmma.wait(1, tile.sums), address(sums, 0)),
        )

    compute = loops.sequence(
        loops.alloc(memory),
        loops.alloc(sums),
        loops.unrolled(tile.sums, lambda i: loops.store(sums, tirx.const(0.0, "float32"), i)),
        loops.unrolled(ahead, lambda stage: fetch(first + stage, stage), "stage"),
        loops.loop(last - first, turn, "step"),
        call(wgmma.wait(0, tile.sums), address(sums, 0)),
    )
    row, fragments = group * tile.group_rows + warp * MMA_ROWS, (high, GROUP_ROWS, tile.columns // MMA_COLUMNS)
    return Sums(compute, lambda store: store_fragments(sums, fragments, (row, 0), lane, store))
