"""Resizing by nearest, linear or cubic interpolation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product as cartesian
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, Kind, Op
from cnnc.ir.types import Dim, DType, Size, TensorType, upper_bound
from cnnc.ops.blocked import channel_block, channel_layout, tensor
from cnnc.ops.broadcast import widen, working_dtype
from cnnc.ops.numeric import cast_to, narrow
from cnnc.ops.resize.coordinate import Coordinate, exact, exact_scale

MODES = ("nearest", "linear", "cubic")
NEAREST_MODES = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
COORDINATE_MODES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_half_pixel_for_nn",
    "tf_crop_and_resize",
)


@dataclass(frozen=True)
class Resize(Op):
    """Resize every axis to a given size.

    y[i] = x interpolated at the coordinates of i, axis by axis, clamped to the edge

    `scales` (for each axis) are the ratios that coordinates go by; without them they are size / input size.  The
    names of modes are those of ONNX's Resize, `roi` is (starts..., ends...) in parts of the input for
    tf_crop_and_resize.
    """

    sizes: tuple[Size, ...]
    scales: tuple[float, ...] = ()
    mode: str = "nearest"
    coordinate_mode: str = "half_pixel"
    nearest_mode: str = "round_prefer_floor"
    cubic_a: float = -0.75
    exclude_outside: bool = False
    extrapolation_value: float = 0.0
    roi: tuple[float, ...] = ()

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        """Nearest reads one element for each output."""
        return Kind.INJECTIVE if self.mode == "nearest" else Kind.REDUCTION

    def infer(self, x: TensorType) -> TensorType:
        """Give the sizes; raises `ShapeError` for modes that do not exist and sizes or scales that make no sense."""
        for what, value, known in (
            ("mode", self.mode, MODES),
            ("coordinate_mode", self.coordinate_mode, COORDINATE_MODES),
            ("nearest_mode", self.nearest_mode, NEAREST_MODES),
        ):
            if value not in known:
                raise ShapeError(f"{self.name}: {what} {value!r} is none of {', '.join(known)}")
        if self.mode != "nearest" and not x.dtype.is_float:
            raise ShapeError(f"{self.name}: mode {self.mode} takes floats, not x : {x}")
        lengths = (len(self.sizes), len(self.scales) or x.rank, len(self.roi) or 2 * x.rank)
        if lengths != (x.rank, x.rank, 2 * x.rank):
            raise ShapeError(f"{self.name}: sizes, scales and roi must be for the {x.rank} axes of x : {x}")
        if (self.coordinate_mode == "tf_crop_and_resize") != bool(self.roi):
            raise ShapeError(f"{self.name}: roi goes with coordinate_mode tf_crop_and_resize, and only with it")
        if any(not 0 < scale < np.inf for scale in self.scales):
            raise ShapeError(f"{self.name}: scales {self.scales} must be positive")
        for axis, (size, wanted) in enumerate(zip(x.shape, self.sizes, strict=True)):
            if not self.keeps(axis, x) and not (isinstance(size, int) and isinstance(wanted, int)):
                raise ShapeError(f"{self.name}: axis {axis} of {size}, known only at run time, cannot become {wanted}")
            if upper_bound(size) == 0 and upper_bound(wanted) > 0:
                raise ShapeError(f"{self.name}: axis {axis} is empty and cannot become {wanted}")
        return x.with_shape(self.sizes)

    def infer_layout(self, x: TensorType) -> tuple[Layout | None, ...]:
        """Keep a layout with channels in blocks if N and C keep their sizes."""
        block = channel_block(self.name, "x", x)
        if block > 1 and not (self.keeps(0, x) and self.keeps(1, x)):
            raise ShapeError(f"{self.name}: x : {x} must be plain where batch or channels are resized")
        return (channel_layout(x.rank, block),)

    def keeps(self, axis: int, x: TensorType) -> bool:
        """Whether an axis stays as it is."""
        if self.roi and (self.roi[axis], self.roi[axis + x.rank]) != (0.0, 1.0):
            return False
        return self.sizes[axis] == x.shape[axis] and (not self.scales or self.scales[axis] == 1.0)

    def coordinate(self, axis: int, x: TensorType) -> Coordinate:
        """Give where output indices lie along an axis."""
        size, count = upper_bound(x.shape[axis]), upper_bound(self.sizes[axis])
        half = Fraction(1, 2)
        if self.coordinate_mode == "align_corners":
            return Coordinate.of(Fraction(size - 1, count - 1) if count > 1 else Fraction(0), Fraction(0))
        if self.coordinate_mode == "tf_crop_and_resize":
            start, end = (exact(self.roi[i]) * (size - 1) for i in (axis, axis + x.rank))
            if count > 1:
                return Coordinate.of((end - start) / (count - 1), start)
            return Coordinate.of(Fraction(0), (start + end) / 2)
        if self.coordinate_mode == "pytorch_half_pixel" and count == 1:
            return Coordinate(0, 0, 1)
        scale = exact_scale(self.scales[axis]) if self.scales else Fraction(count, max(size, 1))
        slope = 1 / scale
        offset = {"asymmetric": Fraction(0), "tf_half_pixel_for_nn": half * slope}.get(
            self.coordinate_mode, half * slope - half
        )
        if self.coordinate_mode == "half_pixel_symmetric":
            offset += Fraction(size, 2) * (1 - count / (scale * size))
        return Coordinate.of(slope, offset)

    def taps(self, axis: int, x: TensorType) -> tuple[np.ndarray, np.ndarray]:
        """Give the input indices [size, taps] and weights [size, taps] of an axis."""
        size, count = x.static_shape[axis], upper_bound(self.sizes[axis])
        where = self.coordinate(axis, x)
        index = np.arange(count)
        if self.mode == "nearest":
            nearest = where.nearest(self.nearest_mode)
            chosen = (nearest.at(index) // nearest.c).astype(np.int64)[:, None]
            return np.clip(chosen, 0, size - 1), np.ones((count, 1))
        numerator = where.at(index)
        start = (numerator // where.c).astype(np.int64)
        fraction = np.asarray(numerator % where.c, np.float64) / where.c
        if self.mode == "linear":
            offsets, weights = np.arange(2), np.stack([1 - fraction, fraction], axis=1)
        else:
            offsets, weights = np.arange(-1, 3), np.stack(_cubic(fraction, self.cubic_a), axis=1)
        chosen = start[:, None] + offsets
        if self.exclude_outside:
            weights = np.where((chosen >= 0) & (chosen < size), weights, 0)
            weights = weights / weights.sum(axis=1, keepdims=True)
        return np.clip(chosen, 0, size - 1), weights

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Interpolate one axis after the other."""
        type_ = TensorType(x.shape, DType.of(x))
        # A run-time batch is 1 at its bound or less here: axes that keep their size follow the array.
        sizes = [self.sizes[a] if isinstance(self.sizes[a], int) else x.shape[a] for a in range(x.ndim)]
        op = replace(self, sizes=tuple(sizes))
        y = x if self.mode == "nearest" else widen(x)
        for axis in range(x.ndim):
            if op.keeps(axis, type_) or y.size == 0:
                continue
            chosen, weights = op.taps(axis, type_)
            shape = (-1, *(1,) * (x.ndim - axis - 1))
            if self.mode == "nearest":
                y = y.take(chosen[:, 0], axis)
                continue
            parts = zip(chosen.T, weights.T.astype(y.dtype), strict=True)
            y = sum(y.take(i, axis) * w.reshape(shape) for i, w in parts)
        if y.size == 0:
            return np.zeros([upper_bound(s) for s in sizes], x.dtype)
        return narrow(op._extrapolated(y, type_), x)

    def _extrapolated(self, y: np.ndarray, x: TensorType) -> np.ndarray:
        """Put in the extrapolation value where a coordinate is outside."""
        if self.coordinate_mode != "tf_crop_and_resize":
            return y
        for axis in range(x.rank):
            if not self.keeps(axis, x):
                where = self.coordinate(axis, x)
                numerator = where.at(np.arange(y.shape[axis]))
                outside = (numerator < 0) | (numerator > (x.static_shape[axis] - 1) * where.c)
                shape = (-1, *(1,) * (x.rank - axis - 1))
                y = np.where(outside.astype(np.bool_).reshape(shape), y.dtype.type(self.extrapolation_value), y)
        return y

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Add up the taps of all axes, weighted."""
        x_type = types[0]
        out = self.infer(x_type).with_layout(x_type.layout)
        wide = x_type.dtype if self.mode == "nearest" else working_dtype(x_type.dtype)
        resized = [axis for axis in range(x_type.rank) if not self.keeps(axis, x_type)]

        def element(*index: Any) -> Any:
            choices = [self._expressions(te, axis, x_type, index[axis], wide) for axis in resized]
            total: Any = None
            for taps in cartesian(*choices):
                source = list(index)
                weight: Any = None
                for axis, (position, factor) in zip(resized, taps, strict=True):
                    source[axis] = position
                    weight = factor if weight is None else weight * factor
                value = cast_to(te, te.at(xs[0], x_type, *source), x_type.dtype, wide)
                value = value if weight is None else value * weight
                total = value if total is None else total + value
            for axis in resized if self.roi else ():
                size, count = x_type.static_shape[axis], out.static_shape[axis]
                outside = self.coordinate(axis, x_type).outside(te, index[axis], size, count)
                total = te.select(outside, te.const(self.extrapolation_value, wide), total)
            return cast_to(te, total, wide, out.dtype)

        return [tensor(te, out, element, "resize")]

    def _expressions(self, te: Any, axis: int, x: TensorType, index: Any, dtype: DType) -> list[tuple[Any, Any]]:
        """Write the input indices of an axis and their weights (None for nearest)."""
        size, count = x.static_shape[axis], upper_bound(self.sizes[axis])
        where = self.coordinate(axis, x)
        if self.mode == "nearest":
            nearest = where.nearest(self.nearest_mode)
            ends = [int(n) // nearest.c for n in nearest.at(np.array([0, count - 1]))]
            return [(_clamped(te, nearest.floor(te, index, count), min(ends), max(ends), size), None)]
        start, fraction = where.floor_and_fraction(te, index, count, dtype)
        ends = [int(n) // where.c for n in where.at(np.array([0, count - 1]))]
        if self.mode == "linear":
            offsets, weights = [0, 1], [1 - fraction, fraction]
        else:
            offsets, weights = [-1, 0, 1, 2], _cubic(fraction, self.cubic_a)
        if self.exclude_outside:
            zero = te.const(0, dtype)
            inside = [te.logical_and(start + o >= 0, start + o < size) for o in offsets]
            weights = [te.select(i, w, zero) for i, w in zip(inside, weights, strict=True)]
            total = sum(weights[1:], weights[0])
            weights = [w / total for w in weights]
        positions = [_clamped(te, start + o, min(ends) + o, max(ends) + o, size) for o in offsets]
        return list(zip(positions, weights, strict=True))

    def flops(self, x: TensorType) -> int:
        """Count two for each tap of each element; nothing for nearest."""
        taps = {"nearest": 0, "linear": 2, "cubic": 4}[self.mode]
        resized = sum(not self.keeps(axis, x) for axis in range(x.rank))
        return self.infer(x).elements * (2 * taps**resized if taps else 0)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give all modes, up and down, odd ratios, in 1 to 3 dimensions."""
        x = TensorType((1, 2, 4, 5))
        sizes = (1, 2, 7, 3)
        for coordinate_mode in COORDINATE_MODES:
            roi = (0.0, 0.0, 0.25, -0.1, 1.0, 1.0, 0.75, 0.8) if coordinate_mode == "tf_crop_and_resize" else ()
            for mode in MODES:
                yield Example(cls(sizes, (), mode, coordinate_mode, extrapolation_value=9.0, roi=roi), (x,))
        for nearest_mode in NEAREST_MODES:
            yield Example(cls((1, 2, 6, 10), (), "nearest", "half_pixel", nearest_mode), (x,))
            yield Example(cls((1, 2, 2, 10), (), "nearest", "asymmetric", nearest_mode), (x,))
        yield Example(cls((1, 2, 5, 8), (1.0, 1.0, 1.3, 1.6), "linear", "half_pixel_symmetric"), (x,))
        yield Example(cls((1, 2, 2, 3), (1.0, 1.0, 0.7312345, 0.6), "cubic", "half_pixel", cubic_a=-0.5), (x,))
        yield Example(cls((1, 2, 9, 2), (), "cubic", "half_pixel", exclude_outside=True), (x,))
        yield Example(cls((1, 2, 1, 1), (), "linear", "align_corners"), (x,))
        yield Example(cls((1, 2, 1, 1), (), "cubic", "pytorch_half_pixel"), (x,))
        yield Example(cls((2, 3, 9), (), "linear"), (TensorType((2, 3, 4)),))
        yield Example(cls((1, 2, 3, 5, 4), (), "linear"), (TensorType((1, 2, 2, 3, 4)),))
        yield Example(cls((3, 5), (), "linear"), (TensorType((2, 4)),))
        yield Example(cls((0, 2, 8, 8), (), "linear"), (TensorType((0, 2, 4, 4)),))
        batch = Dim.symbol("n", 2)
        yield Example(cls((batch, 2, 8, 8), (), "linear"), (TensorType((batch, 2, 4, 4)),))
        for dtype in (DType.F64, DType.F16):
            yield Example(cls((1, 2, 8, 7), (), "linear"), (TensorType((1, 2, 4, 4), dtype),))
        for dtype in (DType.I64, DType.U8):
            yield Example(cls((1, 2, 8, 7)), (TensorType((1, 2, 4, 4), dtype),))
        blocked = TensorType((1, 5, 4, 4), DType.F32, Layout("NCHW4c"))
        for mode in MODES:
            yield Example(cls((1, 5, 8, 6), (), mode), (blocked,))


def _cubic(t: Any, a: float) -> list[Any]:
    """Give the weights of the four neighbours at fraction t (Keys 1981, equation 4)."""
    far: Callable[[Any], Any] = lambda d: ((d * a - 5 * a) * d + 8 * a) * d - 4 * a
    near: Callable[[Any], Any] = lambda d: (d * (a + 2) - (a + 3)) * d * d + 1
    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


def _clamped(te: Any, index: Any, low: int, high: int, size: int) -> Any:
    """Write an index clamped into [0, size), where its own range [low, high] goes beyond."""
    if high >= size:
        index = te.minimum(index, size - 1)
    return te.maximum(index, 0) if low < 0 else index
