"""The loops of `matvec`: weights into registers, several steps at once, and sums of lanes and warps in order."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from cnnc.backends.cuda.bodies import body_around
from cnnc.backends.cuda.launches import barrier, launch, position, reduce_lanes
from cnnc.backends.cuda.machine import LANES
from cnnc.backends.cuda.matvec import Layer, MatVecParams
from cnnc.backends.cuda.vectors import copy_vector
from cnnc.backends.lower import loops
from cnnc.ops.fused import Fused


def matvec_func(kernel: Fused, layer: Layer, tile: MatVecParams) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output."""
    return _MatVec(kernel, layer, tile).function()


class _MatVec:
    """Writes the loops of one layer."""

    def __init__(self, kernel: Fused, layer: Layer, tile: MatVecParams) -> None:
        self.shape = layer.shape
        self.tile = tile
        *self.leading, _ = layer.node.types[0].static_shape
        self.body = body_around(kernel, layer.node).bind(layer.node.types[0].physical_shape)
        buffers = dict(zip(kernel.body.inputs, self.body.inputs, strict=True))
        self.x, self.w = buffers[layer.x], buffers[layer.weight]
        self.y = self.body.output()
        sums = tile.outputs * self.shape.rows
        lanes = self.shape.lanes
        self.weights = loops.buffer("weights", (tile.unroll, tile.outputs, lanes), str(self.w.dtype), "local")
        self.numbers = loops.buffer("numbers", (self.shape.rows, lanes), str(self.x.dtype), "local")
        self.sums = loops.buffer("sums", (sums,), scope="local")
        self.parts = loops.buffer("parts", (tile.warps, sums), scope="shared")

    def function(self) -> Any:
        """Make the PrimFunc."""
        statement = launch((self.shape.blocks(self.tile),), self.tile.threads, self._block)
        return loops.function([*self.body.inputs, self.y], statement)

    def _block(self, thread: Any, block: Any) -> Any:
        tile = self.tile
        warp, lane = thread // LANES, thread % LANES
        first = block * tile.block_outputs + warp // tile.splits * tile.outputs
        sums = tile.outputs * self.shape.rows

        def keep(i: Any) -> Any:
            return loops.store(self.parts, loops.load(self.sums, i), warp, i)

        return loops.sequence(
            *(loops.alloc(buffer) for buffer in (self.weights, self.numbers, self.sums, self.parts)),
            loops.unrolled(sums, lambda i: loops.store(self.sums, tirx.const(0.0, "float32"), i)),
            self._all_terms(first, warp % tile.splits, lane),
            loops.unrolled(sums, lambda i: reduce_lanes(self.sums, i, lambda a, b: a + b)),
            loops.when(lane < 1, loops.unrolled(sums, keep)),
            barrier(),
            self._finish(block, thread),
        )

    def _all_terms(self, first: Any, part: Any, lane: Any) -> Any:
        """Add up a lane's terms: whole turns of `unroll` steps, then the rest, which not every lane has a part of."""
        tile, chunks = self.tile, self.shape.depth // self.shape.lanes
        step = tile.splits * LANES
        turns = chunks // (step * tile.unroll)
        rest = -(-(chunks - turns * step * tile.unroll) // step)

        def chunk(turn: Any, u: Any) -> Any:
            return (turn * tile.unroll + u) * step + part * LANES + lane

        def whole(turn: Any) -> Any:
            return loops.sequence(
                loops.unrolled(tile.unroll, lambda u: self._load(first, chunk(turn, u), u), "u"),
                loops.unrolled(tile.unroll, lambda u: self._multiply(chunk(turn, u), u), "u"),
            )

        def last(u: Any) -> Any:
            at = chunk(turns, u)
            return loops.when(at < chunks, loops.sequence(self._load(first, at, u), self._multiply(at, u)))

        return loops.sequence(
            loops.loop(turns, whole, "turn") if turns else None,
            loops.unrolled(rest, last, "u") if rest else None,
        )

    def _load(self, first: Any, chunk: Any, u: Any) -> Any:
        """Read the weights of a step; beyond the last output they are those of the last one, and never stored."""

        def one(o: Any) -> Any:
            output = first + o
            if self.shape.outputs % self.tile.block_outputs:
                output = tirx.min(output, loops.const(self.shape.outputs - 1))
            return copy_vector(self.weights, (u, o, 0), self.w, (output, chunk * self.shape.lanes), self.shape.lanes)

        return loops.unrolled(self.tile.outputs, one, "o")

    def _multiply(self, chunk: Any, u: Any) -> Any:
        rows, lanes = self.shape.rows, self.shape.lanes

        def numbers(r: Any) -> Any:
            at = (*position(self.leading, r), chunk * lanes)
            return copy_vector(self.numbers, (r, 0), self.x, at, lanes)

        def add(o: Any, r: Any, i: Any) -> Any:
            product = loops.widened(self.numbers, r, i) * loops.widened(self.weights, u, o, i)
            return loops.store(self.sums, loops.load(self.sums, o * rows + r) + product, o * rows + r)

        return loops.unrolled(
            rows,
            lambda r: loops.sequence(
                numbers(r),
                loops.unrolled(self.tile.outputs, lambda o: loops.unrolled(lanes, lambda i: add(o, r, i), "i"), "o"),
            ),
            "r",
        )

    def _finish(self, block: Any, thread: Any) -> Any:
        """Add up what warps share, a thread an output of a row, and store what the epilogue makes of it."""
        tile, rows = self.tile, self.shape.rows
        count = tile.block_outputs * rows

        def one(turn: Any) -> Any:
            number = turn * tile.threads + thread
            row, column = number // tile.block_outputs, number % tile.block_outputs
            output = block * tile.block_outputs + column
            warp, i = column // tile.outputs * tile.splits, column % tile.outputs * rows + row
            total = loops.load(self.parts, warp, i)
            for part in range(1, tile.splits):
                total = total + loops.load(self.parts, warp + part, i)
            index = (*position(self.leading, row), output)
            store = loops.sequence(
                loops.store(self.sums, total, 0),
                loops.store(self.y, self.body.value(loops.load(self.sums, 0), index), *index),
            )
            return loops.when(tirx.all(number < count, output < self.shape.outputs), store)

        return loops.unrolled(-(-count // tile.threads), one, "turn")
