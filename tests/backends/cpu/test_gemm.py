"""Fully connected kernels against numpy in float64, sizes beside every tile and vector included."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu import gemm
from cnnc.backends.cpu.gemm import DenseParams, DenseShape
from cnnc.backends.cpu.machine import AVX2, AVX512, Machine
from cnnc.backends.lower.body import plain_body

MACHINES = {8: AVX2, 16: AVX512}
SIZES = [
    ((1,), 64, 32),
    ((1,), 100, 37),
    ((1,), 7, 3),
    ((1,), 1, 1),
    ((), 33, 10),
    ((5,), 40, 24),
    ((13,), 48, 11),
    ((2, 3), 20, 17),
    ((2, 1, 7), 16, 9),
]


def check(call_kernel: Any, shape: DenseShape, params: DenseParams, pieces: int) -> None:
    from tvm import te

    rng = np.random.default_rng(shape.inputs * 100 + shape.outputs)
    x = rng.standard_normal((*shape.leading, shape.inputs), np.float32)
    w = rng.standard_normal((shape.outputs, shape.inputs), np.float32)
    b = rng.standard_normal(shape.outputs, np.float32)
    bias = te.placeholder((shape.outputs,), name="bias")

    def with_bias(anchor: Any) -> Any:
        return te.compute(anchor.shape, lambda *i: anchor(*i) + bias(i[-1]), name="biased")

    wanted = x.astype(np.float64) @ w.T.astype(np.float64) + b
    body = plain_body((x.shape, w.shape), wanted.shape, (bias,), with_bias)
    got = call_kernel(gemm.build(shape, params, body), [x, w, b], wanted.shape, pieces)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def best(shape: DenseShape, machine: Machine) -> DenseParams:
    return min(gemm.space(shape, machine), key=lambda p: gemm.cost(shape, p, machine))


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize(("leading", "inputs", "outputs"), SIZES)
def test_the_chosen_schedule_is_right(
    call_kernel: Any, leading: tuple[int, ...], inputs: int, outputs: int, lanes: int
) -> None:
    shape = DenseShape(leading, inputs, outputs, lanes)
    check(call_kernel, shape, best(shape, MACHINES[lanes]), pieces=3)


def test_any_schedule_is_right(call_kernel: Any) -> None:
    shape = DenseShape((7,), 43, 29, 8)
    candidates = list(gemm.space(shape, AVX2))
    for params in random.Random(5).sample(candidates, 8):
        check(call_kernel, shape, params, pieces=2)
