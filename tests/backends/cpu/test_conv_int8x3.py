"""1x1 convolutions in int8 digits against float64: where the CPU has no tile registers, on emulated ones."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu import conv_int8x3
from cnnc.backends.cpu.conv_int8x3 import ConvInt8x3, DigitParams
from cnnc.backends.cpu.conv_int8x3_shape import lines_of
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.machine import AVX512
from cnnc.backends.lower.template import schedule_of
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Add, DigitConv, Fused, Input, Mul, Relu
from cnnc.ops.digit_conv import conv_digits, digits_layout
from cnnc.passes.algorithms import ALGORITHMS
from tests.backends.cpu import tiles
from tests.backends.cpu.conftest import TEST_CPU
from tests.backends.cpu.test_conv_direct import reference

BLOCKS = Layout("NCHW16c")

SHAPES = {
    "whole tiles": ConvShape(1, 64, 8, 8, 48, 1, 1),
    "14x14": ConvShape(1, 128, 14, 14, 64, 1, 1),
    "7x7, batch of 3": ConvShape(3, 64, 7, 7, 32, 1, 1),
    "one pixel": ConvShape(2, 80, 1, 1, 16, 1, 1),
    "strided": ConvShape(1, 64, 13, 9, 32, 1, 1, stride=(2, 3)),
    "channels beside the block": ConvShape(1, 37, 5, 7, 43, 1, 1),
    "one block": ConvShape(1, 9, 6, 6, 16, 1, 1),
    "five blocks, then six": ConvShape(1, 80, 9, 9, 96, 1, 1),
    "many channels": ConvShape(1, 1056, 4, 5, 16, 1, 1),
    "3x3": ConvShape(1, 32, 9, 7, 32, 3, 3, pad=(1, 1, 1, 1)),
    "3x3, strided": ConvShape(2, 48, 12, 13, 16, 3, 3, stride=(2, 2), pad=(1, 1, 1, 1)),
    "dilated, uneven padding": ConvShape(1, 16, 9, 11, 40, 3, 2, pad=(2, 0, 1, 3), dilation=(2, 3)),
    "1x5 without padding": ConvShape(1, 64, 6, 9, 16, 1, 5),
    "1x1 with padding": ConvShape(1, 37, 5, 6, 16, 1, 1, stride=(2, 1), pad=(1, 0, 2, 1)),
}


def best(shape: ConvShape) -> DigitParams:
    return min(conv_int8x3.space(shape, AVX512), key=lambda p: conv_int8x3.cost(shape, p, AVX512))


def arrays(shape: ConvShape) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(shape.ic * 1000 + shape.h)
    x = rng.standard_normal((shape.n, shape.ic, shape.h, shape.w), np.float32)
    return x, rng.standard_normal((shape.oc, shape.ic, shape.kh, shape.kw), np.float32)


def source(name: str, type_: TensorType) -> Value:
    return call(Input(name, type_))


def kernel(shape: ConvShape, around: bool, prologue: bool = False) -> Fused:
    """Make the convolution, relu(conv + bias + residual) `around` it, relu(x * scale) before it."""
    x = source("x", TensorType((shape.n, shape.ic, shape.h, shape.w), DType.F32, BLOCKS))
    k = source("k", TensorType((1, shape.ic, 1, 1), DType.F32, BLOCKS))
    groups = shape.kh * shape.kw * -(-shape.ic // 4)
    d = source("d", TensorType((shape.oc, groups, 3, 4), DType.I8, digits_layout(16)))
    vectors = [source(name, TensorType((shape.oc,))) for name in ("unit", "b")[: 1 + around]]
    read = call(Relu(), call(Mul(), x, k)) if prologue else x
    y = call(DigitConv((shape.kh, shape.kw), shape.stride, shape.pad, shape.dilation), read, d, *vectors)
    inputs = (x, *([k] if prologue else []), d, *vectors)
    if around:
        r = source("r", TensorType((shape.n, shape.oc, shape.oh, shape.ow), DType.F32, BLOCKS))
        y, inputs = call(Relu(), call(Add(), y, r)), (*inputs, r)
    return Fused(Graph("kernel", inputs, (y,)), "conv")


def built(shape: ConvShape, params: DigitParams, *how: bool) -> Any:
    return ConvInt8x3().build(kernel(shape, *how), schedule_of("conv_int8x3", params), tiles.SAPPHIRE_RAPIDS)


def operands(x: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
    d, unit = conv_digits(w)
    return [BLOCKS.pack(x), digits_layout(16).pack(d), unit]


def run(call_kernel: Any, cpu: Any, shape: ConvShape, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Give the plain convolution of a kernel with the schedule that the cost model chooses."""
    got: np.ndarray = call_kernel(built(shape, best(shape), False), operands(x, w), shape.output_shape, 1, cpu)
    return BLOCKS.unpack(got, (shape.n, shape.oc, shape.oh, shape.ow))


def check(
    call_kernel: Any,
    cpu: Any,
    shape: ConvShape,
    params: DigitParams,
    pieces: int = 1,
    prologue: bool = False,
    **how: Any,
) -> None:
    """Hold relu(conv + bias + residual) against float64."""
    x, w = arrays(shape)
    rng = np.random.default_rng(shape.oc)
    b = rng.standard_normal(shape.oc, np.float32)
    k = rng.standard_normal((1, shape.ic, 1, 1), np.float32)
    wanted = reference(shape, np.maximum(x * k, 0) if prologue else x, w, b)
    extra = rng.standard_normal(wanted.shape, np.float32)
    wanted = np.maximum(wanted + extra, 0)
    first, *others = operands(x, w)
    packed = [first, *([BLOCKS.pack(k)] if prologue else []), *others, b, BLOCKS.pack(extra)]
    got = call_kernel(built(shape, params, True, prologue), packed, shape.output_shape, pieces, cpu, **how)
    logical = BLOCKS.unpack(got, wanted.shape)
    assert np.linalg.norm(logical - wanted) <= 1e-6 * np.linalg.norm(wanted)
    assert np.array_equal(BLOCKS.pack(logical), got), "pad lanes must be 0"


@pytest.mark.parametrize("name", SHAPES)
def test_the_chosen_schedule_is_right(call_kernel: Any, tile_cpu: Any, name: str) -> None:
    check(call_kernel, tile_cpu, SHAPES[name], best(SHAPES[name]), pieces=3)


@pytest.mark.parametrize(
    "name", ["14x14", "7x7, batch of 3", "channels beside the block", "five blocks, then six", "3x3, strided"]
)
def test_every_schedule_is_right(call_kernel: Any, tile_cpu: Any, name: str) -> None:
    candidates = list(conv_int8x3.space(SHAPES[name], AVX512))
    for params in random.Random(name).sample(candidates, min(len(candidates), 3)):
        check(call_kernel, tile_cpu, SHAPES[name], params, pieces=2)


def test_slices_of_the_same_input_split_it_once(call_kernel: Any, tile_cpu: Any) -> None:
    shape = ConvShape(1, 80, 6, 7, 96, 1, 1)
    check(call_kernel, tile_cpu, shape, DigitParams(42, oc_blocks=2), pieces=3, read_once=True)


@pytest.mark.parametrize("name", ["14x14", "strided", "channels beside the block", "3x3", "dilated, uneven padding"])
def test_what_is_before_the_convolution_is_computed_as_it_is_split(call_kernel: Any, tile_cpu: Any, name: str) -> None:
    check(call_kernel, tile_cpu, SHAPES[name], best(SHAPES[name]), pieces=2, prologue=True)


@pytest.mark.parametrize("scale", [2.0**94, 2.0**-70, 0.0])
def test_large_and_small_pixels(call_kernel: Any, tile_cpu: Any, scale: float) -> None:
    """Each pixel has a scale of its own: those 2^60 apart are equally good."""
    shape = ConvShape(1, 64, 5, 8, 16, 1, 1)
    x, w = arrays(shape)
    exponents = np.random.default_rng(0).integers(-30, 31, (5, 8))
    x = (x.astype(np.float64) * scale * 2.0**exponents).astype(np.float32)
    wanted = reference(shape, x, w, np.zeros(16))
    got = run(call_kernel, tile_cpu, shape, x, w)
    bound = 1e-6 * np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) * np.linalg.norm(w, axis=1)[None]
    assert np.all(np.abs(got - wanted) <= bound)


def test_large_and_small_outputs(call_kernel: Any, tile_cpu: Any) -> None:
    """And so has each output, whose weights it multiplies by."""
    shape = ConvShape(1, 64, 5, 8, 16, 1, 1)
    x, w = arrays(shape)
    w *= np.float32(2.0) ** np.arange(-48, 48, 6, dtype=np.float32).reshape(16, 1, 1, 1)
    w[3] = 0
    wanted = reference(shape, x, w, np.zeros(16))
    got = run(call_kernel, tile_cpu, shape, x, w)
    bound = 1e-6 * np.linalg.norm(x, axis=1, keepdims=True) * np.linalg.norm(w.astype(np.float64), axis=1)[None]
    assert np.all(np.abs(got - wanted) <= bound)
    assert not got[0, 3].any()


@pytest.mark.parametrize("value", [0.99999994, 1.0, 1.0000001, 2.0**0.5])
def test_the_largest_numbers_of_a_row_have_digits(call_kernel: Any, tile_cpu: Any, value: float) -> None:
    """Just below and above a power of two, of either sign, in input and weights."""
    shape = ConvShape(1, 64, 2, 8, 16, 1, 1)
    x, w = (np.full(a.shape, value, np.float32) for a in arrays(shape))
    x[:, 1::2] *= -1
    w[:, 1::2] *= -1
    got = run(call_kernel, tile_cpu, shape, x, w)
    np.testing.assert_allclose(got, 64 * np.float64(np.float32(value)) ** 2, rtol=3e-7)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_pixel_that_is_not_finite_gives_nan(call_kernel: Any, tile_cpu: Any, value: float) -> None:
    """For all its outputs, and no other pixel does."""
    shape = ConvShape(1, 64, 3, 40, 16, 1, 1)
    x, w = arrays(shape)
    x[0, 3, 1, 7] = value
    got = run(call_kernel, tile_cpu, shape, x, w)
    reached = np.zeros(got.shape, bool)
    reached[:, :, 1, 7] = True
    assert np.array_equal(np.isnan(got), reached)
    assert np.isfinite(got[~reached]).all()


@pytest.mark.parametrize("channels", [64, 576, 2048])
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_the_error_is_that_of_the_largest(call_kernel: Any, tile_cpu: Any, channels: int, spread: float) -> None:
    """In units of eps * channels * max|x| * max|w|: of numbers of one size, and of very different ones."""
    shape = ConvShape(1, channels, 4, 8, 16, 1, 1)
    rng = np.random.default_rng(channels)
    x, w = (np.exp(spread * rng.standard_normal(a.shape)).astype(np.float32) * a for a in arrays(shape))
    wanted = reference(shape, x, w, np.zeros(16))
    got = run(call_kernel, tile_cpu, shape, x, w)
    largest = np.abs(x).max(axis=1, keepdims=True) * np.abs(w).max(axis=1).reshape(1, -1, 1, 1)
    assert (np.abs(got - wanted) / (np.finfo(np.float32).eps * channels * largest)).max() <= 0.5


def test_the_emulation_is_what_the_processor_does(call_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tiles.present():
        pytest.skip("this CPU has no tile registers")
    shape = SHAPES["five blocks, then six"]
    x, w = arrays(shape)
    real = run(call_kernel, tiles.SAPPHIRE_RAPIDS, shape, x, w)
    tiles.emulate(monkeypatch)
    np.testing.assert_allclose(run(call_kernel, TEST_CPU, shape, x, w), real, rtol=0, atol=1e-5 * np.abs(real).max())


def test_equal_shapes_are_equal(call_kernel: Any, tile_cpu: Any) -> None:
    """A shape that is equal to an earlier one, but another object, is computed the same way."""
    for _ in range(2):
        check(call_kernel, tile_cpu, replace(SHAPES["strided"]), DigitParams(10, oc_blocks=1))


@pytest.mark.parametrize("channels", [64, 576, 2048])
@pytest.mark.parametrize("positive", [False, True])
def test_the_error_of_numbers_of_one_size_is_as_stated(
    call_kernel: Any, tile_cpu: Any, channels: int, positive: bool
) -> None:
    shape = ConvShape(1, channels, 8, 16, 32, 1, 1)
    x, w = arrays(shape)
    x = np.maximum(x, 0) if positive else x
    zero = np.zeros(32, np.float32)
    wanted, work = reference(shape, x, w, zero), reference(shape, np.abs(x), np.abs(w), zero)
    error = np.abs(run(call_kernel, tile_cpu, shape, x, w) - wanted) / (np.finfo(np.float32).eps * work)
    (algorithm,) = (a for a in ALGORITHMS if a.name == "int8x3")
    assert 0 < error.max() <= algorithm.error


@pytest.mark.parametrize("rows", [1, 16, 17, 33, 49, 196, 784])
def test_tiles_are_loaded_of_lines_there_are(rows: int) -> None:
    """Two tiles at a time, but where one holds all rows."""
    together = 16 if rows <= 16 else 32
    assert lines_of(rows) >= -(-rows // together) * together
    assert lines_of(rows) % 2 == 1


@pytest.mark.parametrize(
    "shape",
    [
        ConvShape(1, 3072, 12_608, 1, 768, 1, 1),
        ConvShape(1, 64, 768, 768, 64, 3, 3, stride=(2, 2), pad=(1, 1, 1, 1)),
        ConvShape(1, 64, 1024, 1024, 64, 1, 1),
        ConvShape(1, 2048, 9, 9, 64, 4, 4),
    ],
)
def test_digits_of_a_slice_stay_in_l2(shape: ConvShape) -> None:
    """However many pixels there are, and however much each is the sum of."""
    params = best(shape)
    blocks = -(-shape.kh * shape.kw * shape.ic_blocks // 4)
    assert params.pixels <= 32 or params.pixels * 3 * 64 * blocks <= AVX512.l2
    assert all(p.pixels <= shape.oh * shape.ow for p in conv_int8x3.space(shape, AVX512))
