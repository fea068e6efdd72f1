"""Fully connected layers on matrix tiles against float64, on emulated tile registers, and real ones where there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu import conv_bf16x3, dense_bf16x3
from cnnc.backends.cpu.conv_bf16x3_shape import MatrixParams
from cnnc.backends.cpu.gemm import DenseShape
from cnnc.backends.cpu.gemm_packed import weight_shape
from cnnc.backends.cpu.machine import AVX512
from cnnc.backends.lower.body import Body, plain_body
from cnnc.ir.layout import Layout


def with_bias(shape: DenseShape) -> Body:
    from tvm import te

    bias = te.placeholder((shape.outputs,), name="bias")

    def apply(anchor: Any) -> Any:
        return te.compute(anchor.shape, lambda *i: anchor(*i) + bias(i[-1]), name="biased")

    operands = [(*shape.leading, shape.inputs), weight_shape(shape)]
    return plain_body(operands, (*shape.leading, shape.outputs), (bias,), apply)


@pytest.mark.parametrize("pairs", [0, 1])
@pytest.mark.parametrize(
    ("leading", "inputs", "outputs"),
    [((17,), 64, 32), ((2, 19), 48, 80), ((1, 33, 2), 96, 16), ((70,), 160, 144)],
)
def test_rows_against_float64(
    call_kernel: Any, tile_cpu: Any, leading: tuple[int, ...], inputs: int, outputs: int, pairs: int
) -> None:
    shape = DenseShape(leading, inputs, outputs)
    rng = np.random.default_rng(inputs)
    x = rng.standard_normal((*leading, inputs), np.float32)
    w = rng.standard_normal((outputs, inputs), np.float32)
    b = rng.standard_normal(outputs, np.float32)
    convolution = dense_bf16x3.convolution(shape)
    chosen = min(conv_bf16x3.space(convolution, AVX512), key=lambda p: conv_bf16x3.cost(convolution, p, AVX512))
    params = MatrixParams(chosen.rows, chosen.tiles, chosen.oc_blocks, pairs)
    func = dense_bf16x3.build(shape, params, with_bias(shape))
    got = call_kernel(func, [x, Layout("OI64o").pack(w), b], (*leading, outputs), 2, tile_cpu)
    wanted = x.astype(np.float64) @ w.T.astype(np.float64) + b
    assert np.linalg.norm(got - wanted) <= 4e-7 * np.linalg.norm(wanted)
