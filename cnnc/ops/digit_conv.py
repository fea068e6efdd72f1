"""Convolution whose weights are fixed-point numbers of three int8 digits."""

from __future__ import annotations

import itertools
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
from cnnc.ops.conv import Conv
from cnnc.ops.numeric import check_vector, narrow
from cnnc.ops.window import Window

DIGITS, TOGETHER = 3, 4
"""The digits of a weight, and the channels that lie beside each other: matrix units add up four products of int8."""

MOST_TERMS = 1 << 15
"""Of more numbers, sums of three products of digits might be too large for int32."""

PLACES = (2.0**-7, 2.0**-15, 2.0**-23)
"""What the digits count, the highest first, in units of an output."""


def digits_layout(block: int) -> Layout:
    """Give the layout of digits for images in blocks: for 16 of them, those of 16 outputs and 64 channels together."""
    return Layout(f"OIH{block}i{block}oW")


def digits_bytes(outputs: int, channels: int, *positions: int) -> int:
    """Count the bytes of digits and units of weights, as they lie in blocks of 16 outputs and 64 channels."""
    rows = math.prod(positions) * (-(-outputs // 16) * 16)
    return rows * (DIGITS * (-(-channels // 64) * 64) + 4)


def conv_digits(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the digits i8[O,taps*ceil(I/4),3,4] of finite weights w[O,I,kh,kw], tap by tap, and the units f32[O]."""
    outputs, channels, *kernel = w.shape
    rows = np.zeros((outputs, *kernel, -(-channels // TOGETHER) * TOGETHER), np.float32)
    rows[..., :channels] = np.moveaxis(w, 1, -1)
    return weight_digits(rows.reshape(outputs, math.prod(rows.shape[1:])))


def weight_digits(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the digits i8[O,ceil(I/4),3,4] of finite weights [O,I], and the unit f32[O] of each output.

    The unit is the least power of two that no weight of the output reaches, once rounded to 24 bits of it.
    """
    outputs, channels = rows.shape
    rows = rows.astype(np.float32, copy=False)
    largest = np.maximum(rows.max(axis=1, initial=0.0), -rows.min(axis=1, initial=0.0))
    exponent = np.frexp(largest)[1]
    exponent += np.rint(np.ldexp(largest, 23 - exponent)) > _LARGEST
    exponent = np.maximum(exponent, -126)
    digits = np.empty((outputs, -(-channels // TOGETHER), DIGITS, TOGETHER), np.int8)
    step = max(_NEAR // max(channels, 1), 1)
    for first in range(0, outputs, step):
        some = slice(first, first + step)
        # Scaled by a power of two, whole numbers below 2^24 are float32, too.
        _write_digits(np.rint(np.ldexp(rows[some], (23 - exponent[some])[:, None])), digits[some])
    return digits, np.ldexp(np.float32(1.0), exponent).astype(np.float32)


def _write_digits(rows: np.ndarray, digits: np.ndarray) -> None:
    """Write the digits of whole numbers below 2^23, one by one, so that each copy is of as many as there are."""
    numbers = np.full((len(rows), digits.shape[1] * TOGETHER), _HALVES, "<i4")
    numbers[:, : rows.shape[1]] += rows.astype(np.int32)
    # 128 was added to each digit, so that none borrows from the next: their bytes have the sign bit flipped.
    numbers ^= _HALVES
    parts = numbers.view(np.int8).reshape(len(rows), -1, TOGETHER, 4)
    for digit, place in itertools.product(range(DIGITS), range(TOGETHER)):
        digits[:, :, digit, place] = parts[:, :, place, DIGITS - 1 - digit]


_NEAR = 1 << 16
"""Weights that are split at a time: what is made of them on the way stays in a core's cache."""

_HALVES, _LARGEST = 0x808080, 0x7F7F7F
"""128 in each digit, and the largest number of three digits."""


def weights_of(digits: np.ndarray, channels: int) -> np.ndarray:
    """Give the numbers w[...,O,I] that digits [...,O,ceil(I/4),3,4] are, in units of their outputs, as float64."""
    numbers: np.ndarray = np.einsum("...ikj,k->...ij", digits.astype(np.float64), np.array(PLACES))
    return numbers.reshape(*digits.shape[:-3], numbers.shape[-2] * TOGETHER)[..., :channels]


def weight_at(te: Any, digits: Any, type_: TensorType, *index: Any) -> Any:
    """Write one of these numbers, at [...,o,i], as float32."""
    *others, channel = index
    parts = (te.at(digits, type_, *others, channel // TOGETHER, k, channel % TOGETHER) for k in range(DIGITS))
    high, middle, low = (te.cast(v, DType.F32) * te.const(p, DType.F32) for v, p in zip(parts, PLACES, strict=True))
    return high + middle + low


@dataclass(frozen=True)
class DigitConv(Op):
    """Convolve with fixed-point weights.

    y[n,o,p] = b[o] + unit[o] * sum over k, i of x[n, i, p*stride - pad + k*dilation] * w[o,k,i]
    w        = 2^-7 d_0 + 2^-15 d_1 + 2^-23 d_2

    Inputs x[N,I,H,W] of f32, digits d i8[O,taps*ceil(I/4),3,4] tap by tap, unit f32[O], optionally b[O]; pad is
    (begin..., end...).  Weights have 24 bits of the largest of their output, which is what their digits are good for
    (source: see backends/cpu/int8_digits.py).
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int, int, int]
    dilation: tuple[int, int]

    kind: ClassVar[Kind] = Kind.REDUCTION

    @property
    def window(self) -> Window:
        """The windows."""
        return Window(self.kernel, self.stride, self.pad, self.dilation)

    def infer(self, x: TensorType, d: TensorType, unit: TensorType, b: TensorType | None = None) -> TensorType:
        """Give [N,O,...]; raises `ShapeError` where channels, dtypes, digits or windows do not fit."""
        if x.rank != 4 or x.dtype is not DType.F32:
            raise ShapeError(f"{self.name}: x must be f32 images [N,C,H,W], not {x}")
        self.window.check(self.name, x)
        (channels,) = fixed(self.name, x.shape[1:2])
        inner = (math.prod(self.kernel) * -(-channels // TOGETHER), DIGITS, TOGETHER)
        if d.rank != 4 or d.dtype is not DType.I8 or d.shape[1:] != inner:
            wanted = f"i8[O,{','.join(map(str, inner))}]"
            raise ShapeError(f"{self.name}: digits must be {wanted} for kernel={self.kernel} and x : {x}, not {d}")
        check_vector(self.name, "unit", unit, d.shape[0], "output channel")
        check_vector(self.name, "bias", b, d.shape[0], "output channel")
        return x.with_shape((x.shape[0], d.shape[0], *self.window.output(self.name, x.shape[2:])))

    def infer_layout(
        self, x: TensorType, d: TensorType, unit: TensorType, b: TensorType | None = None
    ) -> tuple[Layout | None, ...]:
        """Take NCHW{b}c with OIH{b}i{b}oW and give NCHW{b}c, or plain tensors; unit and bias are plain."""
        block = channel_block(self.name, "x", x)
        plain_only(self.name, unit=unit, bias=b)
        wanted = None if block == 1 else digits_layout(block)
        if d.layout != wanted:
            raise ShapeError(f"{self.name}: for x : {x} the digits must be in layout {wanted}, not {d.layout}")
        return (channel_layout(x.rank, block),)

    def reference(self, x: np.ndarray, d: np.ndarray, unit: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
        """Convolve with the weights that digits and units are."""
        weights = weights_of(d, d.shape[1] * TOGETHER) * unit[:, None].astype(np.float64)
        weights = weights.reshape(len(d), *self.kernel, -(-x.shape[1] // TOGETHER) * TOGETHER)[..., : x.shape[1]]
        conv = Conv(self.stride, self.pad, self.dilation)
        y = conv.reference(x.astype(np.float64), np.ascontiguousarray(np.moveaxis(weights, -1, 1)))
        return narrow(y if b is None else y + widen(b).reshape(-1, 1, 1), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce over channels and taps, then apply the unit and the bias."""
        x_type, d_type = types[:2]
        out = self.infer(*types).with_layout(self.infer_layout(*types)[0])
        channels, *spatial = fixed(self.name, x_type.shape[1:])
        sizes = fixed(self.name, out.shape[2:])
        channel = te.reduce_axis(channels, "ic")
        taps = [te.reduce_axis(k, f"k{i}") for i, k in enumerate(self.kernel)]
        of_tap = -(-channels // TOGETHER) * TOGETHER

        def products(n: Any, o: Any, *p: Any) -> Any:
            where = self.window.position(p, taps)
            value = te.at(xs[0], x_type, n, channel, *where)
            conditions = self.window.in_bounds(where, spatial, sizes)
            if conditions:
                value = te.where(every(te, conditions), value, te.const(0, DType.F32))
            number = (taps[0] * self.kernel[1] + taps[1]) * of_tap + channel
            return te.sum(value * weight_at(te, xs[1], d_type, o, number), [channel, *taps])

        sums = tensor(te, out, products, "digit_conv", guard=False)

        def finish(n: Any, o: Any, *p: Any) -> Any:
            value = te.at(sums, out, n, o, *p) * xs[2][o]
            return value + xs[3][o] if len(xs) == 4 else value

        return [tensor(te, out, finish, "digit_conv_unit")]

    def flops(self, x: TensorType, d: TensorType, unit: TensorType, b: TensorType | None = None) -> int:
        """Count two for each multiply-add of a weight, one for each bias."""
        terms = fixed(self.name, x.shape[1:2])[0] * math.prod(self.kernel)
        return self.infer(x, d, unit, b).elements * (2 * terms + (b is not None))

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give channels beside fours and blocks, windows of all kinds, no elements, and blocked layouts."""
        yield _example((1, 8, 5, 4), 6, bias=True)
        yield _example((2, 7, 6, 5), 3, stride=(2, 3))
        yield _example((2, 37, 5, 6), 20, stride=(2, 1), bias=True, block=8)
        yield _example((1, 64, 4, 4), 32, block=16)
        yield _example((0, 8, 4, 4), 8)
        yield _example((1, 0, 4, 4), 3, bias=True)
        yield _example((1, 6, 7, 8), 5, (3, 3), (2, 2), (1, 1, 1, 1), bias=True)
        yield _example((2, 32, 6, 5), 16, (3, 2), (1, 2), (2, 0, 0, 1), (2, 1), block=16)
        yield _example((1, 16, 5, 5), 8, (1, 3), (1, 1), (0, 1, 0, 1), bias=True, block=8)


def _example(
    x: tuple[int, ...],
    outputs: int,
    kernel: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    pad: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    bias: bool = False,
    block: int = 1,
) -> Example:
    """Make an example with weights of very different outputs."""
    image = TensorType(x, DType.F32, channel_layout(4, block))
    digits = TensorType((outputs, math.prod(kernel) * -(-x[1] // TOGETHER), DIGITS, TOGETHER), DType.I8)
    vector = TensorType((outputs,))

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        weights = random_array(rng, TensorType((outputs, x[1], *kernel)))
        weights = weights * np.float32(2.0) ** rng.integers(-9, 10, (outputs, 1, 1, 1)).astype(np.float32)
        vectors = (random_array(rng, vector),) if bias else ()
        return (random_array(rng, image), *conv_digits(weights), *vectors)

    layout = digits_layout(block) if block > 1 else None
    types = (image, digits.with_layout(layout), vector, *((vector,) if bias else ()))
    return Example(DigitConv(kernel, stride, pad, dilation), types, draw)
