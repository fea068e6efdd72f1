"""Compute at compile time what depends on constants alone.

    f(c1, c2, ...) -> constant

by the operators' own numpy definition.  A result of more than `limit` bytes stays uncomputed, unless it is at most
four times what it is computed from, as transformed weights are: an Expand must not turn four bytes into gigabytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.interp import run
from cnnc.ir.literal import Literal
from cnnc.ir.rewrite import map_graph, rebuild, record
from cnnc.ops.fused import Fused
from cnnc.ops.source import Constant
from cnnc.passes.registry import Pass
from cnnc.target import Target

GROWTH = 4
"""How much larger than its operands a constant may be whatever its size."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Fold constants; `limit` is in bytes for each result."""

    limit: int = 16 << 20

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph with every foldable node replaced."""

        def fold(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            values = rebuild(node, inputs)
            if not self._folds(values[0].node):
                return values
            return _constants(values)

        return map_graph(graph, fold)

    def _folds(self, node: Node) -> bool:
        if not node.inputs or isinstance(node.op, Fused):
            return False
        if not all(isinstance(v.op, Constant) for v in node.inputs) or not all(t.is_static for t in node.types):
            return False
        given = sum(v.type.nbytes for v in node.inputs)
        return all(t.nbytes <= max(self.limit, GROWTH * given) for t in node.types)


def _constants(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """Compute the outputs of a node with constant inputs."""
    node = values[0].node
    arrays = run(Graph("fold", (), values), ())
    label = _label(node)
    folded = []
    for value, array in zip(values, arrays, strict=True):
        op = Constant(Literal(np.ascontiguousarray(array).reshape(array.shape)), label, value.type.layout)
        folded.append(call(op, loc=node.loc | frozenset().union(*(v.node.loc for v in node.inputs))))
        record("fold_constants", value, folded[-1])
    return tuple(folded)


def _label(node: Node) -> str:
    """Keep the name of a weight that is merely rearranged."""
    labels = {v.op.label for v in node.inputs if isinstance(v.op, Constant) and v.op.label}
    return labels.pop() if len(node.inputs) == 1 and labels else ""
