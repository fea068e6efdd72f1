"""Operands as kernels read them, where they are stored and how many numbers come at once, and what follows on them."""

from __future__ import annotations

import math

from cnnc.backends.cuda.machine import CHUNK_BYTES
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.op import Kind, Op
from cnnc.ir.types import DType
from cnnc.ops.cast import Cast
from cnnc.ops.fused import Fused

STORED = (DType.F32, DType.F16, DType.BF16)
"""What operands are stored in; sums are f32."""

_MOST_ELEMENTS = 2**31 - 1
"""Indices are computed in 32 bits."""

_SOURCES = ("input", "constant")


def stored_operand(operand: Value, body: Graph) -> Value | None:
    """Give the input that an operand is, or is widened from; None where it is neither."""
    widened = isinstance(operand.op, Cast) and operand.dtype is DType.F32
    stored = operand.inputs[0] if widened else operand
    return stored if stored in body.inputs and stored.dtype in STORED else None


def stored_plain(operand: Value, body: Graph) -> Value | None:
    """Give the input in a plain layout that an f32 operand is, or is widened from; None where it is computed."""
    stored = stored_operand(operand, body)
    fits = stored is not None and operand.dtype is DType.F32 and stored.type.layout is None
    return stored if fits else None


def stored_operands(node: Node, body: Graph) -> tuple[Value, ...] | None:
    """Give where all that a node takes is stored; None where some of it is computed."""
    stored = tuple(found for value in node.inputs if (found := stored_plain(value, body)) is not None)
    return stored if len(stored) == len(node.inputs) else None


def vector_of(extent: int, dtype: DType, *places: int) -> int:
    """Give how many numbers are read at once: of 16 bytes, two, or one, what divides a row's extent and places."""
    whole = CHUNK_BYTES // dtype.itemsize
    return next(lanes for lanes in (whole, 2, 1) if not any(number % lanes for number in (extent, *places)))


def follows_in_registers(kernel: Fused, kind: type[Op] | tuple[type[Op], ...], operands: int = 2) -> Node | None:
    """Give the one operator of a kernel that is more than elementwise, of one of the kinds; None where there is none.

    What is computed from it has its shape and layout, whatever the type; all sizes are fixed, and none is 0.  What it
    takes beside its first `operands`, such as a bias, is an input.
    """
    body = kernel.body
    types = [type_ for node in body.nodes for type_ in node.types]
    if len(body.outputs) != 1 or not all(t.is_static and 0 < t.elements <= _MOST_ELEMENTS for t in types):
        return None
    found = [node for node in body.nodes if node.op.kind > Kind.ELEMENTWISE and node.op.name not in _SOURCES]
    if len(found) != 1 or not isinstance(found[0].op, kind):
        return None
    anchor = found[0]
    if any(value not in body.inputs for value in anchor.inputs[operands:]):
        return None
    after = {anchor}
    result = anchor.types[0]
    for node in body.nodes:
        if any(value.node in after for value in node.inputs):
            if any((t.shape, t.layout) != (result.shape, result.layout) for t in node.types):
                return None
            after.add(node)
    made = body.outputs[0]
    fits = made.node in after and math.prod(made.type.physical_shape) <= _MOST_ELEMENTS
    return anchor if fits else None
