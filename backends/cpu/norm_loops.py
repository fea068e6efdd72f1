"""The loop nest of layer and channel norm (see norm.py for the method)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from cnnc.backends.cpu.norm import NormShape
from cnnc.backends.cpu.reduce_lanes import lane_sum
from cnnc.backends.cpu.row_index import at_most
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import BoundBody

__all__ = ["NormLoops"]


class NormLoops:
    """Writes the loop nest of one norm."""

    def __init__(self, shape: NormShape, body: BoundBody) -> None:
        self.shape = shape
        self.body = body
        self.x, self.gamma, *beta = body.operands
        self.beta = beta[0] if beta else None
        self.y = body.output()
        self.lanes = shape.lanes
        self.rest = shape.length % shape.lanes
        self.done = shape.length - self.rest

    def groups(self, first: Any, count: int, side: int) -> Any:
        """Compute groups [first, first + count), `side` at a time, as far as there are any."""
        total = self.shape.groups
        whole = at_most(count, total, first) // side
        statements = [loops.loop(whole, lambda turn: self._side(first + turn * side, side), "turn")]
        if total % side:
            last = total // side * side
            inside = tirx.all(tirx.LE(first, last), tirx.LT(loops.const(last), first + count))
            statements.append(loops.when(inside, self._side(loops.const(last), total % side)))
        return loops.sequence(*statements)

    def _side(self, first: Any, side: int) -> Any:
        """Compute `side` groups."""
        sums = loops.buffer("sums", (side, self.lanes), scope="local")
        means, scales = (loops.buffer(name, (side,), scope="local") for name in ("means", "scales"))
        count = tirx.const(float(self.shape.length), "float32")

        def each(statement: Callable[[Any], Any]) -> Any:
            return loops.unrolled(side, statement, "group")

        def total(g: Any) -> Any:
            return lane_sum(loops.load(sums, g, 0, lanes=self.lanes), self.lanes)

        def vector_mean(g: Any) -> Any:
            mean = loops.load(means, g)
            return tirx.Broadcast(mean, self.lanes)

        def add(g: Any, v: Any) -> Any:
            return self._load(first + g, v * self.lanes, self.lanes)

        def add_square(g: Any, v: Any) -> Any:
            distance = self._load(first + g, v * self.lanes, self.lanes) - vector_mean(g)
            return distance * distance

        def rest_of(g: Any, term: Callable[[Any], Any]) -> Any:
            """Add up the terms of the numbers that fill no vector."""
            value = total(g)
            for i in range(self.rest):
                value = value + term(self._load(first + g, self.done + i, 1))
            return value

        def square(g: Any) -> Callable[[Any], Any]:
            return lambda number: (number - loops.load(means, g)) * (number - loops.load(means, g))

        def scale(g: Any) -> Any:
            variance = rest_of(g, square(g)) / count
            root = tirx.sqrt(variance + tirx.const(self.shape.epsilon, "float32"))
            return loops.store(scales, tirx.const(1.0, "float32") / root, g)

        return loops.sequence(
            loops.alloc(sums),
            loops.alloc(means),
            loops.alloc(scales),
            self._sum(sums, each, add),
            each(lambda g: loops.store(means, rest_of(g, lambda number: number) / count, g)),
            self._sum(sums, each, add_square),
            each(scale),
            self._results(first, each, means, scales),
        )

    def _load(self, group: Any, index: Any, lanes: int) -> Any:
        return loops.load(self.x, *self.shape.place(group, index), lanes=lanes)

    def _sum(self, sums: Any, each: Callable[..., Any], term: Callable[[Any, Any], Any]) -> Any:
        """Add up vectors of terms of each group."""
        zero = tirx.Broadcast(tirx.const(0.0, "float32"), self.lanes)

        def add(g: Any, v: Any) -> Any:
            return loops.store(sums, loops.load(sums, g, 0, lanes=self.lanes) + term(g, v), g, 0, lanes=self.lanes)

        return loops.sequence(
            each(lambda g: loops.store(sums, zero, g, 0, lanes=self.lanes)),
            loops.loop(self.shape.vectors, lambda v: each(lambda g: add(g, v)), "v") if self.shape.vectors else None,
        )

    def _results(self, first: Any, each: Callable[..., Any], means: Any, scales: Any) -> Any:
        """Store the results, and zeros in pad lanes."""
        shape, lanes = self.shape, self.lanes

        def store(g: Any, index: Any) -> Any:
            value = (self._load(first + g, index, 1) - loops.load(means, g)) * loops.load(scales, g)
            value = value * tirx.BufferLoad(self.gamma, [index])
            if self.beta is not None:
                value = value + tirx.BufferLoad(self.beta, [index])
            at = shape.place(first + g, index)
            return loops.store(self.y, self.body.value(value, at), *at)

        def vector(g: Any, v: Any) -> Any:
            return loops.vectorized(lanes, lambda lane: store(g, v * lanes + lane))

        def last(g: Any) -> Any:
            numbers = loops.loop(self.rest, lambda i: store(g, self.done + i), "rest")
            if not shape.blocked:
                return numbers
            zero = tirx.const(0.0, self.y.dtype)
            pads = loops.loop(
                lanes - self.rest,
                lambda i: loops.store(self.y, zero, *shape.place(first + g, shape.length + i)),
                "pad",
            )
            return loops.sequence(numbers, pads)

        return loops.sequence(
            loops.loop(shape.vectors, lambda v: each(lambda g: vector(g, v)), "v") if shape.vectors else None,
            each(last) if self.rest else None,
        )
