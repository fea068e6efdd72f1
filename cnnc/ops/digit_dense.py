"""Fully connected layer whose weights are fixed-point numbers of three int8 digits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, Kind, Op, random_array
from cnnc.ir.types import DType, TensorType
from cnnc.ops.blocked import fixed, plain_only, tensor
from cnnc.ops.broadcast import widen
from cnnc.ops.digit_conv import DIGITS, TOGETHER, digits_layout, weight_at, weight_digits, weights_of
from cnnc.ops.numeric import check_vector, narrow


@dataclass(frozen=True)
class DigitDense(Op):
    """Multiply each row by a matrix of fixed-point weights.

    y[..., o] = b[o] + unit[o] * sum over i of x[..., i] * (2^-7 d_0 + 2^-15 d_1 + 2^-23 d_2)[o,i]

    Inputs x[...,I] of f32, digits d i8[O,ceil(I/4),3,4], unit f32[O], optionally b[O]: `digit_conv` for rows.
    """

    kind: ClassVar[Kind] = Kind.REDUCTION

    def infer(self, x: TensorType, d: TensorType, unit: TensorType, b: TensorType | None = None) -> TensorType:
        """Give [...,O]; raises `ShapeError` where features, dtypes or digits do not fit."""
        if x.rank < 1 or x.dtype is not DType.F32:
            raise ShapeError(f"{self.name}: x must be f32 rows [...,I], not {x}")
        (features,) = fixed(self.name, x.shape[-1:])
        inner = (-(-features // TOGETHER), DIGITS, TOGETHER)
        if d.rank != 4 or d.dtype is not DType.I8 or d.shape[1:] != inner:
            raise ShapeError(f"{self.name}: digits must be i8[O,{','.join(map(str, inner))}] for x : {x}, not {d}")
        check_vector(self.name, "unit", unit, d.shape[0], "output feature")
        check_vector(self.name, "bias", b, d.shape[0], "output feature")
        return x.with_shape((*x.shape[:-1], d.shape[0]))

    def infer_layout(
        self, x: TensorType, d: TensorType, unit: TensorType, b: TensorType | None = None
    ) -> tuple[Layout | None, ...]:
        """Take plain tensors; the digits may be as matrix units multiply them, OIH16i16oW."""
        plain_only(self.name, x=x, unit=unit, bias=b)
        if d.layout is not None and d.layout != digits_layout(d.layout.block("O")):
            raise ShapeError(f"{self.name}: digits are in layout {d.layout}; they must be plain or as OIH16i16oW")
        return (None,)

    def reference(self, x: np.ndarray, d: np.ndarray, unit: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
        """Multiply by the weights that digits and units are."""
        weights = weights_of(d, x.shape[-1]) * unit[:, None].astype(np.float64)
        y = x.astype(np.float64) @ weights.T
        return narrow(y if b is None else y + widen(b), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce over the features, then apply the unit and the bias."""
        x_type, d_type = types[:2]
        out = self.infer(*types)
        k = te.reduce_axis(fixed(self.name, x_type.shape[-1:])[0], "k")

        def products(*i: Any) -> Any:
            return te.sum(te.at(xs[0], x_type, *i[:-1], k) * weight_at(te, xs[1], d_type, i[-1], k), [k])

        sums = tensor(te, out, products, "digit_dense")

        def finish(*i: Any) -> Any:
            value = te.at(sums, out, *i) * xs[2][i[-1]]
            return value + xs[3][i[-1]] if len(xs) == 4 else value

        return [tensor(te, out, finish, "digit_dense_unit")]

    def flops(self, x: TensorType, d: TensorType, unit: TensorType, b: TensorType | None = None) -> int:
        """Count two for each multiply-add of a weight, one for each bias."""
        return self.infer(x, d, unit, b).elements * (2 * fixed(self.name, x.shape[-1:])[0] + (b is not None))

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give one row, many rows, more axes, features beside fours, no elements, and digits in blocks."""
        yield _example((1, 12), 5, bias=True)
        yield _example((2, 3, 33), 18)
        yield _example((6,), 3, bias=True)
        yield _example((3, 5, 64), 32, bias=True, block=16)
        yield _example((0, 8), 4)
        yield _example((2, 0), 3, bias=True)


def _example(x: tuple[int, ...], outputs: int, bias: bool = False, block: int = 1) -> Example:
    """Make an example with weights of very different outputs."""
    rows, vector = TensorType(x), TensorType((outputs,))
    digits = TensorType((outputs, -(-x[-1] // TOGETHER), DIGITS, TOGETHER), DType.I8)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        weights = random_array(rng, TensorType((outputs, x[-1])))
        weights = weights * np.float32(2.0) ** rng.integers(-9, 10, (outputs, 1)).astype(np.float32)
        vectors = (random_array(rng, vector),) if bias else ()
        return (random_array(rng, rows), *weight_digits(weights), *vectors)

    layout = digits_layout(block) if block > 1 else None
    return Example(DigitDense(), (rows, digits.with_layout(layout), vector, *((vector,) if bias else ())), draw)
