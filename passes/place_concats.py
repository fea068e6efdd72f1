"""Join values where they lie: a concatenation whose parts are computed in place needs no kernel.

    fused(x...) {concat} -> concat(x...)      a node outside of kernels: its inputs lie one after the other

The memory plan then gives the parts their places inside the whole, and the kernels that compute them write there.  It
takes parts that are contiguous in the whole (nothing but axes of one element before the axis joined), that begin at
aligned addresses, that kernels compute, and that no other concatenation, graph output or second place in the same one
claims.  The whole is not an output itself, as those lie in the caller's memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.rewrite import map_graph, rebuild, record
from cnnc.ops.concat import Concat
from cnnc.ops.fused import Fused
from cnnc.passes.plan_memory import ALIGNMENT
from cnnc.passes.registry import Pass
from cnnc.passes.views import is_joint
from cnnc.target import Target


@dataclass(frozen=True)
class PlaceConcats(Pass):
    """Take concatenations out of kernels where their parts can be computed in place."""

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph with as many concatenations in place as possible, the first ones first."""
        placed = {node for node in graph.nodes if is_joint(node)}
        claimed = {*graph.inputs, *graph.outputs, *(part for node in placed for part in node.inputs)}
        for node in graph.nodes:
            if _is_contiguous(node) and node.values[0] not in claimed and _are_free(node, claimed, placed):
                placed.add(node)
                claimed.update(node.inputs)

        def place(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            concat = _concat_of(node)
            if concat is None or node not in placed:
                return rebuild(node, inputs)
            whole = call(concat, *inputs, loc=node.loc)
            record("place_concats", node.values[0], whole)
            return (whole,)

        return map_graph(graph, place)


def _concat_of(node: Node) -> Concat | None:
    """Give the concatenation that a kernel consists of, its operands in the order of the kernel's."""
    if not isinstance(node.op, Fused) or len(node.types) != 1:
        return None
    last = node.op.body.outputs[0].node
    if not isinstance(last.op, Concat) or last.inputs != node.op.body.inputs:
        return None
    return last.op


def _is_contiguous(node: Node) -> bool:
    """Whether the parts of a concatenation are ranges of its bytes that begin at aligned addresses."""
    concat, whole = _concat_of(node), node.types[0]
    if concat is None or not whole.is_static:
        return False
    layout = whole.layout
    position = concat.axis if layout is None else layout.tokens.index(layout.logical_axes[concat.axis])
    if math.prod(whole.physical_shape[:position]) != 1:
        return False
    return all(value.type.nbytes % ALIGNMENT == 0 for value in node.inputs[:-1])


def _are_free(node: Node, claimed: set[Value], placed: set[Node]) -> bool:
    """Whether the parts are different values that kernels compute, or placed concatenations, and nobody claims."""
    computed = all(isinstance(value.op, Fused) or value.node in placed for value in node.inputs)
    return computed and len(set(node.inputs)) == len(node.inputs) and claimed.isdisjoint(node.inputs)
