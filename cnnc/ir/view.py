"""A networkx view of a graph, for the library's algorithms (dominators, reachability, layered drawing)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cnnc.ir.graph import Graph

if TYPE_CHECKING:
    import networkx


def to_networkx(graph: Graph) -> networkx.MultiDiGraph:
    """Give nodes as nodes and uses as edges, each with its `value` and input `position`.

    A multigraph: `add(x, x)` has two edges.
    """
    import networkx

    view = networkx.MultiDiGraph(name=graph.name)
    view.add_nodes_from(graph.nodes)
    for node in graph.nodes:
        for position, value in enumerate(node.inputs):
            view.add_edge(value.node, node, value=value, position=position)
    return view


def to_dot(graph: Graph) -> str:
    """Write a graph in Graphviz' language, constants left out."""
    shown = [node for node in graph.nodes if node.op.name != "constant"]
    numbers = {node: i for i, node in enumerate(shown)}
    lines = [f"digraph {json.dumps(graph.name)} {{", "  node [shape=box, fontname=monospace];"]
    for node, i in numbers.items():
        label = "\n".join((node.op.name, *map(str, node.types), *sorted(node.loc)))
        lines.append(f"  n{i} [label={json.dumps(label)}];")
    for node, i in numbers.items():
        lines += [f"  n{numbers[v.node]} -> n{i};" for v in node.inputs if v.node in numbers]
    return "\n".join([*lines, "}"]) + "\n"
