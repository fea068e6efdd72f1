"""The loop nest of attention (see attention.py for the method)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from cnnc.backends.cpu.attention import AttentionParams, AttentionShape
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.register_tile import (
    RegisterTile,
    best_tile,
    register_tile,
    store_sums,
    vector_starts,
    vector_width,
)
from cnnc.backends.cpu.segments import even_split
from cnnc.backends.cpu.transpose_block import transpose_block
from cnnc.backends.lower import loops, vector_math
from cnnc.backends.lower.body import Body

__all__ = ["AttentionLoops"]

CHAINS = 4
"""Independent maxima over the keys, to hide the latency of each."""


class AttentionLoops:
    """Writes the loop nest of one attention."""

    def __init__(self, shape: AttentionShape, params: AttentionParams, machine: Machine, body: Body) -> None:
        self.shape = shape
        self.params = params
        self.machine = machine
        self.lanes = shape.lanes
        self.width = params.vectors * shape.lanes
        self.body = body.bind((shape.batch, shape.queries, shape.op.heads * shape.op.value_size))
        self.q, self.k, self.v, *mask = self.body.operands
        self.mask = mask[0] if mask else None
        self.y = self.body.output()
        self.queries = loops.buffer("queries", (shape.op.size, self.width))
        self.scores = loops.buffer("scores", (shape.keys, self.width))
        self.largest = loops.buffer("largest", (CHAINS, params.vectors, self.lanes), scope="local")
        self.total = loops.buffer("total", (params.vectors, self.lanes), scope="local")

    def function(self) -> Any:
        """Make the PrimFunc."""
        blocks, heads = -(-self.shape.queries // self.width), self.shape.op.heads

        def one_slice(index: Any) -> Any:
            batch, head = index // (heads * blocks), index // blocks % heads
            return self._slice(batch, head, index % blocks * self.width)

        return loops.function([*self.body.inputs, self.y], loops.parallel(self.shape.batch * heads * blocks, one_slice))

    def _slice(self, batch: Any, head: Any, first: Any) -> Any:
        return loops.sequence(
            *(loops.alloc(buffer) for buffer in (self.queries, self.scores, self.largest, self.total)),
            self._take_queries(batch, head, first),
            self._all_keys(lambda key, rows: self._score(batch, head, first, key, rows)),
            self._find_largest(),
            self._take_shares(),
            self._all_values(batch, head, first),
        )

    def _feature(self, which: int, head: Any, feature: Any) -> Any:
        """Give where feature number `feature` of a head lies in q (0), k (1) or v (2)."""
        op = self.shape.op
        return op.starts[which] + head * op.steps[which] + feature

    def _query(self, first: Any, number: Any) -> Any:
        """Give a query of the block; what stands beyond the last one is the last one again, and never stored."""
        if self.shape.queries % self.width == 0:
            return first + number
        return tirx.min(first + number, loops.const(self.shape.queries - 1))

    # scale * q', the queries side by side

    def _take_queries(self, batch: Any, head: Any, first: Any) -> Any:
        size, lanes = self.shape.op.size, self.lanes
        whole = size // lanes

        def block(v: Any, d: Any) -> Any:
            def load(row: int) -> Any:
                at = (batch, self._query(first, v * lanes + row), self._feature(0, head, d * lanes))
                return loops.load(self.q, *at, lanes=lanes) * tirx.Broadcast(self._scale(), lanes)

            def store(column: int, vector: Any) -> Any:
                return loops.store(self.queries, vector, d * lanes + column, v * lanes, lanes=lanes)

            return transpose_block(lanes, load, store)

        def single(d: Any, number: Any) -> Any:
            value = loops.load(self.q, batch, self._query(first, number), self._feature(0, head, d))
            return loops.store(self.queries, value * self._scale(), d, number)

        def rest(d: Any) -> Any:
            return loops.loop(self.width, lambda number: single(whole * lanes + d, number), "query")

        return loops.sequence(
            loops.loop(self.params.vectors, lambda v: loops.loop(whole, lambda d: block(v, d), "d"), "v")
            if whole
            else None,
            loops.loop(size % lanes, rest, "d") if size % lanes else None,
        )

    def _scale(self) -> Any:
        return tirx.const(self.shape.op.scale, "float32")

    # k (scale * q)' + mask

    def _all_keys(self, tile: Callable[[Any, int], Any]) -> Any:
        statements, start = [], 0
        for rows, count in even_split(self.shape.keys, self.params.keys):
            statements.append(_tiles(tile, start, rows, count))
            start += rows * count
        return loops.sequence(*statements)

    def _score(self, batch: Any, head: Any, first: Any, key: Any, rows: int) -> Any:
        lanes = self.lanes

        def finish(total: Any) -> Any:
            def score(r: Any, v: Any, lane: Any) -> Any:
                return total(r, v, lane) + self._masked(batch, head, self._query(first, v * lanes + lane), key + r)

            return store_sums(
                size,
                lanes,
                score,
                lambda r, v, lane, value: loops.store(self.scores, value, key + r, v * lanes + lane),
            )

        size = RegisterTile(rows, self.params.vectors, lanes, self.shape.op.size)
        return register_tile(
            size,
            lambda r, d: loops.load(self.k, batch, key + r, self._feature(1, head, d)),
            lambda d, v: loops.load(self.queries, d, v * lanes, lanes=lanes),
            finish,
        )

    def _masked(self, *at: Any) -> Any:
        """Give what the mask adds to a score."""
        if self.mask is None:
            return tirx.const(0.0, "float32")
        shape = self.shape.mask or ()
        own = zip(shape, at[4 - len(shape) :], strict=True)
        return tirx.BufferLoad(self.mask, [loops.const(0 if size == 1 else index) for size, index in own])

    # softmax over the keys

    def _each_vector(self, statement: Callable[[Any], Any]) -> Any:
        return loops.unrolled(self.params.vectors, statement, "v")

    def _score_vector(self, key: Any, v: Any) -> Any:
        return loops.load(self.scores, key, v * self.lanes, lanes=self.lanes)

    def _find_largest(self) -> Any:
        """Write the largest score of each query to the first of the chains."""
        lanes, keys = self.lanes, self.shape.keys
        chains = min(CHAINS, keys)
        lowest = tirx.Broadcast(tirx.const(float("-inf"), "float32"), lanes)

        def clear(chain: Any) -> Any:
            return self._each_vector(lambda v: loops.store(self.largest, lowest, chain, v, 0, lanes=lanes))

        def compare(chain: Any, key: Any) -> Any:
            def one(v: Any) -> Any:
                known = loops.load(self.largest, chain, v, 0, lanes=lanes)
                return loops.store(self.largest, tirx.max(self._score_vector(key, v), known), chain, v, 0, lanes=lanes)

            return self._each_vector(one)

        def merge(chain: int) -> Any:
            def one(v: Any) -> Any:
                parts = [loops.load(self.largest, c, v, 0, lanes=lanes) for c in (0, chain)]
                return loops.store(self.largest, tirx.max(*parts), 0, v, 0, lanes=lanes)

            return self._each_vector(one)

        done = keys // chains * chains
        return loops.sequence(
            loops.unrolled(chains, clear, "chain"),
            loops.loop(
                keys // chains,
                lambda turn: loops.unrolled(chains, lambda c: compare(c, turn * chains + c), "chain"),
                "turn",
            ),
            loops.unrolled(keys - done, lambda c: compare(c, done + c), "rest") if done < keys else None,
            *(merge(chain) for chain in range(1, chains)),
        )

    def _take_shares(self) -> Any:
        """Turn scores into shares."""
        lanes, keys = self.lanes, self.shape.keys
        zero = tirx.Broadcast(tirx.const(0.0, "float32"), lanes)
        one = tirx.Broadcast(tirx.const(1.0, "float32"), lanes)

        def total(v: Any) -> Any:
            return loops.load(self.total, v, 0, lanes=lanes)

        def power(key: Any, v: Any) -> Any:
            shifted = self._score_vector(key, v) - loops.load(self.largest, 0, v, 0, lanes=lanes)
            value = vector_math.exp_nonpositive(shifted)
            return loops.sequence(
                loops.store(self.scores, value, key, v * lanes, lanes=lanes),
                loops.store(self.total, total(v) + self._score_vector(key, v), v, 0, lanes=lanes),
            )

        def share(key: Any, v: Any) -> Any:
            return loops.store(self.scores, self._score_vector(key, v) * total(v), key, v * lanes, lanes=lanes)

        return loops.sequence(
            self._each_vector(lambda v: loops.store(self.total, zero, v, 0, lanes=lanes)),
            loops.loop(keys, lambda key: self._each_vector(lambda v: power(key, v)), "key"),
            self._each_vector(lambda v: loops.store(self.total, one / total(v), v, 0, lanes=lanes)),
            loops.loop(keys, lambda key: self._each_vector(lambda v: share(key, v)), "key"),
        )

    # shares' v

    def _all_values(self, batch: Any, head: Any, first: Any) -> Any:
        """Run over tiles of queries and vectors of features."""
        size = self.shape.op.value_size
        lanes = vector_width(size, self.lanes)
        most_rows, most_vectors = best_tile(self.machine, self.width, -(-size // lanes))

        def tiles(vector: Any, vectors: int) -> Any:
            statements, start = [], 0
            for rows, count in even_split(self.width, most_rows):
                statements.append(_tiles(one(vector, vectors), start, rows, count))
                start += rows * count
            return loops.sequence(*statements)

        def one(vector: Any, vectors: int) -> Callable[[Any, int], Any]:
            def tile(row: Any, rows: int) -> Any:
                inside = first + row < self.shape.queries if self.shape.queries % self.width else True
                return loops.when(inside, self._mean(batch, head, first, (row, vector), (rows, vectors, lanes)))

            return tile

        statements, start = [], 0
        for vectors, count in even_split(-(-size // lanes), most_vectors):
            statements.append(_tiles(tiles, start, vectors, count))
            start += vectors * count
        return loops.sequence(*statements)

    def _mean(self, batch: Any, head: Any, first: Any, at: tuple[Any, Any], tile: tuple[int, int, int]) -> Any:
        """Compute a tile of the result and store what is inside of it."""
        (row, vector), (rows, vectors, lanes) = at, tile
        size = self.shape.op.value_size

        def finish(total: Any) -> Any:
            def store(r: Any, v: Any, i: Any) -> Any:
                feature = head * size + vector_starts(vector + v, size, lanes) + i
                place = (batch, first + row + r, feature)
                return loops.store(self.y, self.body.value(total(r, v, i), place), *place)

            def store_row(r: Any) -> Any:
                inside = first + row + r < self.shape.queries if self.shape.queries % self.width else True
                every = loops.unrolled(vectors, lambda v: loops.vectorized(lanes, lambda i: store(r, v, i)), "v")
                return loops.when(inside, every)

            return loops.unrolled(rows, store_row, "r")

        def value(key: Any, v: Any) -> Any:
            feature = self._feature(2, head, vector_starts(vector + v, size, lanes))
            return loops.load(self.v, batch, key, feature, lanes=lanes)

        return register_tile(
            RegisterTile(rows, vectors, lanes, self.shape.keys),
            lambda r, key: loops.load(self.scores, key, row + r),
            value,
            finish,
        )


def _tiles(tile: Callable[[Any, int], Any], start: int, rows: int, count: int) -> Any:
    """Run `count` tiles of `rows` from `start` on."""
    return loops.loop(count, lambda number: tile(start + number * rows, rows), "tile")
