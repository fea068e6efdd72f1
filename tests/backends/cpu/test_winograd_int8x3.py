"""Winograd convolutions in int8 digits against float64: where the CPU has no tile registers, on emulated ones."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu import winograd_int8x3
from cnnc.backends.cpu.machine import AVX512
from cnnc.backends.cpu.winograd import WinogradShape
from cnnc.backends.cpu.winograd_int8x3 import DigitWinogradParams, WinogradInt8x3
from cnnc.backends.lower.template import schedule_of
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Add, Fused, Input, Mul, Relu, WinogradDigitConv, WinogradWeight
from cnnc.ops.winograd import transforms
from cnnc.ops.winograd_digit_conv import positions_digits_layout, positions_unit_layout, transformed_digits
from cnnc.passes.algorithms import ALGORITHMS, MOST_POSITIONS
from tests.backends.cpu import tiles
from tests.backends.cpu.test_conv_direct import reference
from tests.backends.cpu.test_winograd import conv

BLOCKS = Layout("NCHW16c")


def shape_of(tile: int, *sizes: Any, **how: Any) -> WinogradShape:
    return WinogradShape(conv(*sizes, block=16, **how), tile)


SHAPES = {
    "whole tiles": shape_of(4, 1, 64, 8, 16, 48),
    "14x14": shape_of(4, 1, 128, 14, 14, 32),
    "7x7, batch of 3": shape_of(2, 3, 64, 7, 7, 32),
    "one pixel": shape_of(4, 1, 32, 1, 1, 16),
    "no padding": shape_of(4, 1, 80, 9, 20, 16, pad=(0, 0, 0, 0)),
    "asymmetric padding": shape_of(2, 2, 48, 9, 10, 32, pad=(0, 2, 3, 1)),
    "channels beside the block": shape_of(4, 1, 37, 11, 12, 43),
    "many tiles": shape_of(2, 1, 16, 22, 24, 16),
    "1x7": shape_of(2, 1, 40, 6, 13, 16, pad=(0, 3, 0, 3), kernel=(1, 7)),
}


def best(shape: WinogradShape) -> DigitWinogradParams:
    return min(winograd_int8x3.space(shape, AVX512), key=lambda p: winograd_int8x3.cost(shape, p, AVX512))


def arrays(shape: WinogradShape) -> tuple[np.ndarray, np.ndarray]:
    c = shape.conv
    rng = np.random.default_rng(c.ic * 1000 + c.h)
    x = rng.standard_normal((c.n, c.ic, c.h, c.w), np.float32)
    return x, rng.standard_normal((c.oc, c.ic, c.kh, c.kw), np.float32)


def source(name: str, *shape: int, dtype: DType = DType.F32, layout: Layout | None = None) -> Value:
    return call(Input(name, TensorType(shape, dtype, layout)))


def built(shape: WinogradShape, params: DigitWinogradParams, around: bool, prologue: bool = False) -> Any:
    """Build the convolution, relu(conv + bias + residual) `around` it, relu(x * scale) before it."""
    c = shape.conv
    x = source("x", c.n, c.ic, c.h, c.w, layout=BLOCKS)
    k = source("k", 1, c.ic, 1, 1, layout=BLOCKS)
    digits = (shape.positions, c.oc, -(-c.ic // 4), 3, 4)
    d = source("d", *digits, dtype=DType.I8, layout=positions_digits_layout(16))
    unit = source("unit", *digits[:2], layout=positions_unit_layout(16))
    vectors = [source("b", c.oc)] if around else []
    read = call(Relu(), call(Mul(), x, k)) if prologue else x
    y = call(WinogradDigitConv(shape.tile, (c.kh, c.kw), c.pad), read, d, unit, *vectors)
    inputs = (x, *([k] if prologue else []), d, unit, *vectors)
    if around:
        r = source("r", c.n, c.oc, c.oh, c.ow, layout=BLOCKS)
        y, inputs = call(Relu(), call(Add(), y, r)), (*inputs, r)
    kernel = Fused(Graph("kernel", inputs, (y,)), "conv")
    assert WinogradInt8x3().matches(kernel, tiles.SAPPHIRE_RAPIDS)
    return WinogradInt8x3().build(kernel, schedule_of("winograd_int8x3", params), tiles.SAPPHIRE_RAPIDS)


def operands(shape: WinogradShape, x: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
    d, unit = transformed_digits(WinogradWeight(shape.tile).reference(w))
    return [BLOCKS.pack(x), positions_digits_layout(16).pack(d), positions_unit_layout(16).pack(unit)]


def check(
    call_kernel: Any,
    cpu: Any,
    shape: WinogradShape,
    params: DigitWinogradParams,
    pieces: int = 1,
    prologue: bool = False,
    **how: Any,
) -> None:
    """Hold relu(conv + bias + residual) against float64."""
    c = shape.conv
    x, w = arrays(shape)
    rng = np.random.default_rng(c.oc)
    b = rng.standard_normal(c.oc, np.float32)
    k = rng.standard_normal((1, c.ic, 1, 1), np.float32)
    wanted = reference(c, np.maximum(x * k, 0) if prologue else x, w, b)
    extra = rng.standard_normal(wanted.shape, np.float32)
    wanted = np.maximum(wanted + extra, 0)
    first, *others = operands(shape, x, w)
    packed = [first, *([BLOCKS.pack(k)] if prologue else []), *others, b, BLOCKS.pack(extra)]
    got = call_kernel(built(shape, params, True, prologue), packed, c.output_shape, pieces, cpu, **how)
    logical = BLOCKS.unpack(got, wanted.shape)
    assert np.linalg.norm(logical - wanted) <= 6e-6 * np.linalg.norm(wanted)
    assert np.array_equal(BLOCKS.pack(logical), got), "pad lanes must be 0"


@pytest.mark.parametrize("name", SHAPES)
def test_the_chosen_schedule_is_right(call_kernel: Any, tile_cpu: Any, name: str) -> None:
    check(call_kernel, tile_cpu, SHAPES[name], best(SHAPES[name]), pieces=3)


@pytest.mark.parametrize("name", ["14x14", "7x7, batch of 3", "channels beside the block", "many tiles"])
def test_every_schedule_is_right(call_kernel: Any, tile_cpu: Any, name: str) -> None:
    candidates = list(winograd_int8x3.space(SHAPES[name], AVX512))
    for params in random.Random(name).sample(candidates, min(len(candidates), 3)):
        check(call_kernel, tile_cpu, SHAPES[name], params, pieces=2)


def test_slices_of_the_same_tiles_transform_them_once(call_kernel: Any, tile_cpu: Any) -> None:
    shape = shape_of(4, 1, 40, 9, 9, 64)
    check(call_kernel, tile_cpu, shape, DigitWinogradParams(9, oc_slices=4), pieces=3, read_once=True)


@pytest.mark.parametrize("name", ["14x14", "asymmetric padding"])
def test_what_is_before_the_convolution_is_computed_as_tiles_are_loaded(
    call_kernel: Any, tile_cpu: Any, name: str
) -> None:
    check(call_kernel, tile_cpu, SHAPES[name], best(SHAPES[name]), pieces=2, prologue=True)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_stays_in_its_tiles(call_kernel: Any, tile_cpu: Any, value: float) -> None:
    shape = shape_of(4, 1, 32, 12, 12, 16)
    x, w = arrays(shape)
    x[0, 3, 5, 5] = value
    got = call_kernel(built(shape, best(shape), False), operands(shape, x, w), shape.conv.output_shape, 1, tile_cpu)
    assert not np.isfinite(got[0, 0, 4:7, 4:7]).any()
    assert np.isfinite(got[0, 0, 8:]).all()
    assert np.isfinite(got[0, 0, :, 8:]).all()


def test_tiles_have_scales_of_their_own(call_kernel: Any, tile_cpu: Any) -> None:
    """A part of the image 2^40 times the other does not make the other worse."""
    shape = shape_of(2, 1, 64, 6, 24, 16)
    x, w = arrays(shape)
    x[..., 12:] *= np.float32(2.0**40)
    wanted = reference(shape.conv, x, w, np.zeros(16))
    got = call_kernel(built(shape, best(shape), False), operands(shape, x, w), shape.conv.output_shape, 1, tile_cpu)
    left = BLOCKS.unpack(got, wanted.shape)[..., :10]
    assert np.linalg.norm(left - wanted[..., :10]) <= 6e-6 * np.linalg.norm(wanted[..., :10])


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("channels", [32, 256])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (1, 5)])
def test_the_error_is_as_stated(
    call_kernel: Any, tile_cpu: Any, tile: int, channels: int, positive: bool, kernel: tuple[int, int]
) -> None:
    positions = [axis.positions for axis in transforms(tile, kernel, (1, 1))]
    if math.prod(positions) > MOST_POSITIONS:
        return
    shape = shape_of(tile, 1, channels, 28, 28, 16, kernel=kernel, pad=(kernel[0] // 2, kernel[1] // 2) * 2)
    x, w = arrays(shape)
    x = np.maximum(x, 0) if positive else x
    got = call_kernel(built(shape, best(shape), False), operands(shape, x, w), shape.conv.output_shape, 1, tile_cpu)
    zero = np.zeros(16, np.float32)
    wanted, work = reference(shape.conv, x, w, zero), reference(shape.conv, np.abs(x), np.abs(w), zero)
    error = np.abs(BLOCKS.unpack(got, wanted.shape) - wanted) / (np.finfo(np.float32).eps * work)
    (algorithm,) = (a for a in ALGORITHMS if a.name == f"winograd{tile}_int8x3")
    assert 0 < error.max() <= algorithm.error
