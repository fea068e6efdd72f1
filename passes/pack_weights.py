"""Declare weights packed, as kernels read them: of fully connected layers, and on GPUs of Winograd's algorithm.

    dense(x, w) -> dense(x, w in OI16o)                         for FEWEST_ROWS rows of x or more
    digit_dense(x, d, unit) -> digit_dense(x, d in OIH16i16oW, unit)
    conv{algorithm=winograd4}(x, u) -> conv(x, u in HWIO4o)     for a plain x on a GPU

The block is two vectors, or four; digits are packed as matrix units multiply them.  A layer of fewer rows is bound by
reading its weight, for which plain rows are as good; so where graphs for several batch sizes share a weight, it is
packed if it is worth it for any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.layout import Layout
from cnnc.ir.rewrite import map_graph, rebuild
from cnnc.ir.types import DType
from cnnc.ops.blocked import packed_block, weight_layout
from cnnc.ops.conv import Conv
from cnnc.ops.dense import Dense
from cnnc.ops.digit_conv import digits_layout
from cnnc.ops.digit_dense import DigitDense
from cnnc.ops.source import Constant
from cnnc.ops.winograd import winograd_rows_layout
from cnnc.passes.registry import Pass
from cnnc.target import Target

FEWEST_ROWS = 4
"""Rows from which arithmetic, not memory, is the limit."""


@dataclass(frozen=True)
class PackWeights(Pass):
    """Pack the weights of all layers that are worth it; `block` outputs lie together, by default `packed_block`."""

    block: int = 0

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph with packed weights; a GPU reads those of fully connected layers plain."""
        return _pack_transformed(graph) if target.is_gpu else self._pack(graph, target, _is_worth_it)

    def run_together(self, graphs: Sequence[Graph], target: Target) -> tuple[Graph, ...]:
        """Pack what is worth it in any of the graphs."""
        if len(graphs) == 1 or target.is_gpu:
            return tuple(self.run(graph, target) for graph in graphs)
        worth_it = {node.inputs[1].op for graph in graphs for node in graph.nodes if _is_worth_it(node)}
        return tuple(
            self._pack(graph, target, lambda node: _is_possible(node) and node.inputs[1].op in worth_it)
            for graph in graphs
        )

    def _pack(self, graph: Graph, target: Target, is_worth_it: Callable[[Node], bool]) -> Graph:
        block = self.block or packed_block(target.vector_lanes)

        def pack(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            if isinstance(node.op, DigitDense) and isinstance(inputs[1].op, Constant) and inputs[1].type.layout is None:
                return _with_weight_in(digits_layout(target.vector_lanes), node, inputs)
            if not is_worth_it(node):
                return rebuild(node, inputs)
            return _with_weight_in(weight_layout(2, 1, block), node, inputs)

        return map_graph(graph, pack)


def _with_weight_in(layout: Layout, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
    """Rebuild a layer with its weight, a constant, declared to be in a layout."""
    x, weight, *bias = inputs
    assert isinstance(weight.op, Constant), "only known weights are packed"
    packed = call(replace(weight.op, layout=layout), loc=weight.node.loc)
    return call(node.op, x, packed, *bias, loc=node.loc).node.values


def _pack_transformed(graph: Graph) -> Graph:
    """Pack the transformed weights of convolutions that read plain images."""

    def pack(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        if not isinstance(node.op, Conv) or node.op.tile is None or not isinstance(inputs[1].op, Constant):
            return rebuild(node, inputs)
        if any(value.type.layout is not None for value in inputs[:2]):
            return rebuild(node, inputs)
        return _with_weight_in(winograd_rows_layout(), node, inputs)

    return map_graph(graph, pack)


def _is_possible(node: Node) -> bool:
    """Whether a node is a layer with a weight that is known and still plain."""
    if not isinstance(node.op, Dense) or not isinstance(node.inputs[1].op, Constant):
        return False
    x, weight = node.inputs[0].type, node.inputs[1].type
    return weight.layout is None and weight.dtype is DType.F32 and x.is_static and 0 not in weight.static_shape


def _is_worth_it(node: Node) -> bool:
    """Whether a node is such a layer, of many rows."""
    return _is_possible(node) and math.prod(node.inputs[0].type.static_shape[:-1]) >= FEWEST_ROWS
