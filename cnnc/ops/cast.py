"""Conversion between element types."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, ForeignNode, onnx, random_array
from cnnc.ir.types import DType, TensorType
from cnnc.ops.broadcast import ANY, _Elementwise, working_dtype
from cnnc.ops.numeric import cast_to


@dataclass(frozen=True)
class Cast(_Elementwise):
    """y = x in another dtype.

    To floats: rounded to nearest, even of two (to half precision by way of f32); too large becomes infinity.
    Floats to integers: truncated toward zero; too large becomes the nearest integer there is, and NaN becomes 0
    (ONNX leaves both open).  Integers to integers: the low bits.  To bool: x != 0 (so NaN is true).  From bool:
    0 or 1.
    """

    dtype: DType
    takes = ANY

    def infer(self, x: TensorType) -> TensorType:
        """Give x's shape."""
        return self._infer(x)

    def _check(self, types: Any) -> DType:
        return self.dtype

    def _numpy(self, x: np.ndarray) -> Any:
        if self.dtype is DType.BOOL:
            return x != 0
        if not self.dtype.is_integer or not DType.of(x).is_float:
            return x.astype(working_dtype(self.dtype).numpy)
        info = np.iinfo(self.dtype.numpy)
        # The bounds -2^k and 2^k are exact in every float type, the largest integer 2^k - 1 is not.
        inside = (x >= float(info.min)) & (x < float(info.max + 1))
        y = np.where(inside, x, 0).astype(self.dtype.numpy)
        y = np.where(x >= float(info.max + 1), self.dtype.numpy.type(info.max), y)
        return np.where(x < float(info.min), self.dtype.numpy.type(info.min), y)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        if self.dtype is DType.BOOL:
            differs = x != te.const(0, dtype)
            # TVM's != is false for NaN.
            return te.logical_or(differs, te.isnan(x)) if dtype.is_float else differs
        y = cast_to(te, x, dtype, working_dtype(self.dtype))
        if not self.dtype.is_integer or not dtype.is_float:
            return y
        info = np.iinfo(self.dtype.numpy)
        y = te.select(x >= float(info.max + 1), te.const(int(info.max), self.dtype), y)
        y = te.select(x < float(info.min), te.const(int(info.min), self.dtype), y)
        return te.select(te.isnan(x), te.const(0, self.dtype), y)

    def flops(self, x: TensorType) -> int:
        """No arithmetic: a kernel that widens its weights does no more of it."""
        return 0

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show every pair of dtypes on values that overflow, and a blocked layout."""
        for source in DType:
            for target in DType:
                if source is not target:
                    yield cls._example(target, TensorType((4, 9), source))
        yield cls._example(DType.I32, TensorType((2, 5, 3, 7), DType.F32, Layout("NCHW4c")))
        yield cls._example(DType.F16, TensorType((), DType.F32))

    @classmethod
    def _example(cls, target: DType, type_: TensorType) -> Example:
        def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
            x = random_array(rng, type_)
            if type_.dtype.is_float:
                with np.errstate(over="ignore"):
                    x = (x.astype(np.float64) * rng.choice([1, 30, 1e3, 1e5, 1e10, 1e20, 0], x.shape)).astype(x.dtype)
            elif type_.dtype.is_integer:
                info = np.iinfo(x.dtype)
                x = rng.integers(info.min, info.max, x.shape, dtype=x.dtype, endpoint=True)
            return (x,)

        return Example(cls(target), (type_,), draw)


def convert(x: Value, dtype: DType) -> Value:
    """Cast to a dtype; x itself where it has it already."""
    return x if x.dtype is dtype else call(Cast(dtype), x)


# ONNX

ONNX_DTYPES = {
    1: DType.F32,
    2: DType.U8,
    3: DType.I8,
    6: DType.I32,
    7: DType.I64,
    9: DType.BOOL,
    10: DType.F16,
    11: DType.F64,
    16: DType.BF16,
}
"""`onnx.TensorProto.DataType` numbers."""


def onnx_dtype(node: ForeignNode, number: int) -> DType:
    """Give the dtype of an ONNX number; raises the node's `unsupported` for one cnnc does not have."""
    if number not in ONNX_DTYPES:
        raise node.unsupported(f"element type {number} of ONNX is not compiled (only {', '.join(DType)})")
    return ONNX_DTYPES[number]


@onnx("Cast")
def _cast(node: ForeignNode, x: Value) -> Value:
    if node.attr("to") is None:
        raise node.invalid("the attribute `to` is missing")
    dtype = onnx_dtype(node, node.attr("to"))
    _read_fp8_attributes(node)
    return convert(x, dtype)


@onnx("CastLike")
def _cast_like(node: ForeignNode, x: Value, like: Value) -> Value:
    _read_fp8_attributes(node)
    return convert(x, like.dtype)


def _read_fp8_attributes(node: ForeignNode) -> None:
    """Take note of the attributes that matter for 8-bit floats only, which cnnc does not have."""
    node.attr("saturate", 1)
    node.attr("round_mode", "up")
