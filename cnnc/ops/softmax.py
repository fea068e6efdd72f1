"""Softmax and its logarithm along one axis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx
from cnnc.ir.types import Dim, DType, TensorType, format_shape, product
from cnnc.ops.axes import normal_axis
from cnnc.ops.blocked import fixed, tensor
from cnnc.ops.broadcast import widen, working_dtype
from cnnc.ops.numeric import cast_to, check_floats, lowest, narrow


@dataclass(frozen=True)
class _AlongAxis(Op):
    """What softmax and its logarithm share."""

    axis: int

    kind: ClassVar[Kind] = Kind.REDUCTION

    def infer(self, x: TensorType) -> TensorType:
        """Give x's type; raises `ShapeError` for integers or an axis that does not exist."""
        check_floats(self.name, x=x)
        normal_axis(self.name, self.axis, x.rank)
        return x.with_layout(None)

    def flops(self, x: TensorType) -> int:
        """Count five for each element: compare, subtract, exponential, add, divide."""
        return 5 * x.elements

    def _stages(self, te: Any, x: Any, type_: TensorType, finish: Callable[[Any, Any, Any, DType], Any]) -> Any:
        """Describe maximum, sum of exponentials, and `finish(te, x - maximum, sum, dtype)`."""
        axis = normal_axis(self.name, self.axis, type_.rank)
        length = fixed(self.name, type_.shape[axis : axis + 1])[0]
        wide = working_dtype(type_.dtype)
        rows = TensorType(type_.shape[:axis] + type_.shape[axis + 1 :], wide)

        def read(index: Sequence[Any]) -> Any:
            return cast_to(te, te.at(x, type_, *index), type_.dtype, wide)

        def row(index: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(index[:axis]) + tuple(index[axis + 1 :])

        k, j = te.reduce_axis(length, "k"), te.reduce_axis(length, "j")
        largest = tensor(te, rows, lambda *i: te.max(read((*i[:axis], k, *i[axis:])), [k]), "softmax_max")

        def exponential(*i: Any) -> Any:
            return te.sum(te.exp(read((*i[:axis], j, *i[axis:])) - te.at(largest, rows, *i)), [j])

        total = tensor(te, rows, exponential, "softmax_sum")

        def element(*i: Any) -> Any:
            shifted = read(i) - te.at(largest, rows, *row(i))
            return cast_to(te, finish(te, shifted, te.at(total, rows, *row(i)), wide), wide, type_.dtype)

        return tensor(te, type_, element, self.name)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give several ranks and axes, large values, a run-time batch, nothing at all."""
        for shape, axis in (
            ((3, 10), 1),
            ((2, 5, 3, 4), 1),
            ((4, 3, 7), -1),
            ((6,), 0),
            ((5, 2), 0),
            ((2, 0), 1),
            ((0, 3), 1),
        ):
            yield Example(cls(axis), (TensorType(shape),))
        yield Example(cls(1), (TensorType((Dim.symbol("n", 4), 9)),))
        for dtype in (DType.F64, DType.F16):
            yield Example(cls(1), (TensorType((2, 9), dtype),))
        large = TensorType((3, 6))
        yield Example(cls(1), (large,), lambda rng: (rng.uniform(-200, 200, (3, 6)).astype(np.float32),))


@dataclass(frozen=True)
class Softmax(_AlongAxis):
    """Turn numbers into shares that add up to 1 along an axis.

    y[i] = exp(x[i] - m) / sum over j of exp(x[j] - m),  m = max over j of x[j]
    """

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Divide the shifted exponentials by their sum."""
        exponentials = np.exp(_shifted(widen(x), self.axis))
        return narrow(exponentials / exponentials.sum(axis=self.axis, keepdims=True), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce twice, then divide."""
        return [self._stages(te, xs[0], types[0], lambda te, shifted, total, _: te.exp(shifted) / total)]


@dataclass(frozen=True)
class LogSoftmax(_AlongAxis):
    """Give the logarithm of softmax, exact where softmax itself would be 0.

    y[i] = x[i] - m - log(sum over j of exp(x[j] - m)),  m = max over j of x[j]
    """

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Subtract the logarithm of the sum of shifted exponentials."""
        shifted = _shifted(widen(x), self.axis)
        with np.errstate(divide="ignore"):
            total = np.log(np.exp(shifted).sum(axis=self.axis, keepdims=True))
        return narrow(shifted - total, x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce twice, then subtract."""
        return [self._stages(te, xs[0], types[0], lambda te, shifted, total, _: shifted - te.log(total))]


def _shifted(x: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(x - np.max(x, axis=axis, keepdims=True, initial=lowest(DType.of(x))))


@onnx("Softmax", "LogSoftmax")
def _softmax(node: ForeignNode, x: Value) -> Value:
    """Read softmax; before opset 13 it runs over all axes from `axis` on together."""
    make = Softmax if node.op_type == "Softmax" else LogSoftmax
    axis = node.attr("axis", -1 if node.opset >= 13 else 1)
    rank = len(x.shape)
    if not -rank <= axis <= (rank if node.opset < 13 else rank - 1):
        raise node.invalid(f"axis {axis} does not exist in {x.type}")
    axis = axis + rank if axis < 0 else axis
    rest = x.shape[axis + 1 :]
    if node.opset >= 13 or (axis < rank and all(size == 1 for size in rest)):
        return call(make(axis), x)
    from cnnc.ops.reshape import Reshape

    rows, columns = product(x.shape[:axis]), product(x.shape[axis:])
    if not isinstance(columns, int):
        raise node.unsupported(f"softmax over {format_shape(x.shape[axis:])}, known only at run time")
    flat = call(make(1), call(Reshape((rows, columns)), x))
    return call(Reshape(x.shape), flat)
