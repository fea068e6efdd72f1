"""Operands as kernels on ordinary cores read them: where they are stored, and how many numbers come at once."""

from __future__ import annotations

from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.types import DType
from cnnc.ops.cast import Cast

CHUNK_BYTES = 16
"""What a thread reads at once, at most."""

LANES = 32
"""The threads of a warp."""


def stored_plain(operand: Value, body: Graph) -> Value | None:
    """Give the input in a plain layout that an f32 operand is, or is widened from; None where it is computed."""
    narrow = isinstance(operand.op, Cast) and operand.inputs[0].dtype in (DType.F16, DType.BF16)
    stored = operand.inputs[0] if narrow else operand
    fits = operand.dtype is DType.F32 and stored in body.inputs and stored.type.layout is None
    return stored if fits else None


def stored_operands(node: Node, body: Graph) -> tuple[Value, ...] | None:
    """Give where all that a node takes is stored; None where some of it is computed."""
    stored = tuple(found for value in node.inputs if (found := stored_plain(value, body)) is not None)
    return stored if len(stored) == len(node.inputs) else None


def vector_of(extent: int, dtype: DType, *places: int) -> int:
    """Give how many numbers are read at once: of 16 bytes, two, or one, what divides a row's extent and places."""
    whole = CHUNK_BYTES // dtype.itemsize
    return next(lanes for lanes in (whole, 2, 1) if not any(number % lanes for number in (extent, *places)))
