"""Comparisons, logic, and the choice between two tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, ForeignNode, Op, onnx
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.binary import _Binary
from cnnc.ops.broadcast import ANY, BOOLS, _Elementwise, check_dtypes


class _Comparison(_Binary):
    """y = a ? b as bool; comparisons with NaN are false."""

    gives = DType.BOOL


class Equal(_Comparison):
    """y = whether a = b."""

    takes = ANY

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a == b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        if dtype is DType.BOOL:
            return te.logical_or(te.logical_and(a, b), te.logical_not(te.logical_or(a, b)))
        return a == b


class Less(_Comparison):
    """y = whether a < b."""

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a < b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return a < b


class LessEqual(_Comparison):
    """y = whether a <= b."""

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a <= b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return a <= b


class Greater(_Comparison):
    """y = whether a > b."""

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a > b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return a > b


class GreaterEqual(_Comparison):
    """y = whether a >= b."""

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a >= b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return a >= b


class And(_Binary):
    """y = a and b."""

    takes = BOOLS

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a & b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return te.logical_and(a, b)


class Or(_Binary):
    """y = a or b."""

    takes = BOOLS

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a | b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return te.logical_or(a, b)


class Xor(_Binary):
    """y = either a or b."""

    takes = BOOLS

    def _numpy(self, a: np.ndarray, b: np.ndarray) -> Any:
        return a ^ b

    def _expression(self, te: Any, dtype: DType, a: Any, b: Any) -> Any:
        return te.logical_and(te.logical_or(a, b), te.logical_not(te.logical_and(a, b)))


class Where(_Elementwise):
    """y = a where the condition holds, else b; all three broadcast."""

    takes = ANY

    def infer(self, cond: TensorType, a: TensorType, b: TensorType) -> TensorType:
        """Broadcast the shapes; the condition is bool, a and b have one dtype."""
        return self._infer(cond, a, b)

    def _check(self, types: Any) -> DType:
        cond, a, b = types
        if cond.dtype is not DType.BOOL:
            raise ShapeError(f"where: the condition is bool, not x : {cond}")
        check_dtypes(self.name, (a, b), self.takes)
        dtype: DType = a.dtype
        return dtype

    def _numpy(self, cond: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
        return np.where(cond, a, b)

    def _expression(self, te: Any, dtype: DType, cond: Any, a: Any, b: Any) -> Any:
        return te.select(cond, a, b)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show broadcasting of each input, dtypes, no elements, a run-time batch and a blocked layout."""
        boolean = DType.BOOL
        batch = Dim.symbol("n", 3)
        blocked = Layout("NCHW4c")
        shapes: tuple[tuple[tuple[Any, ...], ...], ...] = (
            ((2, 5, 3), (2, 5, 3), (2, 5, 3)),
            ((5, 1), (2, 1, 3), ()),
            ((), (4,), (3, 1)),
            ((0, 2), (2,), (1, 1)),
            ((batch, 1), (batch, 4), (4,)),
        )
        for cond, a, b in shapes:
            yield Example(cls(), (TensorType(cond, boolean), TensorType(a), TensorType(b)))
        for dtype in (DType.F64, DType.F16, DType.I64, DType.U8, boolean):
            yield Example(cls(), (TensorType((3, 5), boolean), TensorType((3, 1), dtype), TensorType((5,), dtype)))
        x = TensorType((2, 5, 3, 7), DType.F32, blocked)
        yield Example(cls(), (x.with_dtype(boolean), x, TensorType((1, 1, 1, 1))))
        yield Example(cls(), (TensorType((1, 1, 3, 7), boolean), x, x))


# ONNX

_SAME: dict[str, type[Op]] = {op.__name__: op for op in (Equal, Less, Greater, And, Or, Xor, Where)}
_SAME |= {"LessOrEqual": LessEqual, "GreaterOrEqual": GreaterEqual}


@onnx(*_SAME)
def _same(node: ForeignNode, *xs: Value) -> Value:
    return call(_SAME[node.op_type](), *xs)
