"""Convolutions on matrix tiles against float64, on every machine: where it has no tile registers, on emulated ones."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cnnc
from cnnc.backends.cpu import conv_bf16x3
from cnnc.backends.cpu.conv_bf16x3 import MatrixParams
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.machine import AVX512
from cnnc.backends.lower.body import plain_body
from cnnc.driver import Options, Report, lower
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.interp import run
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Cast, Conv, Relu, RoundBf16, constant, graph_input
from cnnc.ops.source import Input
from tests.backends.cpu import tiles
from tests.backends.cpu.conftest import TEST_CPU
from tests.backends.cpu.test_conv_direct import SHAPES as ALL_SHAPES
from tests.backends.cpu.test_conv_direct import reference, with_bias_and_residual

SHAPES = {name: s for name, s in ALL_SHAPES.items() if s.groups == 1 and not s.plain_input}
SHAPES |= {
    "three strides": ConvShape(1, 40, 13, 14, 32, 5, 4, stride=(3, 3), pad=(2, 1, 2, 1)),
    "stride and dilation": ConvShape(1, 32, 17, 19, 16, 3, 3, stride=(2, 3), pad=(2, 3, 2, 3), dilation=(2, 3)),
    "many pixels": ConvShape(2, 16, 24, 23, 16, 3, 3, pad=(1, 1, 1, 1)),
}


def best(shape: ConvShape) -> MatrixParams:
    return min(conv_bf16x3.space(shape, AVX512), key=lambda p: conv_bf16x3.cost(shape, p, AVX512))


def check(
    call_kernel: Any,
    tile_cpu: Any,
    shape: ConvShape,
    params: MatrixParams,
    pieces: int = 1,
    stored: Any = np.float32,
    **how: Any,
) -> None:
    """Hold relu(conv + bias + residual) against float64, as closely as float32 sums come to it."""
    rng = np.random.default_rng(shape.ic * 1000 + shape.h)
    x = rng.standard_normal((shape.n, shape.ic, shape.h, shape.w), np.float32)
    w = rng.standard_normal((shape.oc, shape.ic, shape.kh, shape.kw), np.float32).astype(stored).astype(np.float32)
    b = rng.standard_normal(shape.oc, np.float32)
    wanted = reference(shape, x, w, b)
    extra = rng.standard_normal(wanted.shape, np.float32)
    wanted = np.maximum(wanted + extra, 0)
    blocks = Layout("NCHW16c")
    func = conv_bf16x3.build(shape, params, with_bias_and_residual(shape))
    packed = [blocks.pack(x), Layout("OIHW16i16o").pack(w), b, blocks.pack(extra)]
    got = call_kernel(func, packed, shape.output_shape, pieces, tile_cpu, **how)
    logical = blocks.unpack(got, wanted.shape)
    assert np.linalg.norm(logical - wanted) <= 4e-7 * np.linalg.norm(wanted)
    assert np.array_equal(blocks.pack(logical), got), "pad lanes must be 0"


@pytest.mark.parametrize("name", SHAPES)
def test_the_chosen_schedule_is_right(call_kernel: Any, tile_cpu: Any, name: str) -> None:
    check(call_kernel, tile_cpu, SHAPES[name], best(SHAPES[name]), pieces=3)


@pytest.mark.parametrize("channels", [16, 32, 48, 64, 100])
@pytest.mark.parametrize(("rows", "tiles"), [(117, 2), (117, 3), (48, 3)])
def test_weights_split_early_are_those_of_their_block(
    call_kernel: Any, tile_cpu: Any, channels: int, rows: int, tiles: int
) -> None:
    """Few steps and several blocks of outputs, in one group of tiles, in groups of one size and of two."""
    shape = ConvShape(1, channels, 9, 13, 72, 1, 1)
    check(call_kernel, tile_cpu, shape, MatrixParams(rows, tiles, oc_blocks=3), pieces=2)


@pytest.mark.parametrize("size", [(3, 3), (1, 1)])
def test_slices_of_the_same_input_split_it_once(call_kernel: Any, tile_cpu: Any, size: tuple[int, int]) -> None:
    """The smaller one's parts would have a place on the stack."""
    shape = ConvShape(1, 40, *size, 96, *size, pad=(size[0] // 2,) * 4)
    check(call_kernel, tile_cpu, shape, MatrixParams(9, 2, oc_blocks=2), pieces=3, read_once=True)


@pytest.mark.parametrize("name", ["batch of 3, odd rows", "1x1", "asymmetric padding"])
def test_every_schedule_is_right(call_kernel: Any, tile_cpu: Any, name: str) -> None:
    candidates = list(conv_bf16x3.space(SHAPES[name], AVX512))
    for params in random.Random(name).sample(candidates, min(len(candidates), 3)):
        check(call_kernel, tile_cpu, SHAPES[name], params)


@pytest.mark.parametrize("name", ["1x1", "asymmetric padding", "channels beside the block", "batch of 3, odd rows"])
def test_sums_are_right_that_wait_for_further_passes(call_kernel: Any, tile_cpu: Any, name: str) -> None:
    """One pair of blocks of input channels a pass: with a residual, pad lanes, and pixels between the rows."""
    shape = replace(SHAPES[name], ic=SHAPES[name].ic + 64)
    rows = 30 if name == "1x1" else 3
    check(call_kernel, tile_cpu, shape, MatrixParams(rows, tiles=3, oc_blocks=2, pairs=1), pieces=2)


@pytest.mark.parametrize(("stored", "parts"), [(ml_dtypes.bfloat16, 1), (np.float16, 2)])
def test_weights_of_16_bits_have_fewer_parts(call_kernel: Any, tile_cpu: Any, stored: Any, parts: int) -> None:
    shape = replace(SHAPES["channels beside the block"], parts=(3, parts))
    check(call_kernel, tile_cpu, shape, best(shape), stored=stored)


def test_numbers_in_bf16_take_one_product(call_kernel: Any, tile_cpu: Any) -> None:
    """Where the input is rounded to bf16, too: as a prologue that the kernel computes as it splits."""
    x, w = graph_input("x", (1, 48, 9, 10)), call(Input("w", TensorType((32, 48, 3, 3))))
    rounded = call(Cast(DType.F32), call(Input("w", TensorType((32, 48, 3, 3), DType.BF16))))
    assert conv_bf16x3.bf16_parts(call(RoundBf16(), x)) == conv_bf16x3.bf16_parts(rounded) == 1
    assert conv_bf16x3.bf16_parts(x) == conv_bf16x3.bf16_parts(w) == 3
    shape = ConvShape(1, 48, 9, 10, 32, 3, 3, pad=(1, 1, 1, 1), parts=(1, 1))
    rng = np.random.default_rng(0)
    x_array, w_array = (
        rng.standard_normal(size, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
        for size in ((1, 48, 9, 10), (32, 48, 3, 3))
    )
    func = conv_bf16x3.build(shape, best(shape), plain_body(shape.operand_shapes, shape.output_shape))
    packed = [Layout("NCHW16c").pack(x_array), Layout("OIHW16i16o").pack(w_array)]
    got = Layout("NCHW16c").unpack(call_kernel(func, packed, shape.output_shape, 1, tile_cpu), (1, 32, 9, 10))
    wanted = reference(shape, x_array, w_array, np.zeros(32))
    assert np.linalg.norm(got - wanted) <= 4e-7 * np.linalg.norm(wanted)


def test_a_network_in_bf16_is_what_its_graph_says() -> None:
    """The lowered graph rounds what the kernels round, so that the interpreter gives their very numbers."""
    rng = np.random.default_rng(0)
    x = graph_input("x", (1, 64, 14, 14))

    def layer(y: Any, oc: int, ic: int, k: int) -> Any:
        w = constant((rng.standard_normal((oc, ic, k, k)) / np.sqrt(ic * k * k)).astype(np.float32))
        op = Conv((1, 1), (k // 2,) * 4, (1, 1))
        return call(Relu(), call(op, y, w, constant(rng.standard_normal(oc).astype(np.float32))))

    y = layer(layer(layer(x, 256, 64, 1), 128, 256, 3), 256, 128, 1)
    graph = Graph("network", (x,), (y,))
    options = Options(target="cpu:sapphirerapids", dtype="bf16")
    lowered = lower((graph,), options, Report()).graphs[0]
    data = rng.standard_normal((1, 64, 14, 14)).astype(np.float32)
    (meant,), (exact,) = run(lowered, [data], precise=True), run(graph, [data], precise=True)
    error = np.linalg.norm(meant - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 1e-2
    if not tiles.present():
        pytest.skip("this CPU has no tile registers")
    module = cnnc.compile(graph, target="cpu:sapphirerapids", dtype="bf16")
    assert {"conv_bf16x3"} <= {kernel.algorithm for kernel in module.kernels}
    (got,) = module.run({"x": data}).values()
    # Sums that differ in their last bit may round the other way in the next layer.
    assert np.linalg.norm(got - meant) <= 1e-4 * np.linalg.norm(meant)


def test_equal_shapes_are_equal(call_kernel: Any, tile_cpu: Any) -> None:
    """A shape that is equal to an earlier one, but another object, is computed the same way."""
    for _ in range(2):
        check(call_kernel, tile_cpu, replace(SHAPES["1x1 strided"]), MatrixParams(rows=3, tiles=2, oc_blocks=1))


def test_large_and_small_numbers(call_kernel: Any, tile_cpu: Any) -> None:
    """Numbers near the largest, whose parts must not overflow, and from where the smallest parts are lost."""
    shape = ConvShape(1, 32, 4, 4, 16, 1, 1)
    rng = np.random.default_rng(0)
    exponents = rng.integers(-30, 31, (32, 4, 4))
    for scale, bound in ((2.0**94, 4e-7), (2.0**-80, 4e-7), (0.0, 0.0)):
        x = (rng.standard_normal((1, 32, 4, 4)) * scale * 2.0**exponents).astype(np.float32)
        w = rng.uniform(-1, 1, (16, 32, 1, 1)).astype(np.float32)
        wanted = np.einsum("oi,nihw->nohw", w[:, :, 0, 0].astype(np.float64), x.astype(np.float64))
        magnitude = np.einsum("oi,nihw->nohw", np.abs(w[:, :, 0, 0]).astype(np.float64), np.abs(x).astype(np.float64))
        func = conv_bf16x3.build(shape, best(shape), plain_body(shape.operand_shapes, shape.output_shape))
        packed = [Layout("NCHW16c").pack(x), Layout("OIHW16i16o").pack(w)]
        got = Layout("NCHW16c").unpack(call_kernel(func, packed, shape.output_shape, 1, tile_cpu), wanted.shape)
        assert np.all(np.abs(got - wanted) <= bound * magnitude)


def test_numbers_that_are_not_finite_stay_so(call_kernel: Any, tile_cpu: Any) -> None:
    """What depends on an infinity is not finite, and nothing else is."""
    shape = ConvShape(1, 16, 3, 40, 16, 3, 3, pad=(1, 1, 1, 1))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 16, 3, 40), np.float32)
    x[0, 3, 1, 7] = np.inf
    w = rng.standard_normal((16, 16, 3, 3), np.float32)
    func = conv_bf16x3.build(shape, best(shape), plain_body(shape.operand_shapes, shape.output_shape))
    packed = [Layout("NCHW16c").pack(x), Layout("OIHW16i16o").pack(w)]
    got = Layout("NCHW16c").unpack(call_kernel(func, packed, shape.output_shape, 1, tile_cpu), (1, 16, 3, 40))
    reached = np.zeros(got.shape, bool)
    reached[..., 6:9] = True
    assert np.array_equal(~np.isfinite(got), reached)


def test_the_emulation_is_what_the_processor_does(call_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tiles.present():
        pytest.skip("this CPU has no tile registers")
    shape, params = SHAPES["3x3"], best(SHAPES["3x3"])
    rng = np.random.default_rng(0)
    packed = [rng.standard_normal(shape, np.float32) for shape in shape.operand_shapes]

    def run(tile_cpu: Any) -> np.ndarray:
        func = conv_bf16x3.build(shape, params, plain_body(shape.operand_shapes, shape.output_shape))
        result: np.ndarray = call_kernel(func, packed, shape.output_shape, 1, tile_cpu)
        return result

    real = run(tiles.SAPPHIRE_RAPIDS)
    tiles.emulate(monkeypatch)
    np.testing.assert_allclose(run(TEST_CPU), real, rtol=0, atol=1e-5 * np.abs(real).max())
