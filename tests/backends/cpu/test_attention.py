"""Attention kernels against the operator's definition in float64: odd sizes, masks, rows of nothing but -inf."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu import attention
from cnnc.backends.cpu.attention import AttentionParams, AttentionShape
from cnnc.backends.cpu.machine import AVX2, AVX512, Machine
from cnnc.backends.lower.body import Body
from cnnc.ops.attention import Attention

MACHINES = {8: AVX2, 16: AVX512}


def apart(heads: int, size: int, value_size: int) -> Attention:
    return Attention(heads, size, value_size, size**-0.5, (0, 0, 0), (size, size, value_size))


def joined(heads: int, size: int) -> Attention:
    return Attention(heads, size, size, size**-0.5, (0, heads * size, 2 * heads * size), (size,) * 3)


def draw(op: Attention, batch: int, queries: int, keys: int, mask: tuple[int, ...] | None = None) -> list[np.ndarray]:
    rng = np.random.default_rng(queries * 1000 + keys)
    features = [start + (op.heads - 1) * step for start, step in zip(op.starts, op.steps, strict=True)]
    shapes = [
        (batch, queries, features[0] + op.size + 3),
        (batch, keys, features[1] + op.size),
        (batch, keys, features[2] + op.value_size + 1),
        *([mask] if mask is not None else []),
    ]
    return [rng.standard_normal(shape).astype(np.float32) * 2 for shape in shapes]


def run(
    call_kernel: Any, op: Attention, arrays: list[np.ndarray], params: AttentionParams | None = None, **how: Any
) -> np.ndarray:
    """Run a kernel on q, k, v and perhaps a mask, or on one array that is all three; a residual follows."""
    from tvm import te

    lanes, pieces = how.get("lanes", 8), how.get("pieces", 1)
    machine: Machine = MACHINES[lanes]
    q, k = arrays[0], arrays[min(1, len(arrays) - 1)]
    mask = arrays[3].shape if len(arrays) > 3 else None
    shape = AttentionShape(op, q.shape[0], q.shape[1], k.shape[1], mask, lanes)
    output = (*q.shape[:2], op.heads * op.value_size)
    inputs = [te.placeholder(array.shape, name=f"x{i}") for i, array in enumerate(arrays)]
    operands = (inputs[0],) * 3 if len(arrays) == 1 else tuple(inputs)
    anchor, residual = te.placeholder(output, name="anchor"), te.placeholder(output, name="residual")
    final = te.compute(output, lambda *i: anchor(*i) + residual(*i), name="sum")
    body = Body((*inputs, residual), operands, anchor, final)
    chosen = params or min(attention.space(shape, machine), key=lambda p: attention.cost(shape, p, machine))
    zero = np.zeros(output, np.float32)
    return np.asarray(call_kernel(attention.build(shape, chosen, machine, body), [*arrays, zero], output, pieces))


def check(op: Attention, arrays: list[np.ndarray], got: np.ndarray) -> None:
    exact = [array.astype(np.float64) for array in (arrays * 3 if len(arrays) == 1 else arrays)]
    np.testing.assert_allclose(got, op.reference(*exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize(
    ("op", "batch", "queries", "keys"),
    [
        (apart(3, 64, 64), 1, 197, 197),
        (apart(2, 17, 19), 2, 5, 7),
        (apart(2, 32, 80), 1, 33, 29),
        (apart(1, 80, 32), 3, 8, 16),
        (apart(2, 3, 1), 1, 9, 1),
        (apart(2, 1, 5), 1, 1, 50),
    ],
)
def test_sizes(call_kernel: Any, op: Attention, batch: int, queries: int, keys: int, lanes: int) -> None:
    arrays = draw(op, batch, queries, keys)
    check(op, arrays, run(call_kernel, op, arrays, lanes=lanes, pieces=3))


@pytest.mark.parametrize("params", [AttentionParams(1, 8), AttentionParams(2, 5), AttentionParams(4, 2)])
def test_any_schedule_is_right(call_kernel: Any, params: AttentionParams) -> None:
    op = apart(2, 24, 20)
    arrays = draw(op, 1, 43, 31)
    check(op, arrays, run(call_kernel, op, arrays, params, pieces=2))


def test_one_tensor_is_queries_keys_and_values(call_kernel: Any) -> None:
    op = joined(3, 16)
    arrays = [np.random.default_rng(1).standard_normal((2, 21, 144)).astype(np.float32)]
    check(op, arrays, run(call_kernel, op, arrays))


@pytest.mark.parametrize("mask", [(13,), (1, 13), (2, 1, 9, 13), (1, 3, 1, 13), (3, 9, 1), (2, 3, 9, 13)])
def test_masks_broadcast(call_kernel: Any, mask: tuple[int, ...]) -> None:
    op = apart(3, 8, 8)
    arrays = draw(op, 2, 9, 13, mask)
    check(op, arrays, run(call_kernel, op, arrays))


def test_masked_keys_count_for_nothing_and_a_row_without_keys_is_not_a_number(call_kernel: Any) -> None:
    op = apart(2, 8, 8)
    arrays = draw(op, 1, 11, 6, (1, 1, 11, 6))
    arrays[3][...] = np.where(np.random.default_rng(0).random((11, 6)) < 0.4, -np.inf, 0)
    arrays[3][0, 0, :, 2] = 0
    arrays[3][0, 0, 4] = -np.inf
    got = run(call_kernel, op, arrays)
    assert np.isnan(got[0, 4]).all()
    assert np.isfinite(np.delete(got[0], 4, axis=0)).all()
    check(op, arrays, got)
    arrays[2][0, 3] = 1e30
    arrays[3][..., 3] = -np.inf
    check(op, arrays, run(call_kernel, op, arrays))


def test_large_scores_neither_overflow_nor_vanish(call_kernel: Any) -> None:
    op = apart(1, 8, 8)
    arrays = draw(op, 1, 17, 23)
    arrays[0] *= 300
    check(op, arrays, run(call_kernel, op, arrays))
    arrays[2] *= np.float32(1e37)
    got = run(call_kernel, op, arrays)
    np.testing.assert_allclose(got, op.reference(*(a.astype(np.float64) for a in arrays)), rtol=1e-4, atol=1e32)


def test_nan_and_infinity_spread_as_defined(call_kernel: Any) -> None:
    op = apart(1, 8, 8)
    arrays = draw(op, 1, 12, 9)
    arrays[0][0, 3, 2] = np.nan
    arrays[0][0, 5, 1] = np.inf
    with np.errstate(invalid="ignore"):
        check(op, arrays, run(call_kernel, op, arrays))


def test_pieces_do_not_change_a_bit(call_kernel: Any) -> None:
    op = apart(2, 20, 12)
    arrays = draw(op, 2, 37, 18)
    results = [run(call_kernel, op, arrays, AttentionParams(1, 6), pieces=pieces) for pieces in (1, 2, 5)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
