"""Declare the weights of fully connected layers packed, as the kernels of many rows read them.

    dense(x, w) -> dense(x, w in OI16o)   for FEWEST_ROWS rows of x or more

The block is two vectors.  A layer of fewer rows is bound by reading its weight, for which plain rows are as good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.rewrite import map_graph, rebuild
from cnnc.ir.types import DType
from cnnc.ops.blocked import weight_layout
from cnnc.ops.dense import Dense
from cnnc.ops.source import Constant
from cnnc.passes.registry import Pass
from cnnc.target import Target

FEWEST_ROWS = 4
"""Rows from which arithmetic, not memory, is the limit."""


@dataclass(frozen=True)
class PackWeights(Pass):
    """Pack the weights of all layers that are worth it; `block` outputs lie together, by default two vectors."""

    block: int = 0

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph with packed weights; a GPU reads plain ones."""
        if target.is_gpu:
            return graph
        block = self.block or 2 * target.vector_lanes

        def pack(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            if not _is_worth_it(node):
                return rebuild(node, inputs)
            x, weight, *bias = inputs
            packed = call(
                replace(weight.op, layout=weight_layout(2, 1, block)),  # type: ignore[call-arg]
                loc=weight.node.loc,
            )
            return call(node.op, x, packed, *bias, loc=node.loc).node.values

        return map_graph(graph, pack)


def _is_worth_it(node: Node) -> bool:
    """Whether a node is a layer of many rows, with a weight that is known and still plain."""
    if not isinstance(node.op, Dense) or not isinstance(node.inputs[1].op, Constant):
        return False
    x, weight = node.inputs[0].type, node.inputs[1].type
    if weight.layout is not None or weight.dtype is not DType.F32 or not x.is_static:
        return False
    return math.prod(x.static_shape[:-1]) >= FEWEST_ROWS and 0 not in weight.static_shape
