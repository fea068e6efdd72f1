"""Winograd's minimal filtering: its matrices, and the operator that transforms convolution weights.

    y = A' [(G w G') * (B' x B)] A,   y m x m outputs, w a 3x3 kernel, x a tile of (m + 2) x (m + 2) inputs

takes (m + 2)^2 products for m^2 outputs where the definition takes 9 m^2.  Source: Lavin and Gray, "Fast Algorithms
for Convolutional Neural Networks", CVPR 2016, section 4; the matrices by Cook and Toom's method from interpolation
points, as in Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural
Networks", ACM TOMS 46(4), 2020, section 3, which also shows that other points than Lavin's are more accurate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, Kind, Op
from cnnc.ir.types import DType, TensorType
from cnnc.ops.blocked import plain_only
from cnnc.ops.broadcast import working_dtype
from cnnc.ops.numeric import cast_to, check_floats

KERNEL = 3
"""The kernels are 3x3."""

POINTS: dict[int, tuple[Fraction, ...]] = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
}
"""The points by output tile, beside the one at infinity; opposite ones follow each other.

For F(4x4) they leave a quarter of the largest error of Lavin's 0, 1, -1, 2, -2 and half of the mean one, and all
entries of A and B are exact in binary.
"""


@dataclass(frozen=True)
class Transform:
    """The matrices of F(m x m, 3 x 3), exactly.

    `data` is B' [m + 2, m + 2], `weight` G [m + 2, 3], `output` A' [m, m + 2].
    """

    data: tuple[tuple[Fraction, ...], ...]
    weight: tuple[tuple[Fraction, ...], ...]
    output: tuple[tuple[Fraction, ...], ...]


@lru_cache
def transform(tile: int) -> Transform:
    """Make the matrices for output tiles of `tile` x `tile`."""
    points = POINTS[tile]
    zero = Fraction(0)
    data, weight = [], []
    for point in points:
        others = [other for other in points if other != point]
        scale = _value(_polynomial(others), point)
        data.append((*_polynomial(others), zero))
        weight.append(tuple(point**power / scale for power in range(KERNEL)))
    data.append(_polynomial(points))
    weight.append((*(zero,) * (KERNEL - 1), Fraction(1)))
    output = [(*(point**power for point in points), Fraction(power == tile - 1)) for power in range(tile)]
    return Transform(tuple(data), tuple(weight), tuple(output))


def _polynomial(roots: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Give the coefficients of the product of (x - root), that of 1 first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [high - root * low for high, low in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return tuple(coefficients)


def _value(coefficients: Sequence[Fraction], x: Fraction) -> Fraction:
    return sum((c * x**power for power, c in enumerate(coefficients)), Fraction(0))


def weight_matrix(tile: int) -> np.ndarray:
    """Give G [tile + 2, 3] in float64."""
    return np.array(transform(tile).weight, np.float64)


def inverse_weight_matrix(tile: int) -> np.ndarray:
    """Give the left inverse of G, [3, tile + 2] in float64: the least squares one."""
    return np.linalg.pinv(weight_matrix(tile))


def winograd_tile(algorithm: str) -> int | None:
    """Give the output tile of a convolution's algorithm, `winograd2` or `winograd4`; None for any other."""
    return next((tile for tile in POINTS if algorithm == f"winograd{tile}"), None)


def winograd_layout(input_block: int, output_block: int) -> Layout:
    """Give the layout of transformed weights: the products of one position in the tile lie together."""
    return Layout(f"HWOI{input_block}i{output_block}o")


def spatial_weight(u: np.ndarray, tile: int) -> np.ndarray:
    """Give the 3x3 weight w[O,I,3,3] of a transformed one u[O,I,tile+2,tile+2], in float64."""
    inverse = inverse_weight_matrix(tile)
    weight: np.ndarray = np.einsum("ra,oiab,sb->oirs", inverse, u.astype(np.float64), inverse, optimize=True)
    return weight


def spatial_weight_tensor(te: Any, u: Any, type_: TensorType, tile: int) -> Any:
    """Describe `spatial_weight` as a tensor [O,I,3,3]: one 1-D transform after the other."""
    o, i, size, _ = type_.static_shape
    rows = inverse_weight_matrix(tile).tolist()
    half = te.compute(
        (o, i, KERNEL, size),
        lambda o, i, r, b: _combined(te, rows, r, [te.at(u, type_, o, i, a, b) for a in range(size)], type_.dtype),
        "weight_columns",
    )
    return te.compute(
        (o, i, KERNEL, KERNEL),
        lambda o, i, r, s: _combined(te, rows, s, [half[o, i, r, b] for b in range(size)], type_.dtype),
        "weight_rows",
    )


def _combined(te: Any, matrix: Sequence[Sequence[float]], row: Any, values: Sequence[Any], dtype: DType) -> Any:
    """Write (matrix @ values)[row], the row known only at run time."""
    sums = []
    for coefficients in matrix:
        terms = [v * te.const(c, dtype) for c, v in zip(coefficients, values, strict=True) if c]
        sums.append(sum(terms[1:], terms[0]))
    chosen = sums[-1]
    for number in reversed(range(len(sums) - 1)):
        chosen = te.where(row == number, sums[number], chosen)
    return chosen


_ROWS = 4096
"""Kernels transformed at a time."""


@dataclass(frozen=True)
class WinogradWeight(Op):
    """Transform the weight of a 3x3 convolution for output tiles of `tile` x `tile`.

    u[o,i] = G w[o,i] G'   computed in float64, rounded once

    w[O,I,3,3] -> u[O,I,tile+2,tile+2]
    """

    tile: int

    kind: ClassVar[Kind] = Kind.REDUCTION

    def infer(self, w: TensorType) -> TensorType:
        """Give [O,I,tile+2,tile+2]; raises `ShapeError` for a weight that is not 3x3 floats, or an unknown tile."""
        check_floats(self.name, weight=w)
        if self.tile not in POINTS:
            raise ShapeError(f"{self.name}: tile={self.tile} is not known; use one of {', '.join(map(str, POINTS))}")
        if w.rank != 4 or w.shape[2:] != (KERNEL, KERNEL):
            raise ShapeError(f"{self.name}: weight {w} must have {KERNEL}x{KERNEL} kernels")
        return w.with_shape((*w.shape[:2], self.tile + 2, self.tile + 2))

    def infer_layout(self, w: TensorType) -> tuple[Layout | None, ...]:
        """Take and give a plain tensor."""
        plain_only(self.name, weight=w)
        return (None,)

    def reference(self, w: np.ndarray) -> np.ndarray:
        """Multiply by G from both sides: one product with the Kronecker square of G, in pieces that stay in cache."""
        g = weight_matrix(self.tile)
        both = np.kron(g, g).T
        kernels = w.reshape(-1, KERNEL * KERNEL)
        u = np.empty((len(kernels), both.shape[1]), w.dtype)
        for start in range(0, len(kernels), _ROWS):
            rows = slice(start, start + _ROWS)
            u[rows] = kernels[rows].astype(np.float64) @ both
        return u.reshape(*w.shape[:2], len(g), len(g))

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Transform the rows, then the columns."""
        type_ = types[0]
        out = self.infer(type_)
        wide = working_dtype(type_.dtype)
        g = weight_matrix(self.tile).tolist()
        o, i, size, _ = out.static_shape

        def column(o: Any, i: Any, a: Any, s: Any) -> Any:
            values = [cast_to(te, te.at(xs[0], type_, o, i, r, s), type_.dtype, wide) for r in range(KERNEL)]
            return _combined(te, g, a, values, wide)

        half = te.compute((o, i, size, KERNEL), column, "weight_columns")

        def element(o: Any, i: Any, a: Any, b: Any) -> Any:
            value = _combined(te, g, b, [half[o, i, a, s] for s in range(KERNEL)], wide)
            return cast_to(te, value, wide, type_.dtype)

        return [te.compute(out.static_shape, element, self.name)]

    def flops(self, w: TensorType) -> int:
        """Count two for each multiply-add of both transforms."""
        size = self.tile + 2
        return 2 * w.static_shape[0] * w.static_shape[1] * KERNEL * size * (KERNEL + size)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give both tiles, odd channels, other dtypes, no elements."""
        yield Example(cls(4), (TensorType((5, 3, 3, 3)),))
        yield Example(cls(2), (TensorType((4, 6, 3, 3)),))
        yield Example(cls(4), (TensorType((2, 3, 3, 3), DType.F64),))
        yield Example(cls(2), (TensorType((2, 3, 3, 3), DType.F16),))
        yield Example(cls(4), (TensorType((0, 3, 3, 3)),))
