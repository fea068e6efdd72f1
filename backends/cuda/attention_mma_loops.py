"""The loops of `attention_mma`: see there for the method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnnc.backends.cuda import tensor_cores
from cnnc.backends.cuda.attention import StoredAttention
from cnnc.backends.cuda.attention_loops import mask_at
from cnnc.backends.cuda.attention_mma import PAIR, AttentionMmaParams, whole_pairs
from cnnc.backends.cuda.bodies import body_after
from cnnc.backends.cuda.codegen import RESIDENT_BLOCKS
from cnnc.backends.cuda.launches import address, barrier, call, launch
from cnnc.backends.cuda.machine import LANES
from cnnc.backends.cuda.mma_params import MMA_COLUMNS, MMA_ROWS
from cnnc.backends.cuda.mma_ring import HALF_ROWS, Operand, Order
from cnnc.backends.cuda.mma_tile import MatrixRing, store_fragments
from cnnc.backends.cuda.online_softmax import OnlineSoftmax
from cnnc.backends.lower import loops
from cnnc.ops.fused import Fused


def attention_mma_func(kernel: Fused, found: StoredAttention, tile: AttentionMmaParams, resident: int) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output, for so many blocks at once."""
    return _AttentionMma(kernel, found, tile).function().with_attr(RESIDENT_BLOCKS, resident)


@dataclass(frozen=True)
class _Stages:
    """A ring of stages, as `mma_ring` is to know it: of keys, which have their depth in chunks, or of values."""

    threads: int
    depth: int
    stages: int


class _AttentionMma:
    """Writes the loops of one attention."""

    def __init__(self, kernel: Fused, found: StoredAttention, tile: AttentionMmaParams) -> None:
        self.op, self.shape, self.tile = found.op, found.shape, tile
        self.dtype = found.stored[0].dtype
        self.body = body_after(kernel, found.node).bind(found.node.types[0].physical_shape)
        buffers = dict(zip(kernel.body.inputs, self.body.inputs, strict=True))
        self.operands = [buffers[value] for value in found.stored]
        self.y = self.body.output()
        self.steps = math.ceil(self.shape.keys / tile.keys)
        self.pairs = whole_pairs(self.op.size) // PAIR
        # Fragments side by side, of a warp's scores and of its sums.
        self.columns, self.wide = tile.warp_keys // MMA_COLUMNS, whole_pairs(self.op.value_size) // MMA_COLUMNS
        # Scores are scaled on their way into the exponential, where that keeps their order and there is no mask.
        self.raw = not self.shape.is_masked and self.op.scale > 0
        self.queries = loops.buffer("queries", (4 * self.pairs * tile.fragments,), "uint32", "local")
        self.left = loops.buffer("left", (4 * tile.fragments,), "uint32", "local")
        self.right = loops.buffer("right", (4,), "uint32", "local")

    def function(self) -> Any:
        """Make the PrimFunc."""
        statement = launch((self.tile.blocks(self.shape),), self.tile.threads, self._block)
        return loops.function([*self.body.inputs, self.y], statement)

    def _block(self, thread: Any, block: Any) -> Any:
        tile, blocks, heads = self.tile, math.ceil(self.shape.queries / self.tile.rows), self.op.heads
        warp, self.thread, self.lane = thread // LANES, thread, thread % LANES
        self.row, self.part = warp // tile.across * tile.warp_rows, warp % tile.across
        self.batch, self.head = block // (blocks * heads), block // blocks % heads
        self.first = block % blocks * tile.rows
        queries = self._lines(0, 0, self.first)
        self.keys = self._lines(1, queries.chunks)
        self.values = self._lines(2, queries.chunks + self.keys.chunks)
        chunks = queries.chunks + self.keys.chunks + self.values.chunks
        self.memory = loops.buffer("shared", (chunks,), "uint32x4", "shared.dyn")
        scale = self.op.scale if self.raw else 1.0
        self.softmax = OnlineSoftmax((tile.fragments, self.columns, self.wide), scale, self.lane)
        finish = self._finish()
        return loops.sequence(
            *(loops.alloc(buffer) for buffer in (self.memory, self.queries, self.left, self.right)),
            queries.fetch(self.memory, thread, 0, 0),
            loops.unrolled(tile.stages - 1, self._fetch, "stage"),
            self.softmax.start(),
            self._arrived(),
            loops.unrolled(tile.fragments, lambda i: self._load_queries(queries, i), "i"),
            loops.loop(self.steps, self._tile_of_keys, "step"),
            self.softmax.whole_totals(),
            self.softmax.add_up(tile.high, tile.across, warp, finish) if tile.across > 1 else finish,
        )

    # Operands into shared memory, zeros in the place of what is not there

    def _lines(self, which: int, start: int, first: Any = 0) -> MatrixRing:
        """Give the lines of queries, keys or values from a first one on, of which shared memory begins at a chunk."""
        tile, op, source = self.tile, self.op, self.operands[which]
        size = op.value_size if which == 2 else op.size
        extent = self.shape.queries if which == 0 else self.shape.keys

        def chunk_at(token: Any, chunk: Any) -> tuple[Any, Any]:
            feature = op.starts[which] + self.head * op.steps[which] + chunk * HALF_ROWS
            valid = tirx.all(first + token < extent, chunk * HALF_ROWS < size)
            return address(source, self.batch, first + token, feature), valid

        if which == 2:
            across = Operand(lambda chunk, token: chunk_at(token, chunk), Order.ACROSS)
            stages = _Stages(tile.threads, tile.keys // HALF_ROWS, tile.stages)
            return MatrixRing(across, whole_pairs(size), start, stages)
        stages = _Stages(tile.threads, whole_pairs(size) // HALF_ROWS, 1 if which == 0 else tile.stages)
        return MatrixRing(Operand(chunk_at, Order.DEPTH), tile.rows if which == 0 else tile.keys, start, stages)

    def _fetch(self, step: Any) -> Any:
        """Start to copy a tile of keys and values into its stage."""
        first, stage = step * self.tile.keys, step % self.tile.stages
        keys = self._lines(1, self.keys.start, first).fetch(self.memory, self.thread, 0, stage)
        values = self._lines(2, self.values.start, first).fetch(self.memory, self.thread, 0, stage)
        return loops.sequence(loops.when(step < self.steps, loops.sequence(keys, values)), call(tensor_cores.COMMIT))

    def _arrived(self) -> Any:
        """Wait for the oldest tile under way, and for all to be done with the one before it."""
        return loops.sequence(call(tensor_cores.wait(self.tile.stages - 2)), barrier())

    def _load_queries(self, queries: MatrixRing, i: Any) -> Any:
        def load(pair: Any) -> Any:
            place = address(self.queries, (i * self.pairs + pair) * 4)
            return queries.load_rows(place, self.memory, 0, pair, self.row + i * MMA_ROWS, self.lane)

        return loops.unrolled(self.pairs, load, "pair")

    def _tile_of_keys(self, step: Any) -> Any:
        stage, first = step % self.tile.stages, step * self.tile.keys + self.part * self.tile.warp_keys
        return loops.sequence(
            self._fetch(step + (self.tile.stages - 1)),
            self._dots(stage),
            self._scaled(first) if not self.raw else None,
            self._left_out(step, first) if self.shape.keys % self.tile.keys else None,
            self.softmax.take_shares(),
            self._add_values(stage),
            self._arrived(),
        )

    def _multiply(self, sums: Any, wide: int, j: Any, left: Callable[[Any], Any]) -> Any:
        """Add to fragments 2 * j and 2 * j + 1 of `wide` the products of `left(i)` and the two operands in `right`."""

        def product(i: Any, which: Any) -> Any:
            place = address(sums, (i * wide + j * 2 + which) * 4)
            return call(tensor_cores.MMA[self.dtype], place, left(i), address(self.right, which * 2))

        return loops.unrolled(
            self.tile.fragments, lambda i: loops.unrolled(2, lambda which: product(i, which), "which"), "i"
        )

    def _load_right(self, lines: MatrixRing, stage: Any, pair: Any, column: Any) -> Any:
        return lines.load_columns(address(self.right, 0), self.memory, stage, pair, column, self.lane)

    # q k'

    def _dots(self, stage: Any) -> Any:
        first, scores = self.part * self.tile.warp_keys, self.softmax.scores

        def left(pair: Any) -> Callable[[Any], Any]:
            return lambda i: address(self.queries, (i * self.pairs + pair) * 4)

        def two(pair: Any, j: Any) -> Any:
            return loops.sequence(
                self._load_right(self.keys, stage, pair, first + j * PAIR),
                self._multiply(scores, self.columns, j, left(pair)),
            )

        return loops.sequence(
            self.softmax.each_score(lambda at, row, column: loops.store(scores, tirx.const(0.0, "float32"), at)),
            loops.unrolled(
                self.pairs, lambda pair: loops.unrolled(self.columns // 2, lambda j: two(pair, j), "j"), "pair"
            ),
        )

    def _scaled(self, first: Any) -> Any:
        """Scale the scores of a warp's keys, and add the mask."""
        scores = self.softmax.scores

        def one(at: Any, row: Any, column: Any) -> Any:
            value = loops.load(scores, at) * tirx.const(self.op.scale, "float32")
            if self.shape.is_masked:
                index = (self.batch, self.head, self.first + self.row + row, first + column)
                value = value + mask_at(self.operands[3], self.shape, index)
            return loops.store(scores, value, at)

        return self.softmax.each_score(one)

    def _left_out(self, step: Any, first: Any) -> Any:
        """Leave out of the last tile what are no keys."""
        lowest, scores = tirx.const(float("-inf"), "float32"), self.softmax.scores

        def one(at: Any, _: Any, column: Any) -> Any:
            kept = tirx.Select(first + column < self.shape.keys, loops.load(scores, at), lowest)
            return loops.store(scores, kept, at)

        return loops.when(step == self.steps - 1, self.softmax.each_score(one))

    # shares v

    def _add_values(self, stage: Any) -> Any:
        first, shares, sums = self.part * (self.tile.warp_keys // PAIR), self.softmax.scores, self.softmax.sums

        def rounded(pair: Any, i: Any, register: Any) -> Any:
            # Two fragments of sums side by side are one first operand, register by register.
            at = (i * self.columns + pair * 2) * 4 + register * 2
            both = (loops.load(shares, at), loops.load(shares, at + 1))
            packed = tirx.call_pure_extern("uint32", tensor_cores.PACK[self.dtype], *both)
            return loops.store(self.left, packed, i * 4 + register)

        def two(pair: Any, j: Any) -> Any:
            return loops.sequence(
                self._load_right(self.values, stage, first + pair, j * PAIR),
                self._multiply(sums, self.wide, j, lambda i: address(self.left, i * 4)),
            )

        def step(pair: Any) -> Any:
            return loops.sequence(
                loops.unrolled(
                    self.tile.fragments,
                    lambda i: loops.unrolled(4, lambda register: rounded(pair, i, register), "register"),
                    "i",
                ),
                loops.unrolled(self.wide // 2, lambda j: two(pair, j), "j"),
            )

        return loops.unrolled(self.columns // 2, step, "pair")

    def _finish(self) -> Any:
        """Divide by the total, and store what the epilogue makes of it."""

        def store(row: Any, column: Any, pair: Callable[[Any], Any]) -> Any:
            query = self.first + row

            def one(which: Any) -> Any:
                index = (self.batch, query, self.head * self.op.value_size + column + which)
                return loops.store(self.y, self.body.value(pair(which), index), *index)

            there = tirx.all(query < self.shape.queries, column < self.op.value_size)
            return loops.when(there, loops.vectorized(2, one))

        shape = (self.tile.fragments, MMA_ROWS, self.wide)
        stored = store_fragments(self.softmax.sums, shape, (self.row, loops.const(0)), self.lane, store)
        return loops.sequence(self.softmax.divide(), stored)
