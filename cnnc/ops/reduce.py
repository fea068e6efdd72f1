"""Reductions over axes: sum, mean, extremes, norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call, infer_types
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx, random_array
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.axes import integers, normal_axes
from cnnc.ops.blocked import channel_block, fixed, tensor
from cnnc.ops.broadcast import ANY, FLOATS, NUMBERS, check_dtypes, working_dtype
from cnnc.ops.cast import convert
from cnnc.ops.numeric import cast_to, highest, lowest


@dataclass(frozen=True)
class _Reduce(Op):
    """y = after(the combination of before(x[i]) over the reduced axes).

    A subclass gives the equation twice: `_numpy` on the whole array, and `_before`, `combine`, `_after` as
    expressions.  Sums of half precision run in f32; the reference sums floats in f64 and rounds once.  Integers wrap.
    """

    axes: tuple[int, ...]
    keepdims: bool = True
    kind = Kind.REDUCTION
    takes: ClassVar[frozenset[DType]] = FLOATS
    combine: ClassVar[str] = "sum"
    """The combining function: sum, prod, max or min."""

    def _numpy(self, x: np.ndarray, **over: Any) -> Any:
        """Reduce an array; `over` has numpy's `axis` and `keepdims`."""
        raise TypeError(f"{self.name} defines no numpy function")

    def _before(self, te: Any, dtype: DType, x: Any) -> Any:
        return x

    def _after(self, te: Any, dtype: DType, total: Any, count: int) -> Any:
        return total

    def infer(self, x: TensorType) -> TensorType:
        """Give x's shape with the reduced axes left out, or 1 with keepdims."""
        check_dtypes(self.name, (x,), self.takes)
        if normal_axes(self.name, self.axes, x.rank) != tuple(self.axes):
            raise ShapeError(f"{self.name}: axes {list(self.axes)} must be sorted and not negative")
        if self.keepdims:
            return x.with_shape([1 if i in self.axes else s for i, s in enumerate(x.shape)])
        return x.with_shape([s for i, s in enumerate(x.shape) if i not in self.axes])

    def infer_layout(self, x: TensorType) -> tuple[Layout | None, ...]:
        """Keep channel blocks where N and C are not reduced and no axis is dropped."""
        if x.layout is not None:
            channel_block(self.name, "x", x)
            if not self.keepdims or {0, 1} & set(self.axes):
                raise ShapeError(f"{self.name}: over axes {list(self.axes)} it takes a plain tensor, not x : {x}")
        return (x.layout,)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Reduce in numpy."""
        wide = x.astype(np.float64) if DType.of(x).is_float else x
        with np.errstate(all="ignore"):
            return np.asarray(self._numpy(wide, axis=self.axes, keepdims=self.keepdims)).astype(x.dtype, copy=False)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Combine over reduce axes in the working dtype, then finish each element."""
        x_type = types[0]
        out = infer_types(self, tuple(types))[0]
        extents = fixed(self.name, [x_type.shape[axis] for axis in self.axes])
        wide = DType.U8 if x_type.dtype is DType.BOOL else working_dtype(x_type.dtype)

        def before(*index: Any) -> Any:
            return self._before(te, wide, cast_to(te, te.at(xs[0], x_type, *index), x_type.dtype, wide))

        def finish(total: Any) -> Any:
            return cast_to(te, self._after(te, wide, total, int(np.prod(extents))), wide, out.dtype)

        if 0 in extents:
            nothing = type(self)((0,)).reference(np.zeros(0, x_type.dtype.numpy)).item()
            return [tensor(te, out, lambda *_: te.const(nothing, out.dtype), self.name)]
        if not self.axes:
            return [tensor(te, out, lambda *index: finish(before(*index)), self.name)]
        totals = self._reduction(te, self.combine, before, x_type.with_dtype(wide), out.with_dtype(wide))
        return [tensor(te, out, lambda *i: finish(te.at(totals, out.with_dtype(wide), *i)), self.name)]

    def _reduction(self, te: Any, combine: str, element: Any, x: TensorType, out: TensorType) -> Any:
        """Combine `element(*index)` over the reduced axes into a tensor of type `out`."""
        extents = {axis: te.reduce_axis(x.static_shape[axis], f"r{axis}") for axis in self.axes}

        def combined(*index: Any) -> Any:
            value = element(*self._merge(index, extents, x.rank))
            return getattr(te, combine)(value, list(extents.values()))

        return tensor(te, out, combined, f"{self.name}_{combine}", guard=False)

    def _merge(self, index: Sequence[Any], reduced: dict[int, Any], rank: int) -> list[Any]:
        """Give the input's index from an output index and indices of the reduced axes."""
        if self.keepdims:
            return [reduced.get(axis, index[axis]) for axis in range(rank)]
        kept = iter(index)
        return [reduced[axis] if axis in reduced else next(kept) for axis in range(rank)]

    def flops(self, x: TensorType) -> int:
        """Count one operation for each input element."""
        return x.elements

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show one, several, all and no axes, 0-d, a run-time batch, channel blocks, no elements, other dtypes."""
        x = TensorType((2, 5, 3, 7))
        for axes in ((1,), (0, 3), (2, 3), (0, 1, 2, 3), ()):
            for keepdims in (True, False):
                yield cls._example(cls(axes, keepdims), x)
        yield cls._example(cls((), False), TensorType(()))
        yield cls._example(cls((1,)), TensorType((Dim.symbol("n", 3), 4)))
        yield cls._example(cls((2, 3)), x.with_layout(Layout("NCHW4c")))
        yield cls._example(cls((3,)), x.with_layout(Layout("NCHW4c")))
        yield cls._example(cls((0,)), TensorType((0, 3)))
        yield cls._example(cls((1,)), TensorType((0, 3)))
        for dtype in (DType.F64, DType.F16, DType.I64, DType.I32, DType.U8, DType.BOOL):
            if dtype in cls.takes:
                yield cls._example(cls((1,)), TensorType((3, 5), dtype))

    @classmethod
    def _example(cls, op: Op, type_: TensorType) -> Example:
        return Example(op, (type_,))


class ReduceSum(_Reduce):
    """y = the sum; 0 of nothing."""

    takes = NUMBERS

    def _numpy(self, x: np.ndarray, **over: Any) -> Any:
        return np.sum(x, dtype=x.dtype, **over)


class ReduceMean(_Reduce):
    """y = the sum / the count; NaN of nothing."""

    def _numpy(self, x: np.ndarray, **over: Any) -> Any:
        total = np.sum(x, **over)
        return total / np.float64(np.prod([x.shape[axis] for axis in self.axes], dtype=np.int64))

    def _after(self, te: Any, dtype: DType, total: Any, count: int) -> Any:
        return total / te.const(count, dtype)


class ReduceProd(_Reduce):
    """y = the product; 1 of nothing."""

    takes = NUMBERS
    combine = "prod"

    def _numpy(self, x: np.ndarray, **over: Any) -> Any:
        return np.prod(x, dtype=x.dtype, **over)


class ReduceMax(_Reduce):
    """y = the largest, NaN if any is; the smallest number of the dtype (-infinity, false) of nothing."""

    takes = ANY
    combine = "max"

    def _numpy(self, x: np.ndarray, **over: Any) -> Any:
        return np.max(x, initial=False if x.dtype == bool else lowest(DType.of(x)), **over)


class ReduceMin(_Reduce):
    """y = the smallest, NaN if any is; the largest number of the dtype (infinity, true) of nothing."""

    takes = ANY
    combine = "min"

    def _numpy(self, x: np.ndarray, **over: Any) -> Any:
        return np.min(x, initial=True if x.dtype == bool else highest(DType.of(x)), **over)


class ReduceL1(_Reduce):
    """y = the sum of |x|."""

    takes = NUMBERS - {DType.U8}

    def _numpy(self, x: np.ndarray, **over: Any) -> Any:
        return np.sum(np.abs(x), dtype=x.dtype, **over)

    def _before(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.abs(x)


class ReduceL2(_Reduce):
    """y = sqrt(the sum of x^2)."""

    def _numpy(self, x: np.ndarray, **over: Any) -> Any:
        return np.sqrt(np.sum(x * x, **over))

    def _before(self, te: Any, dtype: DType, x: Any) -> Any:
        return x * x

    def _after(self, te: Any, dtype: DType, total: Any, count: int) -> Any:
        return te.sqrt(total)


class ReduceSumSquare(_Reduce):
    """y = the sum of x^2."""

    takes = NUMBERS

    def _numpy(self, x: np.ndarray, **over: Any) -> Any:
        return np.sum(x * x, dtype=x.dtype, **over)

    def _before(self, te: Any, dtype: DType, x: Any) -> Any:
        return x * x


class ReduceLogSum(_Reduce):
    """y = log(the sum)."""

    def _numpy(self, x: np.ndarray, **over: Any) -> Any:
        return np.log(np.sum(x, **over))

    def _after(self, te: Any, dtype: DType, total: Any, count: int) -> Any:
        return te.log(total)

    @classmethod
    def _example(cls, op: Op, type_: TensorType) -> Example:
        return Example(op, (type_,), lambda rng: (np.abs(random_array(rng, type_)) + type_.dtype.numpy.type(0.25),))


class ReduceLogSumExp(_Reduce):
    """y = log(the sum of e^x) = m + log(the sum of e^(x - m)) with m the largest, so that nothing overflows."""

    def _numpy(self, x: np.ndarray, **over: Any) -> Any:
        largest = np.max(x, axis=over["axis"], keepdims=True, initial=-np.inf)
        shift = np.where(np.isfinite(largest), largest, 0)
        total = np.log(np.sum(np.exp(x - shift), **over))
        return total + shift.reshape(total.shape)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Find the largest, then sum."""
        x_type = types[0]
        out = infer_types(self, tuple(types))[0]
        if not self.axes or 0 in fixed(self.name, [x_type.shape[axis] for axis in self.axes]):
            return super().compute(te, xs, types)
        wide = working_dtype(x_type.dtype)
        wide_out = out.with_dtype(wide)

        def read(*index: Any) -> Any:
            return cast_to(te, te.at(xs[0], x_type, *index), x_type.dtype, wide)

        largest = self._reduction(te, "max", read, x_type.with_dtype(wide), wide_out)

        def shift(*index: Any) -> Any:
            m = te.at(largest, wide_out, *index)
            return te.select(te.abs(m) < te.const(np.inf, wide), m, te.const(0, wide))

        def term(*index: Any) -> Any:
            return te.exp(read(*index) - shift(*self._output_index(index)))

        totals = self._reduction(te, "sum", term, x_type.with_dtype(wide), wide_out)

        def finish(*index: Any) -> Any:
            y = te.log(te.at(totals, wide_out, *index)) + shift(*index)
            return cast_to(te, y, wide, out.dtype)

        return [tensor(te, out, finish, self.name)]

    def _output_index(self, index: Sequence[Any]) -> list[Any]:
        if self.keepdims:
            return [0 if axis in self.axes else i for axis, i in enumerate(index)]
        return [i for axis, i in enumerate(index) if axis not in self.axes]


# ONNX

_REDUCTIONS: dict[str, type[_Reduce]] = {
    op.__name__: op
    for op in (
        *(ReduceSum, ReduceMean, ReduceProd, ReduceMax, ReduceMin),
        *(ReduceL1, ReduceL2, ReduceSumSquare, ReduceLogSum, ReduceLogSumExp),
    )
}


@onnx(*_REDUCTIONS)
def _reduce(node: ForeignNode, x: Value, axes: Value | None = None) -> Value:
    op = _REDUCTIONS[node.op_type]
    chosen = node.attr("axes", ()) if axes is None else integers(node.const(axes))
    # Read in any case: where axes are given, it says nothing.
    keep_all = node.attr("noop_with_empty_axes", 0)
    if not chosen and not keep_all:
        chosen = range(x.type.rank)
    reduction = op(normal_axes(node.op_type, chosen, x.type.rank), bool(node.attr("keepdims", 1)))
    if x.dtype.is_integer and x.dtype not in op.takes:
        # As ONNX's own reference does: in f64, then truncated.
        return convert(call(reduction, convert(x, DType.F64)), x.dtype)
    return call(reduction, x)
