"""Softmax over the last axis of plain tensors.

    y[i] = exp(x[i] - max) / sum over j of exp(x[j] - max)

Three times over a row, which then lies in the nearest cache: for the largest, for the exponentials and their sum, and
to divide.  What fills no vector is computed number by number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import anchor_of, body_after, machine_of
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.row_index import at_most, position
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.softmax import Softmax
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["SoftmaxParams", "SoftmaxShape", "SoftmaxTemplate", "build", "cost"]

CHAINS = 4
"""Independent maxima and sums of a row, to hide the latency of each."""


@dataclass(frozen=True)
class SoftmaxShape:
    """Rows of `length` numbers; `leading` are the axes before the last."""

    leading: tuple[int, ...]
    length: int
    lanes: int = 8

    @property
    def rows(self) -> int:
        """The number of rows."""
        return math.prod(self.leading)


@dataclass(frozen=True)
class SoftmaxParams:
    """A slice is `rows` rows."""

    rows: int


def cost(shape: SoftmaxShape, params: SoftmaxParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    vectors, rest = divmod(shape.length, shape.lanes)
    cycles = shape.rows * (14.0 * vectors + 20.0 * rest + 40.0)
    far = 8.0 * shape.rows * shape.length / machine.memory_bytes
    slices = -(-shape.rows // params.rows)
    waves = machine.turns(slices) / slices
    total = max(cycles, far) * waves + 60.0 * slices / machine.threads
    return total * machine.sharing(slices) / machine.hertz


def build(shape: SoftmaxShape, params: SoftmaxParams, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operand is x."""
    from tvm import tirx

    from cnnc.backends.cpu.reduce_lanes import lane_max, lane_sum
    from cnnc.backends.lower import loops
    from cnnc.backends.lower.vector_math import exp_nonpositive

    bound = body.bind((*shape.leading, shape.length))
    (x,), y = bound.operands, bound.output()
    lanes, (vectors, rest) = shape.lanes, divmod(shape.length, shape.lanes)
    chains = max(min(CHAINS, vectors), 1)

    def one_row(row: Any) -> Any:
        at = position(shape.leading, row)
        powers = loops.buffer("powers", (shape.length,))
        parts = loops.buffer("parts", (chains, lanes), scope="local")
        whole = loops.buffer("whole", (2,), scope="local")

        def part(chain: Any) -> Any:
            return loops.load(parts, chain, 0, lanes=lanes)

        def fold(start: float, turn: Callable[[Any, Any], Any], join: Callable[[Any, Any], Any]) -> list[Any]:
            """Reduce the vectors of the row in chains, then the chains to the first."""
            first = tirx.Broadcast(tirx.const(start, "float32"), lanes)
            done = vectors // chains * chains
            return [
                loops.unrolled(chains, lambda c: loops.store(parts, first, c, 0, lanes=lanes), "chain"),
                loops.loop(
                    vectors // chains, lambda t: loops.unrolled(chains, lambda c: turn(c, t * chains + c), "c"), "t"
                )
                if vectors
                else None,
                loops.unrolled(vectors - done, lambda c: turn(c, done + c), "c") if done < vectors else None,
                *(loops.store(parts, join(part(0), part(c)), 0, 0, lanes=lanes) for c in range(1, chains)),
            ]

        def compare(chain: Any, v: Any) -> Any:
            vector = loops.load(x, *at, v * lanes, lanes=lanes)
            return loops.store(parts, tirx.max(vector, part(chain)), chain, 0, lanes=lanes)

        def power(chain: Any, v: Any) -> Any:
            largest = tirx.Broadcast(loops.load(whole, 0), lanes)
            value = exp_nonpositive(loops.load(x, *at, v * lanes, lanes=lanes) - largest)
            made = loops.load(powers, v * lanes, lanes=lanes)
            return loops.sequence(
                loops.store(powers, value, v * lanes, lanes=lanes),
                loops.store(parts, part(chain) + made, chain, 0, lanes=lanes),
            )

        def compare_rest(i: Any) -> Any:
            number = loops.load(x, *at, vectors * lanes + i)
            return loops.store(whole, tirx.max(number, loops.load(whole, 0)), 0)

        def power_rest(i: Any) -> Any:
            value = exp_nonpositive(loops.load(x, *at, vectors * lanes + i) - loops.load(whole, 0))
            made = loops.load(powers, vectors * lanes + i)
            return loops.sequence(
                loops.store(powers, value, vectors * lanes + i),
                loops.store(whole, loops.load(whole, 1) + made, 1),
            )

        def share(index: Any) -> Any:
            value = bound.value(loops.load(powers, index) * loops.load(whole, 1), [*at, index])
            return loops.store(y, value, *at, index)

        return loops.sequence(
            *(loops.alloc(buffer) for buffer in (powers, parts, whole)),
            *fold(float("-inf"), compare, tirx.max),
            loops.store(whole, lane_max(part(0), lanes), 0),
            loops.loop(rest, compare_rest, "rest") if rest else None,
            *fold(0.0, power, lambda a, b: a + b),
            loops.store(whole, lane_sum(part(0), lanes), 1),
            loops.loop(rest, power_rest, "rest") if rest else None,
            loops.store(whole, tirx.const(1.0, "float32") / loops.load(whole, 1), 1),
            loops.loop(vectors, lambda v: loops.vectorized(lanes, lambda i: share(v * lanes + i)), "v")
            if vectors
            else None,
            loops.loop(rest, lambda i: share(vectors * lanes + i), "rest") if rest else None,
        )

    slices = -(-shape.rows // params.rows)

    def one_slice(index: Any) -> Any:
        first = index * params.rows
        return loops.loop(at_most(params.rows, shape.rows, first), lambda row: one_row(first + row), "row")

    return loops.function([*bound.inputs, y], loops.parallel(slices, one_slice))


@dataclass(frozen=True)
class SoftmaxTemplate:
    """The template: softmax over the last axis."""

    name: str = "softmax"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a `softmax` over the last axis of a plain tensor."""
        return _find(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give slices of several sizes."""
        rows = _known(kernel, target)[1].rows
        return (
            schedule_of(self.name, SoftmaxParams(count)) for count in sorted({-(-rows // p) for p in (1, 4, 16, 64)})
        )

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        return cost(_known(kernel, target)[1], params_of(SoftmaxParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        anchor, shape = _known(kernel, target)
        return build(shape, params_of(SoftmaxParams, schedule), body_after(kernel, anchor))


def _known(kernel: Fused, target: Target) -> tuple[Node, SoftmaxShape]:
    found = _find(kernel, target)
    if found is None:
        raise VerifyError(f"softmax cannot compute kernel {kernel.anchor}")
    return found


@lru_cache(64)
def _find(kernel: Fused, target: Target) -> tuple[Node, SoftmaxShape] | None:
    """Give the rows of a softmax, if the kernel is one over the last axis."""
    anchor = anchor_of(kernel, target, "softmax")
    if anchor is None or not isinstance(anchor.op, Softmax):
        return None
    x = anchor.inputs[0].type
    if x.layout is not None or anchor.op.axis % x.rank != x.rank - 1:
        return None
    return anchor, SoftmaxShape(x.static_shape[:-1], x.static_shape[-1], target.vector_lanes)
