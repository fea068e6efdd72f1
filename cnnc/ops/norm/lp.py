"""Division by the p-norm along an axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.op import Example, Kind, Op
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.axes import normal_axis
from cnnc.ops.blocked import fixed, tensor
from cnnc.ops.broadcast import widen, working_dtype
from cnnc.ops.numeric import cast_to, check_floats, narrow
from cnnc.ops.pool import power, root


@dataclass(frozen=True)
class LpNormalize(Op):
    """Divide by the p-norm along an axis; where that is 0 the result is 0.

    y[i] = x[i] / (sum over j of |x[j]|^p) ^ (1/p)
    """

    axis: int = -1
    p: int = 2

    kind: ClassVar[Kind] = Kind.REDUCTION

    def infer(self, x: TensorType) -> TensorType:
        """Give x's type; raises `ShapeError` for an axis that does not exist."""
        check_floats(self.name, x=x)
        normal_axis(self.name, self.axis, x.rank)
        if self.p < 1:
            raise ShapeError(f"{self.name}: p={self.p} must be at least 1")
        return x

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Divide, except by 0."""
        wide = widen(x)
        norm = (np.abs(wide) ** self.p).sum(axis=self.axis, keepdims=True) ** (1 / self.p)
        safe = np.where(norm == 0, wide.dtype.type(1), norm)
        return narrow(np.where(norm == 0, wide.dtype.type(0), wide / safe), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce once, then divide."""
        type_ = types[0]
        axis = normal_axis(self.name, self.axis, type_.rank)
        wide = working_dtype(type_.dtype)
        rows = TensorType(type_.shape[:axis] + type_.shape[axis + 1 :], wide)
        k = te.reduce_axis(fixed(self.name, type_.shape[axis : axis + 1])[0], "k")

        def read(*i: Any) -> Any:
            return cast_to(te, te.at(xs[0], type_, *i), type_.dtype, wide)

        sums = tensor(
            te, rows, lambda *i: te.sum(power(te, te.abs(read(*i[:axis], k, *i[axis:])), self.p, wide), [k]), "p_sum"
        )

        def element(*i: Any) -> Any:
            norm = root(te, te.at(sums, rows, *i[:axis], *i[axis + 1 :]), self.p, wide)
            zero = te.const(0, wide)
            safe = te.select(norm == zero, te.const(1, wide), norm)
            return cast_to(te, te.select(norm == zero, zero, read(*i) / safe), wide, type_.dtype)

        return [tensor(te, type_, element, self.name)]

    def flops(self, x: TensorType) -> int:
        """Count three for each element: power, sum, division."""
        return 3 * x.elements

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give several axes and p, and a row of zeros."""
        for shape, axis, p in (((3, 5), 1, 2), ((2, 4, 3, 2), 1, 2), ((2, 4, 3), -1, 1), ((5,), 0, 3), ((0, 3), 1, 2)):
            yield Example(cls(axis, p), (TensorType(shape),))
        yield Example(cls(1, 2), (TensorType((Dim.symbol("n", 3), 4)),))
        yield Example(cls(1, 2), (TensorType((2, 3)),), lambda rng: (np.zeros((2, 3), np.float32),))
        yield Example(cls(1, 2), (TensorType((2, 3), DType.F64),))
        yield Example(cls(1, 2), (TensorType((2, 3), DType.F16),))
