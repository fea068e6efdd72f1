"""Winograd's minimal filtering: its matrices, and the operator that transforms convolution weights.

    y = A' [(G w H') * (B' x D)] C     A, B, G filter along the rows, C, D, H along the columns

Along an axis, a tile of m outputs of a kernel of k taps takes m + k - 1 products in place of m k.  With a stride of
s, each s-th input meets each s-th tap only: that many filters of stride 1, whose outputs are added up.  A filter of one
tap is no saving, and its products share their weight.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4; the matrices by Cook
and Toom's method from interpolation points, as in Barabasz et al., "Error Analysis and Improving the Accuracy of
Winograd Convolution for Deep Neural Networks", ACM TOMS 46(4), 2020, section 3, which also shows that other points
than Lavin's are more accurate; strides as in Huang et al., "DWM: A Decomposable Winograd Method for Convolution
Acceleration", AAAI 2020, section 3.
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
from cnnc.ops.window import Window

TILES = (2, 4, 6)
"""The outputs, along each axis, that are computed together; along an axis of one tap it is always one."""

LONGEST_KERNEL = 7
"""Taps along an axis; transformed weights tell by their number which kernel they come from."""


def _with_opposites(*points: Fraction) -> tuple[Fraction, ...]:
    return tuple(signed for point in points for signed in (point, -point))


POINTS: dict[int, tuple[Fraction, ...]] = {
    2: _with_opposites(Fraction(1)),
    3: (Fraction(0), *_with_opposites(Fraction(1))),
    4: _with_opposites(Fraction(1, 2), Fraction(5, 4)),
    5: (Fraction(0), *_with_opposites(Fraction(3, 4), Fraction(3, 2))),
    7: (Fraction(0), *_with_opposites(Fraction(1, 2), Fraction(1), Fraction(2))),
}
"""Interpolation points by how many there are beside the one at infinity; opposite ones follow each other.

They were chosen for small errors (those of 3x3 kernels in tiles of 4 are a quarter of what Lavin's 0, 1, -1, 2, -2
make), among those with which all entries of the matrices but the weights' are exact in binary.
"""


@dataclass(frozen=True)
class Transform:
    """The filter along one axis, exactly: y = output @ ((weight @ w)[weight_row] * (data @ x)).

    `data` is [positions, inputs], `weight` [weights, taps], `output` [tile, positions].
    """

    data: tuple[tuple[Fraction, ...], ...]
    weight: tuple[tuple[Fraction, ...], ...]
    output: tuple[tuple[Fraction, ...], ...]
    stride: int

    @property
    def tile(self) -> int:
        """Outputs computed together."""
        return len(self.output)

    @property
    def positions(self) -> int:
        """Products for a tile."""
        return len(self.data)

    @property
    def inputs(self) -> int:
        """Inputs read for a tile."""
        return len(self.data[0])

    @property
    def weights(self) -> int:
        """Transformed weights; the last positions share the last."""
        return len(self.weight)

    @property
    def step(self) -> int:
        """Inputs from one tile to the next."""
        return self.tile * self.stride


def is_supported(tile: int, kernel: int, stride: int) -> bool:
    """Whether there are points for a kernel of that many taps."""
    if kernel == 1 or kernel > LONGEST_KERNEL:
        return kernel == 1
    filters = [taps for taps in _taps_by_phase(kernel, stride) if taps != 1]
    return all(tile + taps - 2 in POINTS for taps in filters) and _taps_by_phase(kernel, stride).count(1) < 2


def _taps_by_phase(kernel: int, stride: int) -> list[int]:
    """Count the taps that meet inputs 0, 1, ... of every `stride`."""
    return [len(range(phase, kernel, stride)) for phase in range(min(stride, kernel))]


@lru_cache
def transform(tile: int, kernel: int, stride: int) -> Transform:
    """Make the matrices of an axis; it must be supported.  An axis of one tap is not tiled."""
    if kernel == 1:
        one = ((Fraction(1),),)
        return Transform(one, one, one, stride)
    inputs = (tile - 1) * stride + kernel
    data, weight, columns = [], [], []
    # The filter of one tap, whose positions share a weight, comes last.
    phases = sorted(enumerate(_taps_by_phase(kernel, stride)), key=lambda phase: phase[1] == 1)
    for phase, taps in phases:
        b, g, a = _filter(tile, taps)
        data += [_spread(row, inputs, phase, stride) for row in b]
        weight += [_spread(row, kernel, phase, stride) for row in g]
        columns += list(zip(*a, strict=True))
    return Transform(tuple(data), tuple(weight), tuple(zip(*columns, strict=True)), stride)


Matrix = tuple[tuple[Fraction, ...], ...]


def _filter(tile: int, taps: int) -> tuple[Matrix, Matrix, Matrix]:
    """Give B' [n, n], G [n, taps] and A' [tile, n] of stride 1, n = tile + taps - 1; for one tap G is of one row."""
    zero, one = Fraction(0), Fraction(1)
    if taps == 1:
        identity = tuple(tuple(one if i == j else zero for j in range(tile)) for i in range(tile))
        return identity, ((one,),), identity
    points = POINTS[tile + taps - 2]
    data, weight = [], []
    for point in points:
        others = [other for other in points if other != point]
        scale = _value(_polynomial(others), point)
        data.append((*_polynomial(others), zero))
        weight.append(tuple(point**power / scale for power in range(taps)))
    data.append(_polynomial(points))
    weight.append((*(zero,) * (taps - 1), one))
    output = [(*(point**power for point in points), Fraction(power == tile - 1)) for power in range(tile)]
    return tuple(data), tuple(weight), tuple(output)


def _spread(row: Sequence[Fraction], size: int, first: int, step: int) -> tuple[Fraction, ...]:
    """Put a row's entries `step` apart, zeros between."""
    spread = [Fraction(0)] * size
    spread[first : first + len(row) * step : step] = row
    return tuple(spread)


def _polynomial(roots: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Give the coefficients of the product of (x - root), that of 1 first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [high - root * low for high, low in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return tuple(coefficients)


def _value(coefficients: Sequence[Fraction], x: Fraction) -> Fraction:
    return sum((c * x**power for power, c in enumerate(coefficients)), Fraction(0))


Pair = tuple[int, int]


def transforms(tile: int, kernel: Sequence[int], stride: Sequence[int]) -> tuple[Transform, Transform]:
    """Make the matrices of both axes."""
    vertical, horizontal = (transform(tile, k, s) for k, s in zip(kernel, stride, strict=True))
    return vertical, horizontal


def weight_matrices(tile: int, kernel: Sequence[int], stride: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Give G and H in float64."""
    g, h = (np.array(axis.weight, np.float64) for axis in transforms(tile, kernel, stride))
    return g, h


def spatial_kernel(tile: int, weights: Sequence[int], stride: Sequence[int]) -> Pair | None:
    """Give the kernel that transformed weights of this height and width come from, if there is one."""
    found = []
    for count, step in zip(weights, stride, strict=True):
        kernels = [k for k in range(1, LONGEST_KERNEL + 1) if is_supported(tile, k, step)]
        found += [k for k in kernels if transform(tile, k, step).weights == count][:1]
    return (found[0], found[1]) if len(found) == 2 else None


def winograd_tile(algorithm: str) -> int | None:
    """Give the output tile of a convolution's algorithm, as 4 of `winograd4`; None for any other."""
    return next((tile for tile in TILES if algorithm == f"winograd{tile}"), None)


def winograd_layout(input_block: int, output_block: int) -> Layout:
    """Give the layout of transformed weights: the products of one position in the tile lie together."""
    return Layout(f"HWOI{input_block}i{output_block}o")


def winograd_rows_layout() -> Layout:
    """Give the layout of transformed weights for plain images: all outputs of a position and an input in a row.

    They lie in blocks of 16 bytes of f32, which a GPU copies at once.
    """
    return Layout("HWIO4o")


def spatial_matrices(type_: Sequence[int], tile: int, stride: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Give the left inverses of G and H, the least squares ones, for transformed weights of a shape."""
    kernel = spatial_kernel(tile, type_[2:], stride)
    if kernel is None:
        raise ShapeError(f"no weight is transformed into {list(type_)} for tile={tile}, stride={tuple(stride)}")
    g, h = weight_matrices(tile, kernel, stride)
    return np.linalg.pinv(g), np.linalg.pinv(h)


def winograd_conv(x: np.ndarray, u: np.ndarray, tile: int, window: Window, output: Sequence[int]) -> np.ndarray:
    """Convolve by Winograd's algorithm in float64, bias left out, with transformed weights u[O,I,...] of any values.

    Rounded ones are no transform of any weight, so this is what they mean.
    """
    axes = transforms(tile, window.kernel, window.stride)
    counts = [-(-size // axis.tile) for size, axis in zip(output, axes, strict=True)]
    sizes = [(count - 1) * axis.step + axis.inputs for count, axis in zip(counts, axes, strict=True)]
    widths = [
        (begin, max(size - begin - extent, 0))
        for begin, size, extent in zip(window.begin, sizes, x.shape[2:], strict=True)
    ]
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), *widths))[:, :, : sizes[0], : sizes[1]]
    tiles = np.lib.stride_tricks.sliding_window_view(padded, tuple(axis.inputs for axis in axes), (2, 3))
    tiles = tiles[:, :, :: axes[0].step, :: axes[1].step]

    b, d = (np.array(axis.data, np.float64) for axis in axes)
    a, c = (np.array(axis.output, np.float64) for axis in axes)
    rows, columns = (np.minimum(np.arange(axis.positions), axis.weights - 1) for axis in axes)
    data = np.einsum("ar,ncijrs,bs->abcnij", b, tiles, d, optimize=True)
    weights = u.astype(np.float64)[:, :, rows][:, :, :, columns].transpose(2, 3, 0, 1)
    products = weights @ data.reshape(*data.shape[:3], -1)
    products = products.reshape(*products.shape[:3], *data.shape[3:])
    y = np.einsum("ra,abonij,sb->noirjs", a, products, c, optimize=True)
    whole = y.reshape(len(x), len(u), counts[0] * axes[0].tile, counts[1] * axes[1].tile)
    result: np.ndarray = whole[:, :, : output[0], : output[1]]
    return result


def spatial_weight_tensor(te: Any, u: Any, type_: TensorType, tile: int, stride: Sequence[int]) -> Any:
    """Describe the weight of a transformed one as a tensor: one 1-D transform after the other."""
    o, i, height, width = type_.static_shape
    rows, columns = (matrix.tolist() for matrix in spatial_matrices(type_.static_shape, tile, stride))
    half = te.compute(
        (o, i, len(rows), width),
        lambda o, i, r, b: _combined(te, rows, r, [te.at(u, type_, o, i, a, b) for a in range(height)], type_.dtype),
        "weight_columns",
    )
    return te.compute(
        (o, i, len(rows), len(columns)),
        lambda o, i, r, s: _combined(te, columns, s, [half[o, i, r, b] for b in range(width)], type_.dtype),
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


_PRODUCTS = 1 << 17
"""Multiply-adds done at a time: few enough to stay in cache, and for BLAS not to start threads that cost more."""


@dataclass(frozen=True)
class WinogradWeight(Op):
    """Transform the weight of a convolution for output tiles of `tile` x `tile`.

    u[o,i] = G w[o,i] H'   computed in float64, rounded once

    w[O,I,...] -> u[O,I,...], for a 3x3 kernel of stride 1 [O,I,tile+2,tile+2]; `stride` is the convolution's.
    """

    tile: int
    stride: tuple[int, int] = (1, 1)

    kind: ClassVar[Kind] = Kind.REDUCTION

    def matrices(self, w: TensorType | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give G and H for a weight."""
        shape = w.static_shape if isinstance(w, TensorType) else w.shape
        return weight_matrices(self.tile, shape[2:], self.stride)

    def infer(self, w: TensorType) -> TensorType:
        """Give the transformed weight; raises `ShapeError` for a kernel or a tile there are no matrices for."""
        check_floats(self.name, weight=w)
        if self.tile not in TILES:
            raise ShapeError(f"{self.name}: tile={self.tile} is not known; use one of {', '.join(map(str, TILES))}")
        if w.rank != 4 or not all(map(is_supported, (self.tile,) * 2, w.static_shape[2:], self.stride)):
            raise ShapeError(f"{self.name}: there are no matrices for kernels of {w} with stride={self.stride}")
        return w.with_shape((*w.shape[:2], *(len(matrix) for matrix in self.matrices(w))))

    def infer_layout(self, w: TensorType) -> tuple[Layout | None, ...]:
        """Take and give a plain tensor."""
        plain_only(self.name, weight=w)
        return (None,)

    def reference(self, w: np.ndarray) -> np.ndarray:
        """Multiply from both sides: one product with the Kronecker product of G and H, in pieces that stay in cache."""
        g, h = self.matrices(w)
        both = np.kron(g, h).T
        kernels = w.reshape(-1, both.shape[0])
        u = np.empty((len(kernels), both.shape[1]), w.dtype)
        count = max(1, _PRODUCTS // both.size)
        for start in range(0, len(kernels), count):
            rows = slice(start, start + count)
            u[rows] = kernels[rows].astype(np.float64) @ both
        return u.reshape(*w.shape[:2], len(g), len(h))

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Transform the rows, then the columns."""
        type_ = types[0]
        out = self.infer(type_)
        wide = working_dtype(type_.dtype)
        g, h = (matrix.tolist() for matrix in self.matrices(type_))
        (o, i, height, _), (kh, kw) = out.static_shape, type_.static_shape[2:]

        def column(o: Any, i: Any, a: Any, s: Any) -> Any:
            values = [cast_to(te, te.at(xs[0], type_, o, i, r, s), type_.dtype, wide) for r in range(kh)]
            return _combined(te, g, a, values, wide)

        half = te.compute((o, i, height, kw), column, "weight_columns")

        def element(o: Any, i: Any, a: Any, b: Any) -> Any:
            value = _combined(te, h, b, [half[o, i, a, s] for s in range(kw)], wide)
            return cast_to(te, value, wide, type_.dtype)

        return [te.compute(out.static_shape, element, self.name)]

    def flops(self, w: TensorType) -> int:
        """Count two for each multiply-add of both transforms."""
        (o, i, height, width), (kh, kw) = self.infer(w).static_shape, w.static_shape[2:]
        return 2 * o * i * height * kw * (kh + width)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give all tiles, odd channels, other kernels, strides and dtypes, no elements."""
        yield Example(cls(4), (TensorType((5, 3, 3, 3)),))
        yield Example(cls(2), (TensorType((4, 6, 3, 3)),))
        yield Example(cls(6), (TensorType((4, 3, 3, 3)),))
        yield Example(cls(4), (TensorType((2, 3, 5, 5)),))
        yield Example(cls(2), (TensorType((2, 3, 1, 7)),))
        yield Example(cls(4, (2, 2)), (TensorType((3, 2, 3, 3)),))
        yield Example(cls(2, (2, 1)), (TensorType((3, 2, 5, 3)),))
        yield Example(cls(4), (TensorType((2, 3, 3, 3), DType.F64),))
        yield Example(cls(2), (TensorType((2, 3, 3, 3), DType.F16),))
        yield Example(cls(4), (TensorType((0, 3, 3, 3)),))
