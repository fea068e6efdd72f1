"""Receptive fields: how much of the input one number of a layer sees.

For a window of reach r = (kernel - 1) * dilation + 1 over values that see f inputs each and lie j apart:
field = f + (r - 1) * j, jump = j * stride  (Araujo et al., Distill 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.op import Kind


@dataclass(frozen=True)
class Field:
    """Along one spatial axis: inputs seen, and how far apart neighbours' fields lie."""

    size: Fraction
    jump: Fraction


Fields = tuple[Field, ...] | None
"""One for each spatial axis; None where every input is seen."""


def receptive_fields(graph: Graph) -> Mapping[Value, tuple[int, ...] | None]:
    """Give the field of each value, by spatial axis, in inputs; None where a number sees everything.

    What depends on no input at all is left out.
    """
    fields: dict[Value, Fields] = {}
    for value in graph.inputs:
        fields[value] = (Field(Fraction(1), Fraction(1)),) * max(value.type.rank - 2, 0)
    for node in graph.nodes:
        data = [v for v in node.inputs if v in fields]
        if data:
            seen = _after(node, [fields[v] for v in data])
            fields.update(dict.fromkeys(node.values, seen))
    return {value: None if seen is None else tuple(-(-f.size // 1) for f in seen) for value, seen in fields.items()}


def _after(node: Node, inputs: list[Fields]) -> Fields:
    """Give the fields of a node's outputs from those of its inputs."""
    seen = _widest(inputs)
    op: Any = node.op
    if seen is None:
        return None
    match op.name:
        case "conv" | "max_pool" | "min_pool" | "average_pool":
            windows = zip(_kernel(node), op.stride, op.dilation, strict=True)
            return tuple(_window(f, *window) for f, window in zip(seen, windows, strict=True))
        case "conv_transpose":
            windows = zip(_kernel(node), op.stride, op.dilation, strict=True)
            return tuple(_upwards(f, *window) for f, window in zip(seen, windows, strict=True))
        case "lrn" | "pad" | "concat" | "slice" | "split":
            return seen
        case "softmax" | "log_softmax":
            return seen if op.axis == 1 else None
    return seen if op.kind is Kind.ELEMENTWISE else None


def _kernel(node: Node) -> tuple[int, ...]:
    op: Any = node.op
    return tuple(op.kernel) if hasattr(op, "kernel") else node.inputs[1].type.static_shape[2:]


def _widest(inputs: list[Fields]) -> Fields:
    """Give the fields of a number that sees several values at its place."""
    known = [fields for fields in inputs if fields is not None]
    if len(known) < len(inputs) or len({len(fields) for fields in known}) > 1:
        return None
    return tuple(Field(max(f.size for f in axis), max(f.jump for f in axis)) for axis in zip(*known, strict=True))


def _window(f: Field, kernel: int, stride: int, dilation: int) -> Field:
    return Field(f.size + (kernel - 1) * dilation * f.jump, f.jump * stride)


def _upwards(f: Field, kernel: int, stride: int, dilation: int) -> Field:
    """A transposed convolution: an output reads every stride-th tap of its kernel."""
    taps = -(-((kernel - 1) * dilation + 1) // stride)
    return Field(f.size + (taps - 1) * f.jump, f.jump / stride)
