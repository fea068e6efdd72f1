"""Max unpooling: values go back to where a max pool found them, everything else is 0."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx, random_array
from cnnc.ir.types import DType, Size, TensorType
from cnnc.ops.blocked import channel_block, channel_layout, every, fixed, flat_index, tensor
from cnnc.ops.gather import wrap_indices
from cnnc.ops.numeric import check_floats
from cnnc.ops.pool import MaxPool
from cnnc.ops.window import spatial_attr


@dataclass(frozen=True)
class MaxUnpool(Op):
    """Write each value to the place its index names, zeros elsewhere.

    y.flat[indices[q]] = x[q],  y[N,C,*size]

    The i64 indices count through the whole of y, row by row, as `MaxPool(with_indices)` gives them; where several
    name one place, the last one in row-major order stays.  Negative ones count from the end.
    """

    size: tuple[int, ...]

    def infer(self, x: TensorType, indices: TensorType) -> TensorType:
        """Give [N,C,*size]; raises `ShapeError` where x and indices differ in shape or the rank is another."""
        _check_size(self.name, self.size, x)
        if indices.dtype is not DType.I64 or indices.shape != x.shape:
            raise ShapeError(f"{self.name}: indices {indices} must be {x.with_dtype(DType.I64)} as x : {x}")
        if x.elements and 0 in self.size:
            raise ShapeError(f"{self.name}: there is no room for the values of x : {x} in size {self.size}")
        return x.with_shape((*x.shape[:2], *self.size))

    def index_extents(self, x: TensorType, indices: TensorType) -> dict[int, tuple[int, ...]]:
        """Index into the whole output, flattened."""
        return {1: (math.prod(self._shape(x)),)}

    def _shape(self, x: TensorType) -> tuple[int, ...]:
        return (*fixed(self.name, x.shape[:2]), *self.size)

    def reference(self, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Assign in numpy."""
        y = np.zeros((*x.shape[:2], *self.size), x.dtype)
        y.reshape(-1)[wrap_indices(self.name, indices, y.size).reshape(-1)] = x.reshape(-1)
        return y

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Search, for each element of y, all indices: the definition, too slow for anything large."""
        x_type, index_type = types
        shape = fixed(self.name, x_type.shape)
        out = self.infer(*types)
        if not x_type.elements:
            return [tensor(te, out, lambda *_: te.const(0, out.dtype), self.name)]
        last_type = out.with_dtype(DType.I32)
        number = te.reduce_axis(math.prod(shape), "value")
        total = math.prod(out.static_shape)

        def position(flat: Any) -> list[Any]:
            return [
                te.floormod(te.floordiv(flat, math.prod(shape[axis + 1 :])), size) if size > 1 else 0
                for axis, size in enumerate(shape)
            ]

        def last(*index: Any) -> Any:
            read = te.at(xs[1], index_type, *position(number))
            hit = te.index(te.select(read < 0, read + total, read)) == flat_index(index, out.static_shape)
            return te.max(te.where(hit, te.cast(number, DType.I32), te.const(-1, DType.I32)), [number])

        winner = tensor(te, last_type, last, "max_unpool_last")

        def chosen(*index: Any) -> Any:
            found = te.at(winner, last_type, *index)
            value = te.at(xs[0], x_type, *position(te.index(te.maximum(found, 0))))
            return te.where(found >= 0, value, te.const(0, out.dtype))

        return [tensor(te, out, chosen, self.name)]

    def flops(self, x: TensorType, indices: TensorType) -> int:
        """No arithmetic."""
        return 0

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give one to three axes, room to spare, several values for one place, other dtypes, nothing."""
        for shape, size in (((2, 3, 2, 3), (4, 7)), ((1, 2, 5), (3,)), ((1, 2, 2, 1, 2), (4, 2, 3)), ((2, 0, 1), (4,))):
            yield _example(cls(size), shape, DType.F32)
        for dtype in (DType.F64, DType.F16, DType.I8):
            yield _example(cls((5, 4)), (1, 2, 2, 2), dtype)


def _example(op: MaxUnpool, shape: tuple[int, ...], dtype: DType) -> Example:
    types = (TensorType(shape, dtype), TensorType(shape, DType.I64))
    total = math.prod((*shape[:2], *op.size))

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return random_array(rng, types[0]), rng.integers(-total, total, shape, np.int64)

    return Example(op, types, draw if total else None)


def _check_size(name: str, size: tuple[int, ...], x: TensorType) -> None:
    if not 3 <= x.rank <= 5 or len(size) != x.rank - 2 or min(size, default=0) < 0:
        raise ShapeError(f"{name}: size {size} is not one for the spatial axes of x : {x}")


# The pair a pool and its unpooling become where windows do not overlap: no indices, nothing to search or to check.


@dataclass(frozen=True)
class ArgMaxPool(Op):
    """Give the tap at which each window has its maximum: the first of equals, or the first NaN.

    t[n,c,q] = min { k : x[n, c, q*stride + k] = max over windows },  taps numbered row by row

    Windows do not overlap (no kernel size exceeds its stride), lie inside x and are not dilated.  Taps are numbers of
    x's type: they lie in memory beside the maxima and are compared in the same vector lanes.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]

    kind = Kind.REDUCTION

    def infer(self, x: TensorType) -> TensorType:
        """Give [N,C,...]; raises `ShapeError` for windows that overlap, do not fit, or have too many taps."""
        check_floats(self.name, x=x)
        _check_windows(self.name, self.kernel, self.stride, x)
        sizes = fixed(self.name, x.shape[2:])
        if any(size < k for size, k in zip(sizes, self.kernel, strict=True)):
            raise ShapeError(f"{self.name}: windows {self.kernel} do not fit into x : {x}")
        counts = ((n - k) // s + 1 for n, k, s in zip(sizes, self.kernel, self.stride, strict=True))
        return x.with_shape((*x.shape[:2], *counts))

    def infer_layout(self, x: TensorType) -> tuple[Layout | None, ...]:
        """Keep the layout, which is plain or has channels in blocks."""
        return (channel_layout(x.rank, channel_block(self.name, "x", x)),)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Gather the taps and let numpy find the first maximum."""
        counts = fixed(self.name, self.infer(TensorType(x.shape, DType.of(x))).shape[2:])
        seen = []
        for tap in np.ndindex(*self.kernel):
            ends = (k + (n - 1) * s + 1 for k, n, s in zip(tap, counts, self.stride, strict=True))
            spatial = tuple(slice(k, end, s) for k, end, s in zip(tap, ends, self.stride, strict=True))
            seen.append(x[(slice(None), slice(None), *spatial)])
        return np.asarray(np.argmax(np.stack(seen), axis=0), x.dtype)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Compare tap after tap with the largest before it, without branches."""
        x_type = types[0]
        out = self.infer(x_type).with_layout(x_type.layout)

        def first(n: Any, c: Any, *q: Any) -> Any:
            best: Any = None
            found: Any = te.const(0, out.dtype)
            for number, tap in enumerate(itertools.product(*map(range, self.kernel))):
                where = [i * s + k for i, s, k in zip(q, self.stride, tap, strict=True)]
                value = te.at(xs[0], x_type, n, c, *where)
                if best is None:
                    best = value
                    continue
                better = te.logical_or(value > best, te.logical_and(te.isnan(value), te.logical_not(te.isnan(best))))
                found = te.select(better, te.const(number, out.dtype), found)
                best = te.select(better, value, best)
            return found

        return [tensor(te, out, first, self.name)]

    def flops(self, x: TensorType) -> int:
        """Count one for each element of each window."""
        return self.infer(x).elements * math.prod(self.kernel)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give even and odd sizes, gaps between windows, one and three axes, blocks, other dtypes, nothing."""
        yield Example(cls((2, 2), (2, 2)), (TensorType((2, 3, 6, 7)),))
        yield Example(cls((1, 2), (3, 2)), (TensorType((1, 2, 7, 5)),))
        yield Example(cls((3,), (3,)), (TensorType((2, 2, 10)),))
        yield Example(cls((2, 1, 2), (2, 2, 2)), (TensorType((1, 2, 4, 3, 5)),))
        yield Example(cls((2, 2), (2, 2)), (TensorType((2, 5, 4, 6), DType.F32, Layout("NCHW4c")),))
        yield Example(cls((2, 2), (2, 2)), (TensorType((0, 2, 4, 4)),))
        for dtype in (DType.F64, DType.F16):
            yield Example(cls((2, 2), (2, 2)), (TensorType((1, 2, 4, 4), dtype),))


@dataclass(frozen=True)
class TapUnpool(Op):
    """Put each value at its tap of its window, zeros elsewhere: `ArgMaxPool` says which tap.

    y[n, c, q*stride + k] = x[n,c,q] if k is tap t[n,c,q], else 0;  y[N,C,*size]
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    size: tuple[int, ...]

    kind = Kind.INJECTIVE

    def infer(self, x: TensorType, taps: TensorType) -> TensorType:
        """Give [N,C,*size]; raises `ShapeError` where windows overlap or do not fit into the size."""
        check_floats(self.name, x=x)
        _check_windows(self.name, self.kernel, self.stride, x)
        _check_size(self.name, self.size, x)
        if (taps.shape, taps.dtype) != (x.shape, x.dtype):
            raise ShapeError(f"{self.name}: taps {taps} must be as x : {x}")
        spatial = zip(fixed(self.name, x.shape[2:]), self.kernel, self.stride, self.size, strict=True)
        if any(n and (n - 1) * s + k > size for n, k, s, size in spatial):
            raise ShapeError(f"{self.name}: the windows of x : {x} do not fit into size {self.size}")
        return x.with_shape((*x.shape[:2], *self.size))

    def infer_layout(self, x: TensorType, taps: TensorType) -> tuple[Layout | None, ...]:
        """Keep the layout of both, which is plain or has channels in blocks."""
        if x.layout != taps.layout:
            raise ShapeError(f"{self.name}: x : {x} and taps {taps} must be in one layout")
        return (channel_layout(x.rank, channel_block(self.name, "x", x)),)

    def reference(self, x: np.ndarray, taps: np.ndarray) -> np.ndarray:
        """Fill tap by tap."""
        y = np.zeros((*x.shape[:2], *self.size), x.dtype)
        for number, tap in enumerate(np.ndindex(*self.kernel)):
            spatial = (slice(k, k + n * s, s) for k, n, s in zip(tap, x.shape[2:], self.stride, strict=True))
            part = y[(slice(None), slice(None), *spatial)]
            part[...] = np.where(taps == number, x, 0)[tuple(slice(n) for n in part.shape)]
        return y

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read the value of the window an element lies in, or 0."""
        x_type, tap_type = types
        spatial = fixed(self.name, x_type.shape[2:])
        out = self.infer(x_type, tap_type).with_layout(x_type.layout)
        zero = te.const(0, out.dtype)
        if 0 in spatial:
            return [tensor(te, out, lambda *_: zero, self.name)]

        def element(n: Any, c: Any, *p: Any) -> Any:
            window = [te.floordiv(i, s) for i, s in zip(p, self.stride, strict=True)]
            tap = [te.floormod(i, s) for i, s in zip(p, self.stride, strict=True)]
            limits = zip(window, tap, spatial, self.kernel, self.stride, self.size, strict=True)
            conditions = []
            for q, k, count, kernel, stride, size in limits:
                conditions += [k < kernel] if kernel < stride else []
                conditions += [q < count] if count * stride < size else []
            number = te.cast(flat_index(tap, self.kernel), out.dtype)
            hit = te.at(xs[1], tap_type, n, c, *window) == number
            value = te.select(hit, te.at(xs[0], x_type, n, c, *window), zero)
            return te.where(every(te, conditions), value, zero) if conditions else value

        return [tensor(te, out, element, self.name)]

    def flops(self, x: TensorType, taps: TensorType) -> int:
        """No arithmetic."""
        return 0

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give rows left over, gaps between windows, one and three axes, blocks, other dtypes, nothing."""
        yield _taps_example(cls((2, 2), (2, 2), (6, 7)), (2, 3, 3, 3))
        yield _taps_example(cls((1, 2), (3, 2), (8, 4)), (1, 2, 2, 2))
        yield _taps_example(cls((3,), (3,), (10,)), (2, 2, 3))
        yield _taps_example(cls((2, 1, 2), (2, 2, 2), (4, 3, 5)), (1, 2, 2, 2, 2))
        yield _taps_example(cls((2, 2), (2, 2), (4, 6)), (2, 5, 2, 3), layout=Layout("NCHW4c"))
        yield _taps_example(cls((2, 2), (2, 2), (5, 2)), (1, 2, 0, 1))
        for dtype in (DType.F64, DType.F16):
            yield _taps_example(cls((2, 2), (2, 2), (4, 4)), (1, 2, 2, 2), dtype)


def _taps_example(
    op: TapUnpool, shape: tuple[int, ...], dtype: DType = DType.F32, layout: Layout | None = None
) -> Example:
    type_ = TensorType(shape, dtype, layout)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        taps = rng.integers(0, math.prod(op.kernel), shape)
        return random_array(rng, type_), taps.astype(dtype.numpy)

    return Example(op, (type_, type_), draw)


MOST_TAPS = 256
"""Taps of a window: their numbers are exact in every float type, and all of them are code."""


def _check_windows(name: str, kernel: tuple[int, ...], stride: tuple[int, ...], x: TensorType) -> None:
    if not 3 <= x.rank <= 5 or not len(kernel) == len(stride) == x.rank - 2:
        raise ShapeError(f"{name}: kernel {kernel} and stride {stride} are not for the spatial axes of x : {x}")
    if any(not 1 <= k <= s for k, s in zip(kernel, stride, strict=True)) or math.prod(kernel) > MOST_TAPS:
        raise ShapeError(f"{name}: windows {kernel} at stride {stride} overlap, are empty or have too many taps")


# ONNX


@onnx("MaxUnpool")
def _max_unpool(node: ForeignNode, x: Value, indices: Value, output_shape: Value | None = None) -> Value:
    """Read it.

    Where `output_shape` is not what strides and pads give, the standard's reference and ONNX Runtime let indices count
    through different shapes; then it must be the shape of what was pooled, through which they count in any case.
    """
    if not 3 <= len(x.shape) <= 5:
        raise node.unsupported(f"unpooling of {x.type}; one to three spatial axes are compiled")
    if not x.type.is_static:
        raise node.unsupported(f"unpooling of {x.type}; its indices count through sizes known only at run time")
    kernel = tuple(node.attr("kernel_shape", ()))
    rank = len(x.shape) - 2
    if len(kernel) != rank:
        raise node.invalid(f"kernel_shape {kernel} is not for {rank} spatial axes")
    stride, pad = spatial_attr(node, "strides", rank, 1), spatial_attr(node, "pads", 2 * rank, 0)
    shape = node.const(output_shape)
    natural = _natural_size(node, x, kernel, stride, pad)
    size = natural if shape is None else _given_size(node, x, shape)
    pooled = indices.inputs[0].shape[2:] if isinstance(indices.op, MaxPool) else None
    if size not in (natural, pooled):
        raise node.unsupported(
            f"output_shape with {size}, where strides and pads give {natural} and what was pooled"
            f" had {'an unknown size' if pooled is None else pooled}: what the indices count through is not agreed on"
        )
    return call(MaxUnpool(size), x, indices)


def _natural_size(
    node: ForeignNode, x: Value, kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int]
) -> tuple[int, ...]:
    """Give (n - 1) * stride + kernel - pads."""
    ends = zip(pad[: len(kernel)], pad[len(kernel) :], strict=True)
    found = zip(x.type.static_shape[2:], stride, kernel, map(sum, ends), strict=True)
    size = tuple((n - 1) * s + k - p for n, s, k, p in found)
    if min(size) < 1:
        raise node.invalid(f"kernel_shape, strides and pads give size {size} for X : {x.type}")
    return size


def _given_size(node: ForeignNode, x: Value, shape: np.ndarray) -> tuple[int, ...]:
    wanted: tuple[Size, ...] = tuple(map(int, shape.reshape(-1)))
    if len(wanted) != x.type.rank or wanted[:2] != x.shape[:2]:
        raise node.invalid(f"output_shape {wanted} does not fit X : {x.type}; it gives images and channels as they are")
    return fixed("max_unpool", wanted[2:])
