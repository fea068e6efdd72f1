"""What kernels on tensor cores have in common: how operands are stored, and what may follow in registers."""

from __future__ import annotations

import math

from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.op import Kind, Op
from cnnc.ir.types import DType
from cnnc.ops.cast import Cast
from cnnc.ops.fused import Fused
from cnnc.ops.round_tf32 import RoundTf32

_MOST_ELEMENTS = 2**31 - 1
"""Indices are computed in 32 bits."""

_SOURCES = ("input", "constant")


def stored_for_mma(operand: Value, body: Graph) -> Value | None:
    """Give the input that an operand is widened from, or rounded to tf32 from; None where it is neither."""
    if not isinstance(operand.op, Cast | RoundTf32):
        return None
    (stored,) = operand.inputs
    narrow = (DType.F16, DType.BF16) if isinstance(operand.op, Cast) else (DType.F32,)
    fits = operand.dtype is DType.F32 and stored.dtype in narrow
    return stored if fits and stored in body.inputs else None


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
