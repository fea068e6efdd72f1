"""Max unpooling at indices: zeros everywhere, then each value to its place, one after the other.

    y.flat[indices[q]] = x[q]

In one slice, so that the last of several values for a place stays.  An index outside of y, which ends the run in an
error (see index_check.py), writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cnnc.ir.graph import Node
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.unpool import MaxUnpool
from cnnc.target import Target

__all__ = ["Unpool", "build"]

_CYCLES_PER_VALUE = 4.0

_HERTZ = 3e9


@dataclass(frozen=True)
class Unpool:
    """The template: unpooling at indices that are data."""

    name: str = "unpool"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a kernel that is nothing but a max unpooling of fixed size."""
        return target.kind == "cpu" and _find(kernel) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the one schedule there is."""
        return (Schedule(self.name),)

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run: an eighth of a cycle for a zero, some for each value."""
        (out,), (values, _) = (v.type for v in kernel.body.outputs), (v.type for v in kernel.body.inputs)
        return (out.elements / 8 + values.elements * _CYCLES_PER_VALUE) / _HERTZ

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over x and indices, then y."""
        values, indices = (v.type for v in kernel.body.inputs)
        (out,) = (v.type for v in kernel.body.outputs)
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        return build(values.elements, out.elements, str(values.dtype.numpy), str(indices.dtype.numpy))


def _find(kernel: Fused) -> Node | None:
    """Give the unpooling that the kernel is, whose operands are the kernel's inputs in their order."""
    node = kernel.body.outputs[0].node
    if len(kernel.body.outputs) != 1 or not isinstance(node.op, MaxUnpool) or node.inputs != kernel.body.inputs:
        return None
    types = [v.type for v in (*node.inputs, *node.values)]
    if any(not t.is_static or t.layout is not None or not t.elements for t in types):
        return None
    return node if math.prod(types[-1].static_shape) < 2**31 else None


def build(values: int, places: int, dtype: str, index_dtype: str) -> Any:
    """Make the kernel for so many values and places."""
    from tvm import tirx

    from cnnc.backends.lower import loops

    x, y = loops.buffer("x", (values,), dtype), loops.buffer("y", (places,), dtype)
    indices = loops.buffer("indices", (values,), index_dtype)
    zero = tirx.const(0, dtype)
    total = tirx.const(places, index_dtype)
    lanes = 8 if places % 8 == 0 else 1

    def clear(block: Any) -> Any:
        return loops.store(y, tirx.Broadcast(zero, lanes) if lanes > 1 else zero, block * lanes, lanes=lanes)

    def put(number: Any) -> Any:
        index = loops.load(indices, number)
        place = index + tirx.Select(index < 0, total, tirx.const(0, index_dtype))
        inside = tirx.all(place >= 0, place < total)
        return loops.when(inside, loops.store(y, loops.load(x, number), tirx.Cast("int32", place)))

    def one_slice(_: Any) -> Any:
        return loops.sequence(loops.loop(places // lanes, clear, "block"), loops.loop(values, put, "number"))

    return loops.function([x, indices, y], loops.parallel(1, one_slice))
