"""The loops of `attention`: see there for the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.attention import COLUMNS, VECTOR, AttentionParams, AttentionShape, StoredAttention
from cnnc.backends.cuda.bodies import body_after
from cnnc.backends.cuda.codegen import RESIDENT_BLOCKS
from cnnc.backends.cuda.exponential import exp_of_difference
from cnnc.backends.cuda.launches import barrier, launch, reduce_lanes
from cnnc.backends.cuda.online_softmax import LEAST
from cnnc.backends.cuda.operands import vector_of
from cnnc.backends.cuda.vectors import copy_vector
from cnnc.backends.lower import loops
from cnnc.ops.fused import Fused

MOST_LOADS = 8
"""Vectors that a thread has on their way to shared memory at once."""


def attention_func(kernel: Fused, found: StoredAttention, tile: AttentionParams, resident: int) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output, for so many blocks at once."""
    return _Attention(kernel, found, tile).function().with_attr(RESIDENT_BLOCKS, resident)


def mask_at(mask: Any, shape: AttentionShape, index: tuple[Any, Any, Any, Any]) -> Any:
    """Give what a mask adds to the score (batch, head, query, key); beyond the last query or key, to the last one's."""
    batch, head, query, key = index
    query, key = tirx.min(query, loops.const(shape.queries - 1)), tirx.min(key, loops.const(shape.keys - 1))
    own = zip(mask.shape, (batch, head, query, key)[4 - len(mask.shape) :], strict=True)
    return loops.widened(mask, *(0 if int(size) == 1 else at for size, at in own))


class _Attention:
    """Writes the loops of one attention."""

    def __init__(self, kernel: Fused, found: StoredAttention, tile: AttentionParams) -> None:
        self.op, self.shape, self.tile = found.op, found.shape, tile
        self.stored = found.stored
        self.body = body_after(kernel, found.node).bind(found.node.types[0].physical_shape)
        buffers = dict(zip(kernel.body.inputs, self.body.inputs, strict=True))
        self.operands = [buffers[value] for value in found.stored]
        self.y = self.body.output()
        shape, rows, keys = self.shape, tile.rows, tile.keys
        self.keys_at = tile.block_rows * shape.pitch
        self.values_at = self.keys_at + tile.block_keys * shape.pitch
        self.result = shape.value_vector * shape.value_vectors
        self.memory = loops.buffer("shared", (shape.operand_floats(tile),), scope="shared.dyn")
        # Apart, so that TVM sees that writing shares needs no barrier.
        self.shares = loops.buffer("shares", shape.shares(tile), scope="shared")
        self.scores = loops.buffer("scores", (rows, keys), scope="local")
        self.largest = loops.buffer("largest", (rows,), scope="local")
        self.total = loops.buffer("total", (rows,), scope="local")
        self.sums = loops.buffer("sums", (rows, self.result), scope="local")
        self.factor = loops.buffer("factor", (2,), scope="local")
        self.left = loops.buffer("left", (rows, VECTOR), scope="local")
        self.right = loops.buffer("right", (max(keys * VECTOR, self.result),), scope="local")

    def function(self) -> Any:
        """Make the PrimFunc."""
        statement = launch((self.shape.blocks(self.tile),), self.tile.threads, self._block)
        return loops.function([*self.body.inputs, self.y], statement)

    def _block(self, thread: Any, block: Any) -> Any:
        blocks, heads = -(-self.shape.queries // self.tile.block_rows), self.op.heads
        self.thread, self.column, self.row = thread, thread % COLUMNS, thread // COLUMNS
        self.batch, self.head = block // (blocks * heads), block // blocks % heads
        self.first = block % blocks * self.tile.block_rows
        registers = (self.scores, self.largest, self.total, self.sums, self.factor, self.left, self.right)
        zero, lowest = tirx.const(0.0, "float32"), tirx.const(float("-inf"), "float32")

        def start(i: Any) -> Any:
            return loops.sequence(
                loops.store(self.largest, lowest, i),
                loops.store(self.total, zero, i),
                loops.unrolled(self.result, lambda e: loops.store(self.sums, zero, i, e)),
            )

        tiles = -(-self.shape.keys // self.tile.block_keys)
        return loops.sequence(
            *(loops.alloc(buffer) for buffer in (self.memory, self.shares, *registers)),
            self._fill(0, 0, self.first, self.shape.queries, self.tile.block_rows),
            loops.unrolled(self.tile.rows, start),
            loops.loop(tiles, lambda number: self._keys(number * self.tile.block_keys), "tile"),
            loops.unrolled(self.tile.rows, self._finish, "r"),
        )

    def _keys(self, key: Any) -> Any:
        """Go on by a tile of keys."""
        rows = self.tile.rows
        return loops.sequence(
            barrier(),
            self._fill(1, self.keys_at, key, self.shape.keys, self.tile.block_keys),
            self._fill(2, self.values_at, key, self.shape.keys, self.tile.block_keys),
            barrier(),
            self._dots(),
            loops.unrolled(rows, lambda i: self._take_shares(i, key), "r"),
            barrier(),
            self._add_values(),
        )

    def _query(self, i: Any) -> Any:
        """Give the number in the block of a thread's query."""
        return i * self.tile.high + self.row

    # Operands into shared memory, zeros in the place of what is not there

    def _fill(self, which: int, start: int, first: Any, extent: int, rows: int) -> Any:
        source, dtype = self.operands[which], self.stored[which].dtype
        op, size = self.op, self.op.value_size if which == 2 else self.op.size
        width, pitch = (self.shape.values,) * 2 if which == 2 else (self.shape.features, self.shape.pitch)
        features = self.stored[which].type.static_shape[2]
        lanes = vector_of(size, dtype, op.starts[which], op.steps[which] if op.heads > 1 else 0, features)
        vectors = width // lanes
        turns = -(-rows * vectors // self.tile.threads)
        batch = min(turns, MOST_LOADS)
        numbers = loops.buffer("numbers", (batch, lanes), str(source.dtype), "local")

        def place_of(turn: Any) -> tuple[Any, Any, Any]:
            number = turn * self.tile.threads + self.thread
            return number, number // vectors, number % vectors * lanes

        def read(turn: Any, u: Any) -> Any:
            # What is not there is read from the last row, or the last features, and left out below: no load waits.
            _, row, feature = place_of(turn)
            token = tirx.min(first + row, loops.const(extent - 1))
            feature = feature if width == size else tirx.min(feature, loops.const(size - lanes))
            at = (self.batch, token, op.starts[which] + self.head * op.steps[which] + feature)
            return copy_vector(numbers, (u, 0), source, at, lanes)

        def write(turn: Any, u: Any) -> Any:
            number, row, feature = place_of(turn)
            there = tirx.all(first + row < extent, feature < size)

            def put(lane: Any) -> Any:
                value = tirx.Select(there, loops.widened(numbers, u, lane), tirx.const(0.0, "float32"))
                return loops.store(self.memory, value, start + row * pitch + feature + lane)

            stored = loops.unrolled(lanes, put, "lane")
            whole = rows * vectors % self.tile.threads == 0
            return stored if whole else loops.when(number < rows * vectors, stored)

        def some(turn: Any, count: int) -> Any:
            return loops.sequence(
                loops.unrolled(count, lambda u: read(turn + u, u), "u"),
                loops.unrolled(count, lambda u: write(turn + u, u), "u"),
            )

        done = turns // batch * batch
        return loops.sequence(
            loops.alloc(numbers),
            loops.loop(turns // batch, lambda n: some(n * batch, batch), "turn"),
            some(done, turns - done) if done < turns else None,
        )

    # q k'

    def _dots(self) -> Any:
        rows, keys, pitch = self.tile.rows, self.tile.keys, self.shape.pitch

        def read_query(i: Any, d: Any) -> Any:
            return copy_vector(self.left, (i, 0), self.memory, (self._query(i) * pitch + d * VECTOR,), VECTOR)

        def read_key(j: Any, d: Any) -> Any:
            place = self.keys_at + (j * COLUMNS + self.column) * pitch + d * VECTOR
            return copy_vector(self.right, (j * VECTOR,), self.memory, (place,), VECTOR)

        def add(i: Any, j: Any, lane: Any) -> Any:
            product = loops.load(self.left, i, lane) * loops.load(self.right, j * VECTOR + lane)
            return loops.store(self.scores, loops.load(self.scores, i, j) + product, i, j)

        def step(d: Any) -> Any:
            return loops.sequence(
                loops.unrolled(rows, lambda i: read_query(i, d), "i"),
                loops.unrolled(keys, lambda j: read_key(j, d), "j"),
                self._each_score(lambda i, j: loops.unrolled(VECTOR, lambda lane: add(i, j, lane))),
            )

        return loops.sequence(
            self._each_score(lambda i, j: loops.store(self.scores, tirx.const(0.0, "float32"), i, j)),
            loops.loop(self.shape.features // VECTOR, step, "d"),
        )

    def _each_score(self, statement: Callable[[Any, Any], Any]) -> Any:
        return loops.unrolled(
            self.tile.rows, lambda i: loops.unrolled(self.tile.keys, lambda j: statement(i, j), "j"), "i"
        )

    # Softmax, as far as it has come

    def _take_shares(self, i: Any, first: Any) -> Any:
        """Turn the scores of a query into shares, and scale what was added up before to the new maximum."""
        keys = self.tile.keys
        lowest = tirx.const(float("-inf"), "float32")

        def finish(j: Any) -> Any:
            key = first + j * COLUMNS + self.column
            value = loops.load(self.scores, i, j) * tirx.const(self.op.scale, "float32")
            value = value + self._mask(i, key) if len(self.operands) > 3 else value
            none = loops.when(key >= self.shape.keys, loops.store(self.scores, lowest, i, j))
            whole = self.shape.keys % self.tile.block_keys == 0
            return loops.sequence(loops.store(self.scores, value, i, j), None if whole else none)

        def compare(j: Any) -> Any:
            return loops.store(self.factor, tirx.max(loops.load(self.factor, 0), loops.load(self.scores, i, j)), 0)

        def share(j: Any) -> Any:
            number = loops.load(self.scores, i, j)
            return loops.sequence(
                loops.store(self.scores, number - loops.load(self.factor, 0), i, j),
                loops.store(self.scores, exp_of_difference(number), i, j),
                loops.store(self.total, loops.load(self.total, i) + number, i),
                loops.store(self.shares, number, self._query(i), j * COLUMNS + self.column),
            )

        new = loops.load(self.factor, 0)
        # Where all scores so far are -inf, their shares are 0, and no NaN.
        finite = tirx.max(tirx.const(LEAST, "float32"), new)
        before = loops.load(self.factor, 1)
        return loops.sequence(
            loops.unrolled(keys, finish, "j"),
            loops.store(self.factor, loops.load(self.largest, i), 0),
            loops.unrolled(keys, compare, "j"),
            reduce_lanes(self.factor, 0, tirx.max, COLUMNS),
            loops.store(self.factor, loops.load(self.largest, i) - finite, 1),
            loops.store(self.factor, exp_of_difference(before), 1),
            loops.store(self.largest, new, i),
            loops.store(self.factor, finite, 0),
            loops.store(self.total, loops.load(self.total, i) * before, i),
            loops.unrolled(
                self.result, lambda e: loops.store(self.sums, loops.load(self.sums, i, e) * before, i, e), "e"
            ),
            loops.unrolled(keys, share, "j"),
        )

    def _mask(self, i: Any, key: Any) -> Any:
        """Give what the mask adds to a score."""
        return mask_at(self.operands[3], self.shape, (self.batch, self.head, self.first + self._query(i), key))

    # shares v

    def _add_values(self) -> Any:
        rows, vector = self.tile.rows, self.shape.value_vector

        def read_share(i: Any, n: Any) -> Any:
            return copy_vector(self.left, (i, 0), self.shares, (self._query(i), n * VECTOR), VECTOR)

        def read_value(c: Any, key: Any) -> Any:
            place = self.values_at + key * self.shape.values + (c * COLUMNS + self.column) * vector
            return copy_vector(self.right, (c * vector,), self.memory, (place,), vector)

        def add(i: Any, e: Any, lane: Any) -> Any:
            product = loops.load(self.left, i, lane) * loops.load(self.right, e)
            return loops.store(self.sums, loops.load(self.sums, i, e) + product, i, e)

        def key(n: Any, lane: Any) -> Any:
            return loops.sequence(
                loops.unrolled(self.shape.value_vectors, lambda c: read_value(c, n * VECTOR + lane), "c"),
                loops.unrolled(rows, lambda i: loops.unrolled(self.result, lambda e: add(i, e, lane), "e"), "i"),
            )

        def step(n: Any) -> Any:
            return loops.sequence(
                loops.unrolled(rows, lambda i: read_share(i, n), "i"),
                loops.unrolled(VECTOR, lambda lane: key(n, lane), "lane"),
            )

        return loops.loop(self.tile.block_keys // VECTOR, step, "n")

    def _finish(self, i: Any) -> Any:
        """Divide by the total, and store what the epilogue makes of it."""
        vector, size = self.shape.value_vector, self.op.value_size
        query = self.first + self._query(i)

        def one(c: Any, lane: Any) -> Any:
            feature = (c * COLUMNS + self.column) * vector + lane
            index = (self.batch, query, self.head * size + feature)
            value = self.body.value(loops.load(self.sums, i, c * vector + lane), index)
            stored = loops.store(self.y, value, *index)
            return loops.when(feature < size, stored) if size % (COLUMNS * vector) else stored

        def divide(e: Any) -> Any:
            return loops.store(self.sums, loops.load(self.sums, i, e) / loops.load(self.total, i), i, e)

        return loops.sequence(
            reduce_lanes(self.total, i, lambda a, b: a + b, COLUMNS),
            loops.unrolled(self.result, divide, "e"),
            loops.when(
                query < self.shape.queries,
                loops.unrolled(
                    self.shape.value_vectors, lambda c: loops.unrolled(vector, lambda lane: one(c, lane), "lane"), "c"
                ),
            ),
        )
