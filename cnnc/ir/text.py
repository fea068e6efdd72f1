"""The text form of graphs: prints a graph; `parse_graph` (in `parse`) reads it back.

    graph "net" {
      %0 = input {label="x"} : f32[1,3,8,8]
      %1 = constant {value=#9f86d081884c7d65, label="w"} : f32[4,3,3,3]
      %2 = conv(%0, %1) {stride=[1,1], pad=[1,1,1,1]} : f32[1,4,8,8] @ "Conv_0"
      return %2 as "y"
    }

Attributes equal to their default are left out.  Constants of up to four elements stand in the text,
others by the first 16 digits of their SHA-256; `weights_of` gives the arrays for a side file.  A `;`
begins a comment.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnnc.ir.attribute import ATTRIBUTES
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.literal import Literal
from cnnc.ir.types import Dim, DType, TensorType

INLINE_ELEMENTS = 4
DIGEST_DIGITS = 16


def print_graph(graph: Graph, notes: Mapping[Node, str] | None = None, *, locations: bool = True) -> str:
    """Write a graph as text; `notes` adds a line of comment under a node.

    Without `locations`, graphs that compute the same in the same way print the same.
    """
    return "\n".join(_graph_lines(graph, notes or {}, locations, indent="")) + "\n"


def weights_of(graph: Graph) -> dict[str, np.ndarray]:
    """Give the arrays that the text names by digest, kernels' bodies included."""
    arrays: dict[str, np.ndarray] = {}
    for node in graph.nodes:
        for _, value in _fields(node):
            if isinstance(value, Graph):
                arrays |= weights_of(value)
            elif isinstance(value, Literal) and value.array.size > INLINE_ELEMENTS:
                arrays[value.digest[:DIGEST_DIGITS]] = value.array
    return arrays


def _graph_lines(graph: Graph, notes: Mapping[Node, str], locations: bool, indent: str) -> list[str]:
    names: dict[Value, str] = {}
    lines = [f"{indent}graph {json.dumps(graph.name)} {{"]
    for node in graph.nodes:
        for value in node.values:
            names[value] = f"%{len(names)}"
        lines += _node_lines(node, names, notes, locations, indent + "  ")
    results = [f"{names[v]} as {json.dumps(n)}" for v, n in zip(graph.outputs, graph.output_names, strict=True)]
    lines.append(f"{indent}  return {', '.join(results)}")
    lines.append(indent + "}")
    return lines


def _node_lines(
    node: Node, names: Mapping[Value, str], notes: Mapping[Node, str], locations: bool, indent: str
) -> list[str]:
    results = ", ".join(names[v] for v in node.values)
    inputs = ", ".join(names.get(v, "%?") for v in node.inputs)
    shown = [(k, v) for k, v in _fields(node) if not isinstance(v, Graph)]
    bodies = [v for _, v in _fields(node) if isinstance(v, Graph)]
    attributes = ", ".join(f"{key}={format_attribute(value)}" for key, value in shown)
    line = f"{indent}{results} = {node.op.name}"
    line += f"({inputs})" if node.inputs else ""
    line += f" {{{attributes}}}" if attributes else ""
    line += f" : {', '.join(map(str, node.types))}"
    line += f" @ {', '.join(map(json.dumps, sorted(node.loc)))}" if node.loc and locations else ""
    lines = [line]
    for body in bodies:
        nested = _graph_lines(body, notes, locations, indent + "  ")
        lines[-1] += " body"
        lines += nested
    if node in notes:
        lines.append(f"{indent}; ^ {notes[node]}")
    return lines


def _fields(node: Node) -> list[tuple[str, Any]]:
    """List the attributes to print: not the defaults, nor a type that stands behind the colon anyway."""
    shown = []
    for spec in dataclasses.fields(node.op):
        value = getattr(node.op, spec.name)
        implied = isinstance(value, TensorType) and value == node.types[0]
        default = spec.default is not dataclasses.MISSING and same_attribute(value, spec.default)
        if not implied and not default:
            shown.append((spec.name, value))
    return shown


def same_attribute(left: Any, right: Any) -> bool:
    """Whether two attributes would print alike (a NaN is the same as a NaN, 1 is not 1.0)."""
    return type(left) is type(right) and (left == right or format_attribute(left) == format_attribute(right))


def format_attribute(value: Any) -> str:
    """Write one attribute."""
    if isinstance(value, Literal):
        return _format_literal(value)
    if isinstance(value, tuple):
        return "[" + ",".join(map(format_attribute, value)) + "]"
    if isinstance(value, DType | Dim) or value is None or isinstance(value, bool):
        return str(value)
    if type(value).__name__ in ATTRIBUTES:
        return f"{type(value).__name__}<{value}>"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"an attribute of type {type(value).__name__} cannot be printed")


def _format_literal(literal: Literal) -> str:
    if literal.array.size > INLINE_ELEMENTS:
        return f"#{literal.digest[:DIGEST_DIGITS]}"
    return "<" + ",".join(str(element) for element in literal.array.reshape(-1)) + ">"
