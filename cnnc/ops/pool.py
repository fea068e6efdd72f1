"""Pooling over sliding windows: maximum, minimum, average and p-norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx
from cnnc.ir.types import Dim, DType, TensorType, upper_bound
from cnnc.ops.blocked import channel_block, channel_layout, every, fixed, flat_index, tensor
from cnnc.ops.broadcast import widen, working_dtype
from cnnc.ops.numeric import cast_to, check_floats, highest, lowest, narrow
from cnnc.ops.window import Window, read_window


@dataclass(frozen=True)
class _Pool(Op):
    """The fields of all pools, and what they share."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    kind: ClassVar[Kind] = Kind.REDUCTION

    @property
    def window(self) -> Window:
        """The windows."""
        return Window(self.kernel, self.stride, self.pad, self.dilation)

    def _infer(self, x: TensorType) -> TensorType:
        self.window.check(self.name, x)
        sizes = self.window.output(self.name, x.shape[2:], self.ceil_mode)
        self.window.check_no_empty(self.name, x.shape[2:])
        return x.with_shape((*x.shape[:2], *sizes))

    def infer(self, x: TensorType) -> TensorType | tuple[TensorType, ...]:
        """Give [N,C,...]; raises `ShapeError` for windows that do not fit or could hold nothing but padding."""
        return self._infer(x)

    def infer_layout(self, x: TensorType) -> tuple[Layout | None, ...]:
        """Keep the layout, which is plain or has channels in blocks."""
        return (channel_layout(x.rank, channel_block(self.name, "x", x)),) * self.outputs

    def flops(self, x: TensorType) -> int:
        """Count one for each element of each window."""
        return self._infer(x).elements * math.prod(self.kernel)

    def _sizes(self, x: TensorType) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Give the spatial sizes of the input and the output."""
        return fixed(self.name, x.shape[2:]), fixed(self.name, self._infer(x).shape[2:])

    def _seen(self, x: np.ndarray, value: float | int) -> Iterator[np.ndarray]:
        """Give what each tap reads, `value` where that is padding."""
        sizes = fixed(self.name, self._infer(TensorType(x.shape, DType.of(x))).shape[2:])
        padded = self.window.padded(x, sizes, value)
        for tap in self.window.taps():
            yield self.window.tap_view(padded, tap, sizes)

    def _taps(self, te: Any) -> list[Any]:
        return [te.reduce_axis(k, f"k{i}") for i, k in enumerate(self.kernel)]

    def _read(self, te: Any, x: Any, type_: TensorType, index: Sequence[Any], taps: Sequence[Any], pad: Any) -> Any:
        """Write what a tap of a window reads; `pad` stands for padding."""
        where = self.window.position(index[2:], taps)
        conditions = self.window.in_bounds(where, *self._sizes(type_))
        value = te.at(x, type_, *index[:2], *where)
        return te.where(every(te, conditions), value, pad) if conditions else value

    @classmethod
    def _windows(cls) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
        """Give fields and input shapes: plain, asymmetric, dilated, hanging over, 1-D, 3-D, empty."""
        one, none = (1, 1), (0, 0, 0, 0)
        yield {"kernel": (2, 2), "stride": (2, 2), "pad": none, "dilation": one}, (2, 3, 8, 7)
        yield {"kernel": (3, 3), "stride": (2, 2), "pad": (1, 1, 1, 1), "dilation": one}, (1, 5, 9, 10)
        yield {"kernel": (3, 2), "stride": (1, 3), "pad": (2, 0, 1, 1), "dilation": one}, (1, 2, 5, 11)
        yield {"kernel": (2, 3), "stride": (2, 1), "pad": (1, 2, 0, 3), "dilation": (3, 2)}, (1, 2, 9, 8)
        yield {"kernel": (3, 3), "stride": (2, 2), "pad": none, "dilation": one, "ceil_mode": True}, (1, 2, 8, 6)
        yield (
            {"kernel": (2, 3), "stride": (3, 2), "pad": (1, 1, 0, 1), "dilation": one, "ceil_mode": True},
            (2, 1, 8, 9),
        )
        yield {"kernel": (4,), "stride": (3,), "pad": (1, 2), "dilation": (1,)}, (2, 3, 13)
        yield (
            {"kernel": (1, 2, 3), "stride": (1, 2, 2), "pad": (0, 1, 0, 0, 0, 2), "dilation": (1, 1, 1)},
            (1, 2, 3, 5, 6),
        )
        yield {"kernel": (2, 2), "stride": one, "pad": none, "dilation": one}, (0, 2, 4, 4)

    @classmethod
    def _examples(cls, dtypes: Iterable[DType], *variants: dict[str, Any]) -> Iterator[Example]:
        """Give every window with one variant of the other fields, then every variant in other dtypes and layouts."""
        for number, (fields, shape) in enumerate(cls._windows()):
            yield Example(cls(**fields, **variants[number % len(variants)]), (TensorType(shape),))
        fields = {"kernel": (3, 3), "stride": (2, 2), "pad": (1, 0, 1, 2), "dilation": (1, 1)}
        for variant in variants:
            for dtype in dtypes:
                yield Example(cls(**fields, **variant), (TensorType((1, 2, 7, 6), dtype),))
            yield Example(cls(**fields, **variant), (TensorType((2, 5, 7, 6), DType.F32, Layout("NCHW4c")),))
            yield Example(cls(**fields, **variant), (TensorType((Dim.symbol("n", 3), 2, 7, 6)),))


class _Extreme(_Pool):
    """What the maximum and the minimum share: padding never wins, NaN always does."""

    def _extreme(self, te: Any, x: Any, type_: TensorType, least: float | int, reduce: Any, name: str) -> Any:
        out = self._infer(type_).with_layout(type_.layout)
        taps = self._taps(te)
        padding = te.const(least, type_.dtype)
        return tensor(te, out, lambda *i: reduce(self._read(te, x, type_, i, taps, padding), taps), name, guard=False)


@dataclass(frozen=True)
class MaxPool(_Extreme):
    """Take the maximum of each window; padding does not count (it is -inf, not 0).

    y[n,c,p] = max over k of x[n, c, p*stride - pad + k*dilation]

    With `with_indices` a second output, i64, says where the maximum is: the position in the whole of x, flattened
    row by row, the first one of equals; with `column_major` the position in an image counts column by column.
    """

    with_indices: bool = False
    column_major: bool = False

    @property
    def outputs(self) -> int:
        """One, or two with indices."""
        return 1 + self.with_indices

    def infer(self, x: TensorType) -> TensorType | tuple[TensorType, ...]:
        """Give the maxima [N,C,...] and, if asked for, their positions as i64."""
        _check_ordered(self.name, x)
        out = self._infer(x)
        return (out, out.with_dtype(DType.I64)) if self.with_indices else out

    def reference(self, x: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]:
        """Take the maximum over the taps."""
        y = narrow(np.maximum.reduce(list(self._seen(x, lowest(DType.of(x))))), x)
        return (y, self._reference_indices(x, y)) if self.with_indices else y

    def _reference_indices(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Find the first position in each window that holds the maximum (or is NaN)."""
        spatial = x.shape[2:]
        nowhere = math.prod(spatial)
        positions = np.broadcast_to(np.arange(nowhere).reshape(spatial), x.shape)
        values = self._seen(x, lowest(DType.of(x)))
        first = np.full(y.shape, nowhere)
        for value, position in zip(values, self._seen(positions, nowhere), strict=True):
            hit = (value == y) | (value != value)
            first = np.minimum(first, np.where(hit, position, nowhere))
        if self.column_major:
            first = np.ravel_multi_index(np.unravel_index(first, spatial)[::-1], spatial[::-1])
        images = np.arange(math.prod(x.shape[:2])).reshape(*x.shape[:2], *(1,) * len(spatial))
        return np.asarray(images * nowhere + first, np.int64)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce over the taps; positions are the least of those that hold the maximum."""
        y = self._extreme(te, xs[0], types[0], lowest(types[0].dtype), te.max, "max_pool")
        return [y, self._indices(te, xs[0], y, types[0])] if self.with_indices else [y]

    def _indices(self, te: Any, x: Any, y: Any, type_: TensorType) -> Any:
        spatial = fixed(self.name, type_.shape[2:])
        out = self._infer(type_).with_layout(type_.layout)
        indices = out.with_dtype(DType.I64)
        nowhere = te.const(math.prod(spatial), DType.I64)
        taps = self._taps(te)
        lane = [] if type_.layout is None else [type_.static_shape[1]]

        def candidate(*index: Any) -> Any:
            where = self.window.position(index[2:], taps)
            value = te.at(x, type_, *index[:2], *where)
            largest = te.at(y, out, *index)
            is_it = te.logical_or(value == largest, te.isnan(value)) if type_.dtype.is_float else value == largest
            position = te.select(is_it, te.cast(flat_index(where, spatial), DType.I64), nowhere)
            conditions = self.window.in_bounds(where, *self._sizes(type_)) + [index[1] < c for c in lane]
            return te.min(te.where(every(te, conditions), position, nowhere) if conditions else position, taps)

        first = tensor(te, indices, candidate, "max_pool_first", guard=False)

        def whole(*index: Any) -> Any:
            position = te.at(first, indices, *index)
            if self.column_major:
                position = _transposed(te, position, spatial)
            image = te.cast(flat_index(index[:2], type_.static_shape[:2]), DType.I64)
            return image * nowhere + position

        return tensor(te, indices, whole, "max_pool_indices")

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give all windows with and without indices."""
        dtypes = (DType.F64, DType.F16, DType.I8, DType.U8)
        return cls._examples(dtypes, {}, {"with_indices": True}, {"with_indices": True, "column_major": True})


def _transposed(te: Any, position: Any, spatial: Sequence[int]) -> Any:
    """Write the column-major position for a row-major one."""
    result: Any = te.const(0, DType.I64)
    for axis, size in enumerate(spatial):
        after = te.const(math.prod(spatial[axis + 1 :]), DType.I64)
        coordinate = te.floormod(te.floordiv(position, after), te.const(size, DType.I64))
        result = result + coordinate * te.const(math.prod(spatial[:axis]), DType.I64)
    return result


@dataclass(frozen=True)
class MinPool(_Extreme):
    """Take the minimum of each window; padding does not count.

    y[n,c,p] = min over k of x[n, c, p*stride - pad + k*dilation]
    """

    def infer(self, x: TensorType) -> TensorType:
        """Give the minima [N,C,...]."""
        _check_ordered(self.name, x)
        return self._infer(x)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Take the minimum over the taps."""
        return narrow(np.minimum.reduce(list(self._seen(x, highest(DType.of(x))))), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce over the taps."""
        return [self._extreme(te, xs[0], types[0], highest(types[0].dtype), te.min, "min_pool")]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give all windows."""
        return cls._examples((DType.F64, DType.F16, DType.I8, DType.U8), {})


def _check_ordered(name: str, x: TensorType) -> None:
    if x.dtype is DType.BOOL:
        raise ShapeError(f"{name}: takes numbers, not x : {x}")


@dataclass(frozen=True)
class AveragePool(_Pool):
    """Take the mean of each window.

    y[n,c,p] = (sum over k of x[n, c, p*stride - pad + k*dilation]) / count

    The count is of elements inside the input; with `count_include_pad` also of those in the padding, but never of
    what hangs over the padded input with `ceil_mode`.
    """

    count_include_pad: bool = False

    def infer(self, x: TensorType) -> TensorType:
        """Give the means [N,C,...]."""
        check_floats(self.name, x=x)
        return self._infer(x)

    def counts(self, x: TensorType) -> tuple[np.ndarray, ...]:
        """Give, for each spatial axis, how many taps of each window count; their products are the divisors."""
        spatial, output = self._sizes(x)
        result = []
        for axis, (size, count) in enumerate(zip(spatial, output, strict=True)):
            low, high = 0, size
            if self.count_include_pad:
                low, high = -self.window.begin[axis], size + self.window.end[axis]
            starts = np.arange(count)[:, None] * self.stride[axis] - self.window.begin[axis]
            taps = starts + np.arange(self.kernel[axis]) * self.dilation[axis]
            result.append(((taps >= low) & (taps < high)).sum(axis=1))
        return tuple(result)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Add up the taps and divide by the counts."""
        total: Any = sum(self._seen(widen(x), 0))
        for axis, counts in enumerate(self.counts(TensorType(x.shape, DType.of(x)))):
            total = total / counts.astype(total.dtype).reshape(-1, *(1,) * (len(self.kernel) - axis - 1))
        return narrow(total, x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce over the taps, then divide."""
        x_type = types[0]
        out = self._infer(x_type).with_layout(x_type.layout)
        wide = working_dtype(x_type.dtype)
        taps = self._taps(te)
        zero = te.const(0, x_type.dtype)

        def total(*index: Any) -> Any:
            return te.sum(cast_to(te, self._read(te, xs[0], x_type, index, taps, zero), x_type.dtype, wide), taps)

        sums = tensor(te, out.with_dtype(wide), total, "average_pool_sum", guard=False)

        def mean(*index: Any) -> Any:
            value = te.at(sums, out.with_dtype(wide), *index)
            return cast_to(te, self._divide(te, value, wide, x_type, index[2:]), wide, out.dtype)

        return [tensor(te, out, mean, "average_pool", guard=False)]

    def _divide(self, te: Any, value: Any, dtype: DType, x: TensorType, index: Sequence[Any]) -> Any:
        """Write the division by the counts: by one constant where all windows are whole."""
        counts = self.counts(x)
        if all((c == k).all() for c, k in zip(counts, self.kernel, strict=True)):
            return value / te.const(math.prod(self.kernel), dtype)
        divisor: Any = 1
        for axis, per_window in enumerate(counts):
            divisor = divisor * self._count(te, x, axis, index[axis], per_window)
        return value / te.cast(divisor, dtype)

    def _count(self, te: Any, x: TensorType, axis: int, index: Any, per_window: np.ndarray) -> Any:
        """Write how many taps count along an axis: ceil(high / d) - ceil(low / d), clipped to the kernel."""
        if per_window.size == 0 or (per_window == per_window[0]).all():
            return int(per_window[0]) if per_window.size else 1
        begin, step, kernel = self.window.begin[axis], self.dilation[axis], self.kernel[axis]
        start = index * self.stride[axis] - begin
        low, high = 0, upper_bound(x.shape[axis + 2])
        if self.count_include_pad:
            low, high = -begin, high + self.window.end[axis]
        first = te.maximum(te.floordiv(low - start + step - 1, step), 0)
        last = te.minimum(te.floordiv(high - start + step - 1, step), kernel)
        return last - first

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give all windows, with the padding counted and not."""
        return cls._examples((DType.F64, DType.F16), {}, {"count_include_pad": True})


@dataclass(frozen=True)
class LpPool(_Pool):
    """Take the p-norm of each window; padding is 0.

    y[n,c,q] = (sum over k of |x[n, c, q*stride - pad + k*dilation]|^p) ^ (1/p)
    """

    p: int = 2

    def infer(self, x: TensorType) -> TensorType:
        """Give the norms [N,C,...]."""
        check_floats(self.name, x=x)
        if self.p < 1:
            raise ShapeError(f"{self.name}: p={self.p} must be at least 1")
        return self._infer(x)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Add up the powers of the taps."""
        total: Any = sum(np.abs(seen) ** self.p for seen in self._seen(widen(x), 0))
        return narrow(total ** (1 / self.p), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce the powers over the taps, then take the root."""
        x_type = types[0]
        out = self._infer(x_type).with_layout(x_type.layout)
        wide = working_dtype(x_type.dtype)
        taps = self._taps(te)
        zero = te.const(0, x_type.dtype)

        def total(*index: Any) -> Any:
            read = cast_to(te, self._read(te, xs[0], x_type, index, taps, zero), x_type.dtype, wide)
            return te.sum(power(te, te.abs(read), self.p, wide), taps)

        sums = tensor(te, out.with_dtype(wide), total, "lp_pool_sum", guard=False)

        def norm(*index: Any) -> Any:
            return cast_to(te, root(te, te.at(sums, out.with_dtype(wide), *index), self.p, wide), wide, out.dtype)

        return [tensor(te, out, norm, "lp_pool", guard=False)]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give all windows, for p of 1, 2 and 3."""
        return cls._examples((DType.F64, DType.F16), {"p": 1}, {"p": 2}, {"p": 3})


def power(te: Any, value: Any, p: int, dtype: DType) -> Any:
    """Write value^p for a value that is not negative."""
    if p == 1:
        return value
    return value * value if p == 2 else te.pow(value, te.const(p, dtype))


def root(te: Any, value: Any, p: int, dtype: DType) -> Any:
    """Write value^(1/p)."""
    if p == 1:
        return value
    return te.sqrt(value) if p == 2 else te.pow(value, te.const(1 / p, dtype))


def _read_fields(node: ForeignNode, x: Value) -> dict[str, Any]:
    """Read what all ONNX pools have."""
    if not 3 <= len(x.shape) <= 5:
        raise node.unsupported(f"pooling of {x.type}; one to three spatial axes are compiled")
    kernel = tuple(node.attr("kernel_shape", ()))
    if not kernel:
        raise node.invalid("kernel_shape is missing")
    window = read_window(node, x.shape[2:], kernel)
    same = str(node.attr("auto_pad", "NOTSET")).startswith("SAME")
    return {
        "kernel": window.kernel,
        "stride": window.stride,
        "pad": window.pad,
        "dilation": window.dilation,
        # SAME pads so that nothing hangs over; where windows leave gaps, rounding up would add one.
        "ceil_mode": bool(node.attr("ceil_mode", 0)) and not same,
    }


@onnx("MaxPool")
def _max_pool(node: ForeignNode, x: Value) -> Any:
    fields = _read_fields(node, x)
    column_major = bool(node.attr("storage_order", 0))
    if node.outputs == 1:
        return call(MaxPool(**fields), x)
    return call(MaxPool(**fields, with_indices=True, column_major=column_major), x).node.values


@onnx("AveragePool")
def _average_pool(node: ForeignNode, x: Value) -> Value:
    include = bool(node.attr("count_include_pad", 0))
    return call(AveragePool(**_read_fields(node, x), count_include_pad=include), x)


@onnx("LpPool")
def _lp_pool(node: ForeignNode, x: Value) -> Value:
    return call(LpPool(**_read_fields(node, x), p=node.attr("p", 2)), x)


def _spatial_axes(node: ForeignNode, x: Value) -> tuple[int, ...]:
    if len(x.shape) < 2:
        raise node.invalid(f"global pooling needs N, C and spatial axes, not {x.type}")
    return tuple(range(2, len(x.shape)))


@onnx("GlobalAveragePool")
def _global_average_pool(node: ForeignNode, x: Value) -> Value:
    from cnnc.ops.reduce import ReduceMean

    return call(ReduceMean(_spatial_axes(node, x), keepdims=True), x)


@onnx("GlobalMaxPool")
def _global_max_pool(node: ForeignNode, x: Value) -> Value:
    from cnnc.ops.reduce import ReduceMax

    return call(ReduceMax(_spatial_axes(node, x), keepdims=True), x)


@onnx("GlobalLpPool")
def _global_lp_pool(node: ForeignNode, x: Value) -> Value:
    spatial = x.shape[2:]
    if node.attr("p", 2) in (1, 2):
        from cnnc.ops.reduce import ReduceL1, ReduceL2

        reduction = ReduceL1 if node.attr("p", 2) == 1 else ReduceL2
        return call(reduction(_spatial_axes(node, x), keepdims=True), x)
    if not 1 <= len(spatial) <= 3 or not all(isinstance(s, int) for s in spatial):
        raise node.unsupported(f"the p-norm over {x.type}; one to three spatial axes of fixed size are compiled")
    ones, none = (1,) * len(spatial), (0,) * (2 * len(spatial))
    return call(LpPool(fixed("lp_pool", spatial), ones, none, ones, p=node.attr("p", 2)), x)
