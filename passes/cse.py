"""Compute equal things once.

    f(x), f(x) -> f(x)

Two nodes are equal where operator, attributes and inputs are; the one kept gets the locations of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.literal import Literal
from cnnc.ir.rewrite import map_graph, rebuild, record
from cnnc.ir.text import format_attribute
from cnnc.passes.registry import Pass
from cnnc.target import Target


@dataclass(frozen=True)
class Cse(Pass):
    """Common subexpression elimination, kernels and constants included."""

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph in which no two nodes are equal."""
        first = _first_equals(graph)
        if all(first[node] is node for node in graph.nodes):
            return graph
        loc: dict[Node, frozenset[str]] = {}
        for node in graph.nodes:
            loc[first[node]] = loc.get(first[node], frozenset()) | node.loc
        built: dict[Node, tuple[Value, ...]] = {}

        def keep_first(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            if first[node] is not node:
                for old, new in zip(node.values, built[first[node]], strict=True):
                    record("cse", old, new)
                return built[first[node]]
            values = rebuild(node, inputs)
            if loc[node] != node.loc:
                values = call(node.op, *inputs, loc=loc[node]).node.values
            built[node] = values
            return values

        return map_graph(graph, keep_first)


def _first_equals(graph: Graph) -> dict[Node, Node]:
    """Map every node to the first one that computes the same."""
    first: dict[Node, Node] = {}
    seen: dict[Hashable, Node] = {}
    literals = _Literals()
    for node in graph.nodes:
        if node.op.name in ("input", "parameter"):
            first[node] = node
            continue
        inputs = tuple((first[v.node], v.index) for v in node.inputs)
        first[node] = seen.setdefault((type(node.op), _attributes(node, literals), inputs), node)
    return first


def _attributes(node: Node, literals: _Literals) -> Hashable:
    """Give what tells operators of one class apart; as text, in which 1 is not 1.0 and 0.0 not -0.0."""
    shown: list[Hashable] = []
    for spec in dataclasses.fields(node.op):
        value = getattr(node.op, spec.name)
        if isinstance(value, Literal):
            shown.append(literals.number(value))
        elif isinstance(value, Graph):
            shown.append(id(value))
        elif spec.name != "label":
            shown.append(format_attribute(value))
    return tuple(shown)


@dataclass
class _Literals:
    """Numbers arrays so that equal ones get the same number, comparing only those that a sample does not tell apart."""

    buckets: dict[Hashable, list[tuple[int, np.ndarray]]] = field(default_factory=dict)
    count: int = 0

    def number(self, literal: Literal) -> int:
        array = literal.array
        flat = array.reshape(-1)
        sample = flat[:: max(flat.size // 64, 1)].tobytes()
        bucket = self.buckets.setdefault((array.dtype.str, array.shape, sample), [])
        for number, other in bucket:
            if other is array or np.array_equal(other.reshape(-1).view(np.uint8), flat.view(np.uint8)):
                return number
        self.count += 1
        bucket.append((self.count, array))
        return self.count
