"""A networkx view of a graph, for the library's algorithms (dominators, reachability, layered drawing)."""

from __future__ import annotations

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
