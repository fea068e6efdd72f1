"""The verifier: re-runs inference over a whole graph and checks its structure."""

from __future__ import annotations

from weakref import WeakSet

from cnnc.errors import ShapeError, VerifyError
from cnnc.ir.build import infer_types
from cnnc.ir.graph import Graph, Node
from cnnc.ir.text import print_graph

_sound: WeakSet[Node] = WeakSet()
"""Nodes found to be well-typed: they never change, and most of them live through many passes."""


def verify(graph: Graph, after: str = "") -> Graph:
    """Check a graph and give it back; `after` names the pass that made it.

    Raises `VerifyError`, with the graph printed and the message at the node, where a type is not what
    inference gives, an input is not declared, a name is used twice, or a kernel's body is ill-formed.
    """
    where = f" after {after}" if after else ""
    _check_names(graph, where)
    declared = {v.node for v in graph.inputs}
    for node in graph.nodes:
        if node.op.name == "input" and node not in declared:
            raise _error(graph, node, "is reached but is not an input of the graph", where)
        if node in _sound:
            continue
        problem = _problem(node)
        if problem:
            raise _error(graph, node, problem, where)
        body = getattr(node.op, "body", None)
        if isinstance(body, Graph):
            verify(body, after)
        _sound.add(node)
    return graph


def _error(graph: Graph, node: Node, problem: str, where: str) -> VerifyError:
    text = print_graph(graph, notes={node: problem})
    return VerifyError(f"{node.op.name}: {problem} (at {', '.join(sorted(node.loc))}){where}\n{text}")


def _check_names(graph: Graph, where: str) -> None:
    for kind, names in (("input", graph.input_names), ("output", graph.output_names)):
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise VerifyError(f"graph {graph.name}: {kind} name {doubled[0]!r} is used twice{where}")
    for value in graph.inputs:
        if value.op.name != "input":
            raise VerifyError(f"graph {graph.name}: {value.op.name} stands among the inputs{where}")


def _problem(node: Node) -> str | None:
    for position, value in enumerate(node.inputs):
        if value.index >= len(value.node.types):
            return f"input {position} is output {value.index} of {value.op.name}, which has {len(value.node.types)}"
    try:
        inferred = infer_types(node.op, tuple(v.type for v in node.inputs))
    except ShapeError as error:
        return f"inference refuses it: {error}"
    if inferred != node.types:
        return f"has types ({', '.join(map(str, node.types))}), inference gives ({', '.join(map(str, inferred))})"
    return None
