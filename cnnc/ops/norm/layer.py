"""Normalisation over trailing axes: layer and RMS norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.op import Example, Kind, Op
from cnnc.ir.types import Dim, DType, TensorType, format_shape
from cnnc.ops.axes import normal_axis
from cnnc.ops.blocked import fixed, tensor
from cnnc.ops.broadcast import widen, working_dtype
from cnnc.ops.norm.moments import moments, standardise
from cnnc.ops.numeric import cast_to, check_floats, narrow


@dataclass(frozen=True)
class LayerNorm(Op):
    """Normalise over all axes from `axis` on.

    y = (x - mean) / sqrt(var + epsilon) * gamma + beta,  mean and (population) var over the axes from `axis` on

    Inputs x, gamma, optionally beta; gamma and beta have the shape of those axes.
    """

    axis: int
    epsilon: float = 1e-5

    kind: ClassVar[Kind] = Kind.REDUCTION

    def infer(self, x: TensorType, gamma: TensorType, beta: TensorType | None = None) -> TensorType:
        """Give x's type; raises `ShapeError` where gamma or beta do not fit the axes."""
        check_floats(self.name, x=x, gamma=gamma, beta=beta)
        _check_trailing(self.name, x, normal_axis(self.name, self.axis, x.rank), gamma=gamma, beta=beta)
        return x

    def reference(self, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray | None = None) -> np.ndarray:
        """Subtract the mean, divide by the deviation, scale and shift."""
        axes = tuple(range(self.axis % x.ndim, x.ndim))
        y = standardise(widen(x), axes, self.epsilon) * widen(gamma)
        return narrow(y if beta is None else y + widen(beta), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce twice, then scale and shift."""
        type_ = types[0]
        axis = normal_axis(self.name, self.axis, type_.rank)
        wide = working_dtype(type_.dtype)
        rows = TensorType(type_.shape[:axis], wide)

        def read(*i: Any) -> Any:
            return cast_to(te, te.at(xs[0], type_, *i), type_.dtype, wide)

        mean, var = moments(te, read, rows, fixed(self.name, type_.shape[axis:]), lambda row, inner: (*row, *inner))

        def element(*i: Any) -> Any:
            row, inner = i[:axis], i[axis:]
            value = (read(*i) - mean(*row)) / te.sqrt(var(*row) + te.const(self.epsilon, wide))
            value = value * cast_to(te, te.at(xs[1], types[1], *inner), type_.dtype, wide)
            if len(xs) == 3:
                value = value + cast_to(te, te.at(xs[2], types[2], *inner), type_.dtype, wide)
            return cast_to(te, value, wide, type_.dtype)

        return [tensor(te, type_, element, self.name)]

    def flops(self, x: TensorType, *vectors: TensorType) -> int:
        """Count eight for each element: two sums, two differences, a square, a division, scale and shift."""
        return 8 * x.elements

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give the last axis and several axes, with and without beta."""
        yield from _trailing_examples(cls, beta=True)


def _check_trailing(name: str, x: TensorType, axis: int, **operands: TensorType | None) -> None:
    """Raise `ShapeError` unless the operands have the shape of the axes from `axis` on."""
    for key, type_ in operands.items():
        if type_ is not None and type_.shape != x.shape[axis:]:
            wanted = format_shape(x.shape[axis:])
            raise ShapeError(f"{name}: {key} : {type_} must have the shape {wanted} of x : {x} from axis {axis} on")


def _trailing_examples(make: Callable[[int, float], Op], beta: bool) -> Iterable[Example]:
    for shape, axis, dtype in (
        ((3, 7), 1, DType.F32),
        ((2, 3, 5), -1, DType.F32),
        ((2, 4, 3, 5), 1, DType.F32),
        ((6,), 0, DType.F32),
        ((0, 4), 1, DType.F32),
        ((2, 9), 1, DType.F64),
        ((2, 9), 1, DType.F16),
    ):
        scale = TensorType(shape[axis:], dtype)
        yield Example(make(axis, 1e-4), (TensorType(shape, dtype), scale))
        if beta:
            yield Example(make(axis, 1e-5), (TensorType(shape, dtype), scale, scale))
    yield Example(make(1, 1e-5), (TensorType((Dim.symbol("n", 3), 5)), TensorType((5,))))


@dataclass(frozen=True)
class RmsNorm(Op):
    """Divide by the root of the mean square over all axes from `axis` on (Zhang and Sennrich, 2019).

    y = x / sqrt(mean of x^2 + epsilon) * gamma

    Inputs x, gamma; gamma has the shape of those axes.
    """

    axis: int
    epsilon: float = 1e-5

    kind: ClassVar[Kind] = Kind.REDUCTION

    def infer(self, x: TensorType, gamma: TensorType) -> TensorType:
        """Give x's type; raises `ShapeError` where gamma does not fit the axes."""
        check_floats(self.name, x=x, gamma=gamma)
        _check_trailing(self.name, x, normal_axis(self.name, self.axis, x.rank), gamma=gamma)
        return x

    def reference(self, x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        """Divide by the root of the mean square."""
        wide = widen(x)
        axes = tuple(range(self.axis % x.ndim, x.ndim))
        square = (wide * wide).sum(axis=axes, keepdims=True) / wide.dtype.type(max(math.prod(x.shape[axes[0] :]), 1))
        return narrow(wide / np.sqrt(square + wide.dtype.type(self.epsilon)) * widen(gamma), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce once, then divide and scale."""
        type_ = types[0]
        axis = normal_axis(self.name, self.axis, type_.rank)
        wide = working_dtype(type_.dtype)
        rows = TensorType(type_.shape[:axis], wide)
        extents = fixed(self.name, type_.shape[axis:])
        inner_axes = [te.reduce_axis(e, f"r{i}") for i, e in enumerate(extents)]
        count = te.const(max(math.prod(extents), 1), wide)

        def read(*i: Any) -> Any:
            return cast_to(te, te.at(xs[0], type_, *i), type_.dtype, wide)

        def square(*row: Any) -> Any:
            return te.sum(read(*row, *inner_axes) * read(*row, *inner_axes), inner_axes)

        squares = tensor(te, rows, square, "square_sum")

        def element(*i: Any) -> Any:
            mean_square = te.at(squares, rows, *i[:axis]) / count
            scale = cast_to(te, te.at(xs[1], types[1], *i[axis:]), type_.dtype, wide)
            value = read(*i) / te.sqrt(mean_square + te.const(self.epsilon, wide)) * scale
            return cast_to(te, value, wide, type_.dtype)

        return [tensor(te, type_, element, self.name)]

    def flops(self, x: TensorType, *vectors: TensorType) -> int:
        """Count four for each element: square, sum, division, scale."""
        return 4 * x.elements

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give the last axis and several axes."""
        yield from _trailing_examples(cls, beta=False)
