"""Checks a memory plan by acting it out: who wrote each byte of the arena last, and is it who the reader wants?

Shares nothing with the planner but the types: no lifetimes are computed, no storages merged.
"""

from __future__ import annotations

import bisect

import numpy as np

from cnnc.errors import VerifyError
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.op import Kind
from cnnc.ops.concat import Concat
from cnnc.ops.fused import Fused
from cnnc.passes.plan_memory import MemoryPlan

_SOURCES = ("input", "parameter", "constant")

Origin = tuple[Value, ...]
"""The values whose bytes, one after the other, a value consists of."""


def check_plan(graph: Graph, plan: MemoryPlan) -> None:
    """Raise `VerifyError`, naming the node and the value, where running the graph on this plan would go wrong."""
    arena = _Arena(plan.size)
    origin: dict[Value, Origin] = {}
    outside = {*graph.inputs, *graph.outputs}
    for node in graph.nodes:
        if node.op.name in _SOURCES:
            origin.update((value, (value,)) for value in node.values)
            outside.update(node.values)
        elif isinstance(node.op, Fused):
            origin.update((value, (value,)) for value in node.values)
            _run_kernel(node, plan, arena, origin, outside)
        elif isinstance(node.op, Concat):
            _check_joint(node, plan, origin, outside)
        else:
            _check_view(node, plan, origin, outside)
    missing = [name for name, v in zip(graph.output_names, graph.outputs, strict=True) if not isinstance(v.op, Fused)]
    if missing:
        raise VerifyError(f"memory plan: output {missing[0]} is not written by a kernel of its own")


def _run_kernel(node: Node, plan: MemoryPlan, arena: _Arena, origin: dict[Value, Origin], outside: set[Value]) -> None:
    for value in node.inputs:
        for source in origin[value]:
            if source not in outside and not arena.holds(_range(node, source, plan), source):
                raise VerifyError(f"memory plan: {_at(node)} reads {value}, but its bytes have been overwritten")
    written = [value for value in node.values if value not in outside]
    for value in written:
        start, end = _range(node, value, plan)
        if start % 64 or start < 0 or end > plan.size:
            raise VerifyError(f"memory plan: {value} of {_at(node)} lies at [{start}, {end}) of {plan.size} bytes")
        for operand in {source for v in node.inputs for source in origin[v] if source not in outside}:
            other = _range(node, operand, plan)
            if max(start, other[0]) < min(end, other[1]) and not _may_overwrite(node, operand, value, origin, plan):
                raise VerifyError(f"memory plan: {value} of {_at(node)} overwrites the input {operand} being read")
    for value in written:
        arena.write(_range(node, value, plan), value)
    for value in written:
        if not arena.holds(_range(node, value, plan), value):
            raise VerifyError(f"memory plan: outputs of {_at(node)} overlap")


def _check_view(node: Node, plan: MemoryPlan, origin: dict[Value, Origin], outside: set[Value]) -> None:
    source, value = node.inputs[0], node.values[0]
    if not _same_bytes(source, value):
        raise VerifyError(f"memory plan: {_at(node)} stands outside of a kernel but moves bytes")
    origin[value] = origin[source]
    if not outside.isdisjoint(origin[source]):
        if value in plan.offsets:
            raise VerifyError(f"memory plan: {value} renames memory outside of the arena but has a place in it")
    elif plan.offsets.get(value) != plan.offsets.get(source):
        raise VerifyError(f"memory plan: view {value} does not lie where {source} does (at {_at(node)})")


def _check_joint(node: Node, plan: MemoryPlan, origin: dict[Value, Origin], outside: set[Value]) -> None:
    """Check that the parts lie one after the other, and that this is what joining them means."""
    whole = node.values[0]
    origin[whole] = tuple(source for part in node.inputs for source in origin[part])
    if whole in outside or not outside.isdisjoint(origin[whole]):
        raise VerifyError(f"memory plan: {_at(node)} joins memory outside of the arena")
    start = _range(node, whole, plan)[0]
    for part in node.inputs:
        if _range(node, part, plan)[0] != start:
            raise VerifyError(f"memory plan: {part} does not lie where it belongs in {whole} (at {_at(node)})")
        start += part.type.nbytes
    numbers = np.arange(1, whole.type.elements + 1).reshape(whole.type.static_shape)
    axis = node.op.axis if isinstance(node.op, Concat) else 0
    cuts = np.cumsum([part.type.static_shape[axis] for part in node.inputs])[:-1]
    parts = zip(node.inputs, np.split(numbers, cuts, axis), strict=True)
    if not np.array_equal(_memory(whole, numbers), np.concatenate([_memory(part, array) for part, array in parts])):
        raise VerifyError(f"memory plan: {_at(node)} stands outside of a kernel but moves bytes")


def _same_bytes(source: Value, value: Value) -> bool:
    """Whether a view gives the bytes it takes; layouts are compared by packing numbered elements."""
    if source.type.elements != value.type.elements or source.dtype != value.dtype:
        return False
    numbers = np.arange(1, source.type.elements + 1)
    before, after = (_memory(v, numbers.reshape(v.type.static_shape)) for v in (source, value))
    return np.array_equal(before, after)


def _memory(value: Value, array: np.ndarray) -> np.ndarray:
    """Give a logical array as it lies in memory."""
    return (array if value.type.layout is None else value.type.layout.pack(array)).reshape(-1)


def _may_overwrite(node: Node, operand: Value, value: Value, origin: dict[Value, Origin], plan: MemoryPlan) -> bool:
    """Whether the kernel reads the operand at no other index than the one it writes, in the very same place."""
    reads = [position for position, v in enumerate(node.inputs) if operand in origin[v]]
    if any(len(origin[node.inputs[position]]) > 1 for position in reads):
        return False
    if len(reads) != 1 or plan.offsets[operand] != plan.offsets[value] or len(node.values) != 1:
        return False
    body = node.op.body if isinstance(node.op, Fused) else None
    if body is None:
        return False
    shape, layout = value.shape, value.type.layout
    if body.inputs[reads[0]].shape != shape or body.inputs[reads[0]].type.layout != layout:
        return False
    if body.inputs[reads[0]].dtype.itemsize != value.dtype.itemsize:
        return False
    computing = [n for n in body.nodes if n.op.name not in _SOURCES]
    return all(n.op.kind == Kind.ELEMENTWISE for n in computing)


def _range(node: Node, value: Value, plan: MemoryPlan) -> tuple[int, int]:
    if value not in plan.offsets:
        raise VerifyError(f"memory plan: {value} has no place (at {_at(node)})")
    return plan.offsets[value], plan.offsets[value] + value.type.nbytes


def _at(node: Node) -> str:
    return f"{node!r} ({', '.join(sorted(node.loc)) or 'no location'})"


class _Arena:
    """Remembers who wrote which bytes last, as a sorted list of disjoint (start, end, writer)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.starts: list[int] = []
        self.pieces: list[tuple[int, int, Value]] = []

    def write(self, where: tuple[int, int], writer: Value) -> None:
        start, end = where
        if start == end:
            return
        low = bisect.bisect_right(self.starts, start)
        if low and self.pieces[low - 1][1] > start:
            low -= 1
        high = bisect.bisect_left(self.starts, end)
        kept = []
        for s, e, owner in self.pieces[low:high]:
            if s < start:
                kept.append((s, start, owner))
            if e > end:
                kept.append((end, e, owner))
        new = sorted([*kept, (start, end, writer)], key=lambda piece: piece[0])
        self.pieces[low:high] = new
        self.starts[low:high] = [piece[0] for piece in new]

    def holds(self, where: tuple[int, int], writer: Value) -> bool:
        start, end = where
        if start == end:
            return True
        low = bisect.bisect_right(self.starts, start) - 1
        return low >= 0 and self.pieces[low][1] >= end and self.pieces[low][2] == writer
