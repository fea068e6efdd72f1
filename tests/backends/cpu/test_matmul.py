"""Products of matrices against numpy in float64: batches that broadcast, either operand transposed, ragged sizes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu import matmul
from cnnc.backends.cpu.machine import AVX2, AVX512
from cnnc.backends.cpu.matmul import MatMulParams, MatMulShape
from cnnc.backends.lower.body import plain_body
from cnnc.ops.dense import MatMul

MACHINES = {8: AVX2, 16: AVX512}
SIZES = [
    ((197, 64), (64, 197)),
    ((3, 40, 17), (3, 17, 32)),
    ((2, 1, 5, 7), (3, 7, 19)),
    ((4, 9), (2, 9, 3)),
    ((1, 2, 13, 1), (1, 1, 1, 100)),
    ((6, 8), (8, 16)),
]


def run(
    call_kernel: Any, arrays: tuple[np.ndarray, np.ndarray], op: MatMul, params: MatMulParams | None = None, **how: int
) -> np.ndarray:
    from tvm import te

    a, b = arrays
    lanes = how.get("lanes", 8)
    wanted = op.reference(a.astype(np.float64), b.astype(np.float64))
    *batch, rows, columns = wanted.shape
    depth = a.shape[-2 if op.transpose_a else -1]
    shape = MatMulShape(tuple(batch), rows, depth, columns, a.shape, b.shape, op.transpose_a, op.transpose_b, lanes)
    machine = MACHINES[lanes]
    chosen = params or min(matmul.space(shape, machine), key=lambda p: matmul.cost(shape, p, machine))
    residual = te.placeholder(wanted.shape, name="residual")

    def follow(anchor: Any) -> Any:
        return te.compute(anchor.shape, lambda *i: anchor(*i) * residual(*i), name="followed")

    body = plain_body((a.shape, b.shape), wanted.shape, (residual,), follow)
    r = np.random.default_rng(9).standard_normal(wanted.shape).astype(np.float32)
    got = call_kernel(matmul.build(shape, chosen, body), [a, b, r], wanted.shape, how.get("pieces", 1))
    np.testing.assert_allclose(got, wanted * r, rtol=1e-5, atol=1e-4)
    return np.asarray(got)


def draw(a: tuple[int, ...], b: tuple[int, ...], op: MatMul) -> tuple[np.ndarray, np.ndarray]:
    """Draw operands of these shapes, stored transposed where the operator says so."""
    rng = np.random.default_rng(sum(a) * 100 + sum(b))
    left, right = rng.standard_normal(a).astype(np.float32), rng.standard_normal(b).astype(np.float32)
    return (
        np.ascontiguousarray(left.swapaxes(-1, -2)) if op.transpose_a else left,
        np.ascontiguousarray(right.swapaxes(-1, -2)) if op.transpose_b else right,
    )


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("op", [MatMul(), MatMul(transpose_b=True), MatMul(transpose_a=True)])
@pytest.mark.parametrize(("a", "b"), SIZES)
def test_the_chosen_schedule_is_right(
    call_kernel: Any, a: tuple[int, ...], b: tuple[int, ...], op: MatMul, lanes: int
) -> None:
    run(call_kernel, draw(a, b, op), op, lanes=lanes, pieces=3)


def test_any_schedule_is_right(call_kernel: Any) -> None:
    op = MatMul(transpose_a=True, transpose_b=True)
    shape = MatMulShape((2,), 37, 21, 45, (2, 21, 37), (2, 45, 21), True, True, 8)
    for params in random.Random(3).sample(list(matmul.space(shape, AVX2)), 5):
        run(call_kernel, draw((2, 37, 21), (2, 21, 45), op), op, params, pieces=2)


def test_pieces_do_not_change_a_bit(call_kernel: Any) -> None:
    arrays = draw((3, 50, 30), (3, 30, 50), MatMul())
    results = [run(call_kernel, arrays, MatMul(), MatMulParams(5, 3), pieces=pieces) for pieces in (1, 2, 7)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
