"""Keep in 16 bits what kernels hand each other.

    g(f(x)) -> g'(f'(x)),  f' = cast{f16}(f(...)), g' = g(cast{f32}(...))      f, g kernels

A kernel widens what it reads and rounds once what it writes; all of its arithmetic stays f32, sums and norms included,
and products of such numbers are exact in f32.  So what the graph means is what tensor cores compute, but for the shares
of attention, which they take in 16 bits.  Kernels that only move data move the 16 bits as they are.  Inputs and outputs
of the network stay f32, as do constants (see narrow_weights) and what a kernel makes integers of: positions, orders and
conditions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cnnc.errors import ShapeError, UsageError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.op import Kind
from cnnc.ir.rewrite import map_graph, rebuild, record_miss
from cnnc.ir.types import DType
from cnnc.ops.cast import Cast
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input
from cnnc.passes.narrow_weights import NARROW
from cnnc.passes.registry import Pass
from cnnc.target import Target


@dataclass(frozen=True)
class NarrowActivations(Pass):
    """Narrow f32 values between kernels to `dtype`, f16 or bf16; a graph without kernels stays as it is."""

    dtype: DType = DType.F16

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph with narrow values between kernels; raises `UsageError` for a type that is not narrow."""
        if self.dtype not in NARROW:
            raise UsageError(f"{self.name}: dtype={self.dtype} is none of {', '.join(NARROW)}")
        narrow = _narrow_values(graph)

        def visit(node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
            if not isinstance(node.op, Fused):
                return rebuild(node, inputs)
            makes = [value in narrow for value in node.values]
            types = [value.type for value in inputs]
            if not any(makes) and types == [value.type for value in node.op.body.inputs]:
                return rebuild(node, inputs)
            body = _moved(node.op.body, inputs, makes, self.dtype) or _converted(
                node.op.body, inputs, makes, self.dtype
            )
            return call(replace(node.op, body=body), *inputs, loc=node.loc).node.values

        return map_graph(graph, visit)


def _narrow_values(graph: Graph) -> set[Value]:
    """List what kernels make in f32 for other kernels, directly or by way of views and joints."""
    wide = {*graph.outputs, *(value for node in graph.nodes if not node.inputs for value in node.values)}
    for node in graph.nodes:
        made = _made_integer(node.op.body) if isinstance(node.op, Fused) else None
        if made is not None:
            wide.update(node.inputs)
            record_miss("narrow_activations", f"{made.op.name} makes {made.types[0]} of what it reads", node.loc)
    views = [node for node in graph.nodes if node.inputs and not isinstance(node.op, Fused)]
    before = -1
    while before < len(wide):
        before = len(wide)
        for node in views:
            # A view is one thing with what it renames, and the parts of a joint with the whole.
            if not wide.isdisjoint((*node.inputs, *node.values)):
                wide.update((*node.inputs, *node.values))
    made_by_kernels = (value for node in graph.nodes if isinstance(node.op, Fused) for value in node.values)
    return {value for value in made_by_kernels if value.dtype is DType.F32 and value not in wide}


def _made_integer(body: Graph) -> Node | None:
    """Give an operator that makes integers or booleans of floats; None where a kernel has none."""
    for node in body.nodes:
        if any(v.dtype.is_float for v in node.inputs) and any(not t.dtype.is_float for t in node.types):
            return node
    return None


def _moved(body: Graph, inputs: Sequence[Value], makes: Sequence[bool], dtype: DType) -> Graph | None:
    """Give a body that only moves data with the inputs' types; None where it computes, or hands on what stays f32."""
    if not all(makes) or any(v.dtype is not dtype for v in inputs):
        return None
    if any(node.inputs and node.op.kind is not Kind.INJECTIVE for node in body.nodes):
        return None
    given = _inputs(body, inputs)
    try:
        return _rebuilt(body, given, given)
    except ShapeError:
        return None


def _converted(body: Graph, inputs: Sequence[Value], makes: Sequence[bool], dtype: DType) -> Graph:
    """Give a body that widens the inputs that are narrow, and rounds what it makes for others."""
    given = _inputs(body, inputs)
    widened = {
        old: value if value.type == old.type else call(Cast(old.dtype), value, loc=()) for old, value in given.items()
    }
    inside = _rebuilt(body, given, widened)
    rounded = tuple(
        call(Cast(dtype), value, loc=value.node.loc) if narrow else value
        for value, narrow in zip(inside.outputs, makes, strict=True)
    )
    return replace(inside, outputs=rounded)


def _rebuilt(body: Graph, inputs: Mapping[Value, Value], read: Mapping[Value, Value]) -> Graph:
    """Give a body with other inputs, of which its operators read what is made of them."""
    new = dict(read)
    for node in body.nodes:
        if node.values[0] not in new:
            new.update(zip(node.values, rebuild(node, tuple(new[v] for v in node.inputs)), strict=True))
    return replace(body, inputs=tuple(inputs[v] for v in body.inputs), outputs=tuple(new[v] for v in body.outputs))


def _inputs(body: Graph, inputs: Sequence[Value]) -> dict[Value, Value]:
    """Declare the inputs of a body with the types of what it is given."""
    return {
        old: old if old.type == value.type else call(Input(f"x{i}", value.type), loc=())
        for i, (old, value) in enumerate(zip(body.inputs, inputs, strict=True))
    }
