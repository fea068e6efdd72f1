"""Fully connected layers in int8 digits against float64, on emulated tile registers, and real ones where there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cnnc
from cnnc.backends.cpu import conv_int8x3, dense_int8x3
from cnnc.backends.cpu.conv_int8x3_shape import DigitParams
from cnnc.backends.cpu.dense_int8x3 import DenseInt8x3
from cnnc.backends.cpu.gemm import DenseShape
from cnnc.backends.cpu.machine import AVX512
from cnnc.backends.lower.template import schedule_of
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.interp import run
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Add, Dense, DigitDense, Fused, Gelu, Input, constant, graph_input
from cnnc.ops.digit_conv import digits_layout, weight_digits
from tests.backends.cpu import tiles

SHAPES = {
    "tokens": DenseShape((1, 50), 192, 64),
    "a batch of tokens": DenseShape((2, 19), 48, 80),
    "more axes": DenseShape((1, 33, 2), 96, 16),
    "sixteen rows": DenseShape((16,), 64, 32),
    "many features": DenseShape((3, 7), 1056, 16),
}


def best(shape: DenseShape) -> DigitParams:
    convolution = dense_int8x3.convolution(shape)
    return min(conv_int8x3.space(convolution, AVX512), key=lambda p: conv_int8x3.cost(convolution, p, AVX512))


def kernel(shape: DenseShape) -> Fused:
    """Make gelu(layer + bias + residual)."""

    def source(name: str, type_: TensorType) -> Value:
        return call(Input(name, type_))

    x = source("x", TensorType((*shape.leading, shape.inputs)))
    digits = TensorType((shape.outputs, shape.inputs // 4, 3, 4), DType.I8, digits_layout(16))
    d, unit, b = (
        source("d", digits),
        source("u", TensorType((shape.outputs,))),
        source("b", TensorType((shape.outputs,))),
    )
    r = source("r", TensorType((*shape.leading, shape.outputs)))
    y = call(Gelu(), call(Add(), call(DigitDense(), x, d, unit, b), r))
    return Fused(Graph("kernel", (x, d, unit, b, r), (y,)), "layer")


def check(call_kernel: Any, cpu: Any, shape: DenseShape, params: DigitParams) -> None:
    rng = np.random.default_rng(shape.inputs)
    x = rng.standard_normal((*shape.leading, shape.inputs), np.float32)
    # Rows of very different sizes: each has a scale of its own.
    x *= np.float32(2.0) ** rng.integers(-20, 4, (*shape.leading, 1)).astype(np.float32)
    w = rng.standard_normal((shape.outputs, shape.inputs), np.float32)
    b = rng.standard_normal(shape.outputs, np.float32)
    r = rng.standard_normal((*shape.leading, shape.outputs), np.float32)
    d, unit = weight_digits(w)
    func = DenseInt8x3().build(kernel(shape), schedule_of("dense_int8x3", params), tiles.SAPPHIRE_RAPIDS)
    given = [x, digits_layout(16).pack(d), unit, b, r]
    got = call_kernel(func, given, r.shape, 2, cpu)
    exact = x.astype(np.float64) @ w.T.astype(np.float64) + b + r
    (wanted,) = run(gelu_graph(exact.shape), [exact], precise=True)
    bound = 1e-6 * (np.linalg.norm(x, axis=-1, keepdims=True) * np.linalg.norm(w, axis=1) + 1)
    assert (np.abs(got - wanted) <= bound).all()


def gelu_graph(shape: tuple[int, ...]) -> Graph:
    x = graph_input("x", shape)
    return Graph("gelu", (x,), (call(Gelu(), x),))


@pytest.mark.parametrize("name", SHAPES)
def test_rows_against_float64(call_kernel: Any, tile_cpu: Any, name: str) -> None:
    check(call_kernel, tile_cpu, SHAPES[name], best(SHAPES[name]))


@pytest.mark.parametrize("params", [DigitParams(32, 1), DigitParams(64, 2), DigitParams(50, 4)])
def test_slices_of_rows_and_of_outputs(call_kernel: Any, tile_cpu: Any, params: DigitParams) -> None:
    check(call_kernel, tile_cpu, SHAPES["tokens"], params)


def test_what_it_matches() -> None:
    fused = kernel(SHAPES["tokens"])
    assert DenseInt8x3().matches(fused, tiles.SAPPHIRE_RAPIDS)
    assert not DenseInt8x3().matches(fused, cnnc.target.Target.parse("cpu:x86-64-v4"))
    for inputs, outputs in ((40, 64), (64, 40)):
        assert not DenseInt8x3().matches(kernel(DenseShape((32,), inputs, outputs)), tiles.SAPPHIRE_RAPIDS)


@pytest.mark.parametrize(("scale", "algorithm"), [(1 / 14, "dense_int8x3"), (2.0**41, "dense_bf16x3")])
def test_a_layer_is_on_tiles_unless_exact(scale: float, algorithm: str) -> None:
    """The whole way of a layer of many rows, its residual added in the same kernel; large weights have no digits."""
    rng = np.random.default_rng(0)
    x = graph_input("x", (2, 50, 192))
    w = constant(rng.standard_normal((192, 192)).astype(np.float32) * np.float32(scale))
    y = call(Add(), call(Dense(), x, w, constant(rng.standard_normal(192).astype(np.float32))), x)
    graph = Graph("layer", (x,), (y,))
    data = rng.standard_normal((2, 50, 192)).astype(np.float32)
    (wanted,) = run(graph, [data], precise=True)
    fast = cnnc.compile(graph, target="cpu:sapphirerapids")
    assert [kernel.algorithm for kernel in fast.kernels] == [algorithm]
    exact = cnnc.compile(graph, target="cpu:sapphirerapids", exact=True)
    assert [kernel.algorithm for kernel in exact.kernels] == ["dense_packed"]
    if not tiles.present():
        pytest.skip("this CPU has no tile registers")
    for module in (fast, exact):
        (got,) = module.run({"x": data}).values()
        assert np.linalg.norm(got - wanted) <= 4e-7 * np.linalg.norm(wanted)
