"""The loops of `rows`: see there for the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.bodies import body_after
from cnnc.backends.cuda.codegen import RESIDENT_BLOCKS
from cnnc.backends.cuda.exponential import exp_of_difference
from cnnc.backends.cuda.launches import barrier, launch, position, reduce_lanes
from cnnc.backends.cuda.machine import LANES
from cnnc.backends.cuda.rows import RowKernel, RowParams
from cnnc.backends.cuda.vectors import copy_vector
from cnnc.backends.lower import loops, vector_math
from cnnc.ops.fused import Fused
from cnnc.ops.norm import LayerNorm, RmsNorm
from cnnc.ops.softmax import LogSoftmax


def rows_func(kernel: Fused, found: RowKernel, tile: RowParams, resident: int) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output, for so many blocks at once."""
    return _Rows(kernel, found, tile).function().with_attr(RESIDENT_BLOCKS, resident)


_MOST_SUMS = 2
"""Sums and maxima of a row."""


class _Rows:
    """Writes the loops of one kernel."""

    def __init__(self, kernel: Fused, found: RowKernel, tile: RowParams) -> None:
        self.op, self.shape, self.tile = found.node.op, found.shape, tile
        self.body = body_after(kernel, found.node).bind(found.node.types[0].physical_shape)
        buffers = dict(zip(kernel.body.inputs, self.body.inputs, strict=True))
        self.x, *self.vectors = (buffers[value] for value in found.stored)
        self.y = self.body.output()
        lanes, warps = self.shape.lanes, tile.threads // LANES
        self.turns = self.shape.turns(tile)
        self.read = loops.buffer("read", (self.turns, lanes), str(self.x.dtype), "local")
        self.numbers = loops.buffer("numbers", (self.turns, lanes), scope="local")
        self.of_row = [loops.buffer(f"of_row{i}", (1,), scope="local") for i in range(_MOST_SUMS)]
        self.parts = loops.buffer("parts", (warps,), scope="shared")
        self.operands = [
            loops.buffer(f"operand{i}", (lanes,), str(v.dtype), "local") for i, v in enumerate(self.vectors)
        ]
        self.made = loops.buffer("made", (lanes,), str(self.y.dtype), "local")

    def function(self) -> Any:
        """Make the PrimFunc."""
        blocks = -(-self.shape.rows // self.tile.rows)
        statement = launch((blocks,), self.tile.threads * self.tile.rows, self._block)
        return loops.function([*self.body.inputs, self.y], statement)

    def _block(self, thread: Any, block: Any) -> Any:
        row = block * self.tile.rows + thread // self.tile.threads
        self.thread = thread % self.tile.threads
        # A warp beyond the last row computes the last one again, and stores nothing.
        self.row = tirx.min(row, loops.const(self.shape.rows - 1)) if self.shape.rows % self.tile.rows else row
        self.stores = row < self.shape.rows if self.shape.rows % self.tile.rows else True
        shared = [self.parts] if self.tile.threads > LANES else []
        return loops.sequence(
            *(loops.alloc(b) for b in (self.read, self.numbers, *self.of_row, *shared, *self.operands, self.made)),
            self._each_vector(lambda u: copy_vector(self.read, (u, 0), self.x, self._place(u), self.shape.lanes)),
            self._each_number(lambda u, lane: loops.store(self.numbers, loops.widened(self.read, u, lane), u, lane)),
            self._compute(),
        )

    def _vector(self, u: Any) -> Any:
        return u * self.tile.threads + self.thread

    def _column(self, u: Any) -> list[Any]:
        return position(self.shape.inner, self._vector(u) * self.shape.lanes)

    def _place(self, u: Any) -> tuple[Any, ...]:
        return (*position(self.shape.leading, self.row), *self._column(u))

    def _each_vector(self, statement: Callable[[Any], Any]) -> Any:
        """Run over a thread's vectors, of which the last one may be none."""
        vectors = self.shape.length // self.shape.lanes
        whole = self.turns if vectors % self.tile.threads == 0 else self.turns - 1
        last = loops.when(self._vector(whole) < vectors, statement(loops.const(whole))) if whole < self.turns else None
        return loops.sequence(loops.unrolled(whole, statement, "u") if whole else None, last)

    def _each_number(self, statement: Callable[[Any, Any], Any]) -> Any:
        return self._each_vector(lambda u: loops.unrolled(self.shape.lanes, lambda lane: statement(u, lane), "lane"))

    def _number(self, u: Any, lane: Any) -> Any:
        return loops.load(self.numbers, u, lane)

    def _replace(self, value: Callable[[Any], Any]) -> Any:
        """Put in the place of every number what becomes of it."""
        return self._each_number(lambda u, lane: loops.store(self.numbers, value(self._number(u, lane)), u, lane))

    def _reduce(self, which: int, start: float, term: Callable[[Any], Any], join: Callable[[Any, Any], Any]) -> Any:
        """Reduce what becomes of a row's numbers, for all of its threads the same."""
        total, warps = self.of_row[which], self.tile.threads // LANES
        known = loops.load(total, 0)
        own = loops.sequence(
            loops.store(total, tirx.const(start, "float32"), 0),
            self._each_number(lambda u, lane: loops.store(total, join(known, term(self._number(u, lane))), 0)),
            reduce_lanes(total, 0, join),
        )
        if warps == 1:
            return own

        def part(warp: Any) -> Any:
            return loops.load(self.parts, warp)

        return loops.sequence(
            own,
            # What the warps handed each other before is read.
            barrier() if which > 0 else None,
            loops.when(self.thread % LANES < 1, loops.store(self.parts, known, self.thread // LANES)),
            barrier(),
            loops.store(total, part(0), 0),
            loops.unrolled(warps - 1, lambda warp: loops.store(total, join(known, part(warp)), 0), "warp", start=1),
        )

    def _compute(self) -> Any:
        if isinstance(self.op, LayerNorm | RmsNorm):
            return self._norm(self.op)
        return self._softmax()

    def _softmax(self) -> Any:
        largest, total = (loops.load(buffer, 0) for buffer in self.of_row)
        highest = self._reduce(0, float("-inf"), lambda x: x, tirx.max)
        shifted = self._replace(lambda x: x - largest)
        if isinstance(self.op, LogSoftmax):
            return loops.sequence(
                highest,
                shifted,
                self._reduce(1, 0.0, exp_of_difference, lambda a, b: a + b),
                loops.store(self.of_row[1], vector_math.call("log", total), 0),
                self._store(lambda x, _: x - total),
            )
        return loops.sequence(
            highest,
            shifted,
            self._replace(exp_of_difference),
            self._reduce(1, 0.0, lambda x: x, lambda a, b: a + b),
            self._store(lambda x, _: x / total),
        )

    def _norm(self, op: LayerNorm | RmsNorm) -> Any:
        mean, deviation = (loops.load(buffer, 0) for buffer in self.of_row)
        count, epsilon = tirx.const(float(self.shape.length), "float32"), tirx.const(op.epsilon, "float32")

        def scaled(x: Any, lane: Any) -> Any:
            y = x / deviation * loops.widened(self.operands[0], lane)
            return y + loops.widened(self.operands[1], lane) if len(self.operands) > 1 else y

        centred = loops.sequence(
            self._reduce(0, 0.0, lambda x: x, lambda a, b: a + b),
            loops.store(self.of_row[0], mean / count, 0),
            self._replace(lambda x: x - mean),
        )
        return loops.sequence(
            centred if isinstance(op, LayerNorm) else None,
            self._reduce(1, 0.0, lambda x: x * x, lambda a, b: a + b),
            loops.store(self.of_row[1], tirx.sqrt(deviation / count + epsilon), 0),
            self._store(scaled),
        )

    def _store(self, value: Callable[[Any, Any], Any]) -> Any:
        """Store what the epilogue makes of the result, which may depend on gamma and beta."""
        lanes = self.shape.lanes

        def one(u: Any) -> Any:
            place = self._place(u)
            *front, last = place

            def make(lane: Any) -> Any:
                made = loops.store(self.numbers, value(self._number(u, lane), lane), u, lane)
                index = (*front, last + lane)
                return loops.sequence(made, loops.store(self.made, self.body.value(self._number(u, lane), index), lane))

            return loops.sequence(
                *(
                    copy_vector(operand, (0,), vector, self._column(u), lanes)
                    for operand, vector in zip(self.operands, self.vectors, strict=True)
                ),
                loops.unrolled(lanes, make, "lane"),
                copy_vector(self.y, place, self.made, (0,), lanes),
            )

        return loops.when(self.stores, self._each_vector(one))
