"""Operators along one axis: the position of an extreme, running sums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call, infer_types
from cnnc.ir.graph import Value
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.axes import integers, normal_axis
from cnnc.ops.blocked import fixed, tensor
from cnnc.ops.broadcast import NUMBERS, check_dtypes, widen, working_dtype
from cnnc.ops.numeric import cast_to


@dataclass(frozen=True)
class _ArgExtreme(Op):
    """y = the position along an axis, as i64; the first of equals, or the last."""

    axis: int
    keepdims: bool = True
    select_last: bool = False
    kind = Kind.REDUCTION
    function: ClassVar[str]
    """The name in the vocabulary, and in numpy: argmax or argmin."""

    def infer(self, x: TensorType) -> TensorType:
        """Give x's shape with the axis left out, or 1 with keepdims."""
        check_dtypes(self.name, (x,), NUMBERS)
        if normal_axis(self.name, self.axis, x.rank) != self.axis:
            raise ShapeError(f"{self.name}: axis {self.axis} must not be negative")
        if x.shape[self.axis] == 0:
            raise ShapeError(f"{self.name}: axis {self.axis} of x : {x} has no elements")
        middle = [1] if self.keepdims else []
        return TensorType((*x.shape[: self.axis], *middle, *x.shape[self.axis + 1 :]), DType.I64)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Search in numpy, from the end for the last."""
        wide = np.flip(widen(x), self.axis) if self.select_last else widen(x)
        found = np.asarray(getattr(np, self.function)(wide, axis=self.axis, keepdims=self.keepdims))
        return x.shape[self.axis] - 1 - found if self.select_last else found

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce over the axis."""
        x = types[0]
        out = infer_types(self, tuple(types))[0]
        (size,) = fixed(self.name, x.shape[self.axis : self.axis + 1])
        position = te.reduce_axis(size, "position")

        def element(*index: Any) -> Any:
            tail = index[self.axis + (1 if self.keepdims else 0) :]
            value = te.at(xs[0], x, *index[: self.axis], position, *tail)
            return getattr(te, self.function)(value, [position], self.select_last)

        return [tensor(te, out, element, self.name)]

    def flops(self, x: TensorType) -> int:
        """Count one comparison for each element."""
        return x.elements

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show every axis, ties, NaN, a run-time batch, dtypes."""
        for axis, keepdims, last in ((0, True, False), (1, False, False), (2, True, True), (1, False, True)):
            yield Example(cls(axis, keepdims, last), (TensorType((3, 4, 5)),))
        yield Example(cls(0, False), (TensorType((7,)),))
        yield Example(cls(1), (TensorType((Dim.symbol("n", 3), 4)),))
        for dtype in (DType.I64, DType.I8, DType.F16):
            yield Example(cls(1), (TensorType((4, 20), dtype),))
            yield Example(cls(1, select_last=True), (TensorType((4, 20), dtype),))

        def with_nan(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
            return (rng.choice(np.array([1, 2, np.nan, np.inf, -np.inf], np.float32), (6, 5)),)

        yield Example(cls(1), (TensorType((6, 5)),), with_nan)


class ArgMax(_ArgExtreme):
    """y = the position of the largest; NaN counts as larger than everything."""

    function = "argmax"


class ArgMin(_ArgExtreme):
    """y = the position of the smallest; NaN counts as smaller than everything."""

    function = "argmin"


@dataclass(frozen=True)
class CumSum(Op):
    """y[i] = the sum of x[j] with j <= i (< i if exclusive; >= i or > i if reverse) along an axis."""

    axis: int
    exclusive: bool = False
    reverse: bool = False

    def infer(self, x: TensorType) -> TensorType:
        """Give x's type."""
        check_dtypes(self.name, (x,), NUMBERS)
        if normal_axis(self.name, self.axis, x.rank) != self.axis:
            raise ShapeError(f"cum_sum: axis {self.axis} must not be negative")
        return x

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Add up in numpy; floats in f64."""
        wide = x.astype(np.float64) if DType.of(x).is_float else x
        along = np.flip(wide, self.axis) if self.reverse else wide
        sums = np.cumsum(along, self.axis, dtype=wide.dtype)
        if self.exclusive:
            size = x.shape[self.axis]
            zero = np.zeros_like(np.take(sums, range(min(size, 1)), self.axis))
            sums = np.concatenate([zero, np.take(sums, range(max(size - 1, 0)), self.axis)], self.axis)
        return (np.flip(sums, self.axis) if self.reverse else sums).astype(x.dtype, copy=False)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Add up anew for each element: quadratic in the axis, but without a loop that carries a value."""
        x = types[0]
        wide = working_dtype(x.dtype)
        (size,) = fixed(self.name, x.shape[self.axis : self.axis + 1])
        at = te.reduce_axis(size, "j")

        def total(*index: Any) -> Any:
            here = index[self.axis]
            value = cast_to(te, te.at(xs[0], x, *index[: self.axis], at, *index[self.axis + 1 :]), x.dtype, wide)
            first, second = (here, at) if self.reverse else (at, here)
            counts = first < second if self.exclusive else first <= second
            return te.sum(te.select(counts, value, te.const(0, wide)), [at])

        sums = tensor(te, x.with_dtype(wide), total, f"{self.name}_wide")
        if wide is x.dtype:
            return [sums]
        return [tensor(te, x, lambda *i: te.cast(te.at(sums, x.with_dtype(wide), *i), x.dtype), self.name)]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show every axis and direction, no elements, a run-time batch, dtypes."""
        for exclusive in (False, True):
            for reverse in (False, True):
                yield Example(cls(1, exclusive, reverse), (TensorType((2, 5, 3)),))
                yield Example(cls(0, exclusive, reverse), (TensorType((6,), DType.I64),))
                yield Example(cls(1, exclusive, reverse), (TensorType((2, 0)),))
        yield Example(cls(1), (TensorType((Dim.symbol("n", 3), 4)),))
        yield Example(cls(0), (TensorType((5,), DType.F16),))


# ONNX


@onnx("ArgMax", "ArgMin")
def _arg_extreme(node: ForeignNode, x: Value) -> Value:
    op = ArgMax if node.op_type == "ArgMax" else ArgMin
    axis = normal_axis(node.op_type, node.attr("axis", 0), x.type.rank)
    return call(op(axis, bool(node.attr("keepdims", 1)), bool(node.attr("select_last_index", 0))), x)


@onnx("CumSum")
def _cum_sum(node: ForeignNode, x: Value, axis: Value) -> Value:
    chosen = integers(node.const(axis))
    if len(chosen) != 1:
        raise node.invalid(f"the axis must be one number, not {axis.type}")
    exclusive, reverse = bool(node.attr("exclusive", 0)), bool(node.attr("reverse", 0))
    return call(CumSum(normal_axis(node.op_type, chosen[0], x.type.rank), exclusive, reverse), x)
