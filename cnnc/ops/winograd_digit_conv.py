"""Convolution by Winograd's algorithm whose transformed weights are fixed-point numbers of three int8 digits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, Kind, Op, random_array
from cnnc.ir.types import DType, TensorType
from cnnc.ops.blocked import channel_block, channel_layout, every, fixed, plain_only, tensor
from cnnc.ops.broadcast import widen
from cnnc.ops.digit_conv import DIGITS, TOGETHER, weight_at, weight_digits, weights_of
from cnnc.ops.numeric import check_vector, narrow
from cnnc.ops.window import Window
from cnnc.ops.winograd import TILES, WinogradWeight, is_supported, spatial_weight_tensor, transforms, winograd_conv


def digit_tile(algorithm: str) -> int | None:
    """Give the output tile of Winograd's algorithm with weights in digits, as 4 of `winograd4_int8x3`; else None."""
    return next((tile for tile in TILES if algorithm == f"winograd{tile}_int8x3"), None)


def positions_digits_layout(block: int) -> Layout:
    """Give the layout of digits for images in blocks: those of one position in a tile lie together."""
    return Layout(f"NOIH{block}i{block}oW")


def positions_unit_layout(block: int) -> Layout:
    """Give the layout of units for images in blocks."""
    return Layout(f"NO{block}o")


def transformed_digits(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the digits i8[P,O,ceil(I/4),3,4] of transformed weights u[O,I,rows,columns], and the units f32[P,O].

    P counts the positions in a tile, row by row; each position of an output has a unit of its own.
    """
    outputs, channels, *size = u.shape
    rows = np.moveaxis(u.reshape(outputs, channels, -1), 2, 0).reshape(-1, channels)
    digits, unit = weight_digits(rows)
    positions = math.prod(size)
    return digits.reshape(positions, outputs, *digits.shape[1:]), unit.reshape(positions, outputs)


@dataclass(frozen=True)
class WinogradDigitConv(Op):
    """Convolve by Winograd's algorithm with fixed-point weights, stride 1.

    y = A' [(unit * digits) * (B' x D)] C + b     for tiles of `tile` outputs along each axis of more than one tap

    Inputs x[N,I,H,W] of f32, digits i8[P,O,ceil(I/4),3,4] and units f32[P,O] of the P positions in a tile, optionally
    b[O]; pad is (begin..., end...).  The matrices are those of `winograd_weight`, the digits those of `digit_conv`.
    """

    tile: int
    kernel: tuple[int, int]
    pad: tuple[int, int, int, int]

    kind: ClassVar[Kind] = Kind.REDUCTION

    @property
    def window(self) -> Window:
        """The windows."""
        return Window(self.kernel, (1, 1), self.pad, (1, 1))

    @property
    def positions(self) -> tuple[int, int]:
        """Rows and columns of positions in a tile."""
        vertical, horizontal = transforms(self.tile, self.kernel, (1, 1))
        return vertical.positions, horizontal.positions

    def infer(self, x: TensorType, d: TensorType, unit: TensorType, b: TensorType | None = None) -> TensorType:
        """Give [N,O,...]; raises `ShapeError` where channels, dtypes, digits or windows do not fit."""
        if self.tile not in TILES or not all(is_supported(self.tile, taps, 1) for taps in self.kernel):
            raise ShapeError(f"{self.name}: there are no matrices for tile={self.tile}, kernel={self.kernel}")
        if x.rank != 4 or x.dtype is not DType.F32:
            raise ShapeError(f"{self.name}: x must be f32 images [N,C,H,W], not {x}")
        (channels,) = fixed(self.name, x.shape[1:2])
        inner = (-(-channels // TOGETHER), DIGITS, TOGETHER)
        positions = math.prod(self.positions)
        if d.rank != 5 or d.dtype is not DType.I8 or d.shape[0] != positions or d.shape[2:] != inner:
            raise ShapeError(f"{self.name}: digits must be i8[{positions},O,{','.join(map(str, inner))}], not {d}")
        if unit.dtype is not DType.F32 or unit.shape != d.shape[:2]:
            raise ShapeError(f"{self.name}: units must be f32[{positions},{d.shape[1]}], not {unit}")
        self.window.check(self.name, x)
        check_vector(self.name, "bias", b, d.shape[1], "output channel")
        return x.with_shape((x.shape[0], d.shape[1], *self.window.output(self.name, x.shape[2:])))

    def infer_layout(
        self, x: TensorType, d: TensorType, unit: TensorType, b: TensorType | None = None
    ) -> tuple[Layout | None, ...]:
        """Take NCHW{b}c with NOIH{b}i{b}oW and NO{b}o and give NCHW{b}c, or plain tensors; the bias is plain."""
        block = channel_block(self.name, "x", x)
        plain_only(self.name, bias=b)
        wanted = (None, None) if block == 1 else (positions_digits_layout(block), positions_unit_layout(block))
        if (d.layout, unit.layout) != wanted:
            raise ShapeError(f"{self.name}: for x : {x} digits and units must be in layouts {wanted}, not {d}, {unit}")
        return (channel_layout(x.rank, block),)

    def reference(self, x: np.ndarray, d: np.ndarray, unit: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
        """Compute it by the algorithm, with the transformed weights that digits and units are."""
        weights = weights_of(d, x.shape[1]) * unit[:, :, None].astype(np.float64)
        u = np.moveaxis(weights, 0, 2).reshape(d.shape[1], x.shape[1], *self.positions)
        sizes = tuple(int(s) for s in self.window.output(self.name, x.shape[2:]) if isinstance(s, int))
        y = winograd_conv(x, u, self.tile, self.window, sizes)
        return narrow(y if b is None else y + widen(b).reshape(-1, 1, 1), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Recover the weights, reduce over channels and taps, then add the bias."""
        x_type, d_type, unit_type = types[:3]
        out = self.infer(*types).with_layout(self.infer_layout(*types)[0])
        (channels,) = fixed(self.name, x_type.shape[1:2])
        outputs, (_, columns) = d_type.static_shape[1], self.positions
        u_type = TensorType((outputs, channels, *self.positions))

        def transformed(o: Any, i: Any, a: Any, b: Any) -> Any:
            at = a * columns + b
            return weight_at(te, xs[1], d_type, at, o, i) * te.at(xs[2], unit_type, at, o)

        u = te.compute(u_type.static_shape, transformed, "transformed_weight")
        w_type = TensorType((outputs, channels, *self.kernel))
        weights = spatial_weight_tensor(te, u, u_type, self.tile, (1, 1))
        spatial, sizes = fixed(self.name, x_type.shape[2:]), fixed(self.name, out.shape[2:])
        ic = te.reduce_axis(channels, "ic")
        taps = [te.reduce_axis(k, f"k{i}") for i, k in enumerate(self.kernel)]

        def products(n: Any, o: Any, *p: Any) -> Any:
            where = self.window.position(p, taps)
            value = te.at(xs[0], x_type, n, ic, *where)
            conditions = self.window.in_bounds(where, spatial, sizes)
            if conditions:
                value = te.where(every(te, conditions), value, te.const(0, DType.F32))
            weight = te.at(weights, w_type, o, ic, *taps)
            if out.layout:
                weight = te.where(o < outputs, weight, te.const(0, DType.F32))
            return te.sum(value * weight, [ic, *taps])

        sums = tensor(te, out, products, "winograd_digit_conv", guard=False)

        def finish(n: Any, o: Any, *p: Any) -> Any:
            value = te.at(sums, out, n, o, *p)
            return value + xs[3][o] if len(xs) == 4 else value

        return [tensor(te, out, finish, "winograd_digit_conv_bias")]

    def flops(self, x: TensorType, d: TensorType, unit: TensorType, b: TensorType | None = None) -> int:
        """Count two for each multiply-add of the definition, one for each bias."""
        terms = fixed(self.name, x.shape[1:2])[0] * math.prod(self.kernel)
        return self.infer(x, d, unit, b).elements * (2 * terms + (b is not None))

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give tiles, kernels, channels beside fours and blocks, paddings, and blocked layouts."""
        yield _example(4, (1, 3, 9, 7), 5, (1, 1, 1, 1), bias=True)
        yield _example(2, (2, 6, 5, 6), 3, (0, 2, 1, 0))
        yield _example(4, (1, 9, 9, 8), 10, (1, 1, 1, 1), bias=True, block=8)
        yield _example(2, (1, 36, 5, 4), 16, (0, 3, 0, 3), kernel=(1, 7), block=16)
        yield _example(4, (0, 8, 4, 4), 8, (1, 1, 1, 1))


def _example(
    tile: int,
    x: tuple[int, ...],
    outputs: int,
    pad: tuple[int, int, int, int],
    kernel: tuple[int, int] = (3, 3),
    bias: bool = False,
    block: int = 1,
) -> Example:
    """Make an example with weights that have been transformed, which not any digits would be."""
    op = WinogradDigitConv(tile, kernel, pad)
    image = TensorType(x, DType.F32, channel_layout(4, block))
    spatial, vector = TensorType((outputs, x[1], *kernel)), TensorType((outputs,))
    digits = TensorType((math.prod(op.positions), outputs, -(-x[1] // TOGETHER), DIGITS, TOGETHER), DType.I8)
    unit = TensorType(digits.shape[:2])
    if block > 1:
        digits, unit = (
            digits.with_layout(positions_digits_layout(block)),
            unit.with_layout(positions_unit_layout(block)),
        )

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        u = WinogradWeight(tile).reference(random_array(rng, spatial))
        return (random_array(rng, image), *transformed_digits(u), *((random_array(rng, vector),) if bias else ()))

    return Example(op, (image, digits, unit, *((vector,) if bias else ())), draw)
