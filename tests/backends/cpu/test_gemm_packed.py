"""Layers of many rows on packed weights against numpy in float64, sizes beside every tile, block and vector."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu import gemm_packed
from cnnc.backends.cpu.gemm import DenseShape
from cnnc.backends.cpu.gemm_packed import PackedParams
from cnnc.backends.cpu.machine import AVX2, AVX512, Machine
from cnnc.backends.lower.body import plain_body
from cnnc.ops.blocked import packed_block, weight_layout

MACHINES = {8: AVX2, 16: AVX512}
SIZES = [
    ((197,), 33, 48),
    ((5,), 40, 24),
    ((4,), 1, 1),
    ((13,), 48, 11),
    ((1, 7), 17, 64),
    ((2, 3), 20, 17),
    ((2, 1, 7), 16, 29),
    ((3, 4), 64, 100),
]


def check(call_kernel: Any, shape: DenseShape, params: PackedParams, pieces: int) -> None:
    from tvm import te

    rng = np.random.default_rng(shape.inputs * 100 + shape.outputs)
    x = rng.standard_normal((*shape.leading, shape.inputs), np.float32)
    w = rng.standard_normal((shape.outputs, shape.inputs), np.float32)
    r = rng.standard_normal((*shape.leading, shape.outputs), np.float32)
    b = rng.standard_normal(shape.outputs, np.float32)
    packed = weight_layout(2, 1, packed_block(shape.lanes)).pack(w)
    assert packed.shape == gemm_packed.weight_shape(shape)
    bias, residual = te.placeholder(b.shape, name="bias"), te.placeholder(r.shape, name="residual")

    def follow(anchor: Any) -> Any:
        return te.compute(anchor.shape, lambda *i: anchor(*i) + bias(i[-1]) + residual(*i), name="followed")

    wanted = x.astype(np.float64) @ w.T.astype(np.float64) + b + r
    body = plain_body((x.shape, packed.shape), wanted.shape, (bias, residual), follow)
    got = call_kernel(gemm_packed.build(shape, params, body), [x, packed, b, r], wanted.shape, pieces)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def best(shape: DenseShape, machine: Machine) -> PackedParams:
    return min(gemm_packed.space(shape, machine), key=lambda p: gemm_packed.cost(shape, p, machine))


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize(("leading", "inputs", "outputs"), SIZES)
def test_the_chosen_schedule_is_right(
    call_kernel: Any, leading: tuple[int, ...], inputs: int, outputs: int, lanes: int
) -> None:
    shape = DenseShape(leading, inputs, outputs, lanes)
    check(call_kernel, shape, best(shape, MACHINES[lanes]), pieces=3)


def test_any_schedule_is_right(call_kernel: Any) -> None:
    shape = DenseShape((2, 17), 43, 77, 8)
    candidates = list(gemm_packed.space(shape, AVX2))
    for params in random.Random(5).sample(candidates, 6):
        check(call_kernel, shape, params, pieces=2)


def test_two_threads_give_the_bits_of_one(call_kernel: Any) -> None:
    shape = DenseShape((23,), 50, 40, 8)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((23, 50), np.float32)
    packed = weight_layout(2, 1, 16).pack(rng.standard_normal((40, 50), np.float32))
    results = []
    for threads in (1, 2):
        machine = Machine(lanes=8, registers=16, threads=threads)
        body = plain_body((x.shape, packed.shape), (23, 40))
        func = gemm_packed.build(shape, best(shape, machine), body)
        results.append(call_kernel(func, [x, packed], (23, 40), pieces=threads))
    np.testing.assert_array_equal(*results)
