"""How operands are stored for tensor cores."""

from __future__ import annotations

from cnnc.ir.graph import Graph, Value
from cnnc.ir.types import DType
from cnnc.ops.cast import Cast
from cnnc.ops.round_tf32 import RoundTf32


def stored_for_mma(operand: Value, body: Graph) -> Value | None:
    """Give the input that an operand is widened from, or rounded to tf32 from; None where it is neither."""
    if not isinstance(operand.op, Cast | RoundTf32):
        return None
    (stored,) = operand.inputs
    narrow = (DType.F16, DType.BF16) if isinstance(operand.op, Cast) else (DType.F32,)
    fits = operand.dtype is DType.F32 and stored.dtype in narrow
    return stored if fits and stored in body.inputs else None
