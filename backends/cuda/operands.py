"""Operands as kernels on ordinary cores read them: where they are stored, and how many numbers come at once."""

from __future__ import annotations

from cnnc.ir.graph import Graph, Value
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


def vector_of(extent: int, dtype: DType, *places: int) -> int:
    """Give how many numbers are read at once: 16 bytes, or two numbers, that divide a row's extent and all its places."""
    whole = CHUNK_BYTES // dtype.itemsize
    return next(lanes for lanes in (whole, 2, 1) if not any(number % lanes for number in (extent, *places)))
