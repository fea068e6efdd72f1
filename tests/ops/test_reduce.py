"""Reductions, positions of extremes and running sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.errors import ModelError, ShapeError, UnsupportedError
from cnnc.ir.build import infer_types
from cnnc.ir.layout import Layout
from cnnc.ir.op import Op
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops import reduce as reductions
from cnnc.ops.scan import ArgMax, ArgMin, CumSum
from tests.ops.kernels import run_compute
from tests.ops.onnx_nodes import assert_agrees, imported, one_node, ours

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(20240504)

TORCH: list[tuple[type[Op], Any]] = [
    (reductions.ReduceSum, lambda x, dim: torch.sum(x, dim, keepdim=True)),
    (reductions.ReduceMean, lambda x, dim: torch.mean(x, dim, keepdim=True)),
    (reductions.ReduceMax, lambda x, dim: torch.amax(x, dim, keepdim=True)),
    (reductions.ReduceMin, lambda x, dim: torch.amin(x, dim, keepdim=True)),
    (reductions.ReduceL1, lambda x, dim: torch.linalg.vector_norm(x, 1, dim, keepdim=True)),
    (reductions.ReduceL2, lambda x, dim: torch.linalg.vector_norm(x, 2, dim, keepdim=True)),
    (reductions.ReduceSumSquare, lambda x, dim: torch.sum(x * x, dim, keepdim=True)),
    (reductions.ReduceLogSumExp, lambda x, dim: torch.logsumexp(x, dim, keepdim=True)),
    (reductions.ReduceProd, lambda x, dim: torch.prod(x, dim[-1], keepdim=True).prod(dim[0], keepdim=True)),
]


@pytest.mark.parametrize(("op", "theirs"), TORCH, ids=[op.__name__ for op, _ in TORCH])
@pytest.mark.parametrize("axes", [(0, 2), (1, 3), (2, 3)])
def test_equals_pytorch(op: Any, theirs: Any, axes: tuple[int, ...]) -> None:
    x = RNG.uniform(-2, 2, (3, 5, 4, 6))
    want = theirs(torch.from_numpy(x), axes).numpy()
    np.testing.assert_allclose(op(axes).reference(x), want, rtol=1e-12)
    single = x.astype(np.float32)
    for layout in (None, Layout("NCHW4c")) if axes == (2, 3) else (None,):
        (compiled,) = run_compute(op(axes), [TensorType(x.shape, DType.F32, layout)], [single])
        np.testing.assert_allclose(compiled, want, rtol=1e-4, atol=1e-5)


def test_the_reference_adds_up_precisely() -> None:
    x = np.full(3_000_000, 0.1, np.float32)
    exact = 3_000_000 * float(np.float32(0.1))
    assert abs(float(reductions.ReduceSum((0,), False).reference(x)) - exact) < 1e-7 * exact


def test_log_sum_exp_does_not_overflow() -> None:
    x = np.array([[1000, 1000], [-1000, -1001], [np.inf, 0], [-np.inf, -np.inf], [np.nan, 0]], np.float32)
    op = reductions.ReduceLogSumExp((1,), False)
    want = torch.logsumexp(torch.from_numpy(x), 1).numpy()
    np.testing.assert_allclose(op.reference(x), want, rtol=1e-6)
    np.testing.assert_allclose(run_compute(op, [TensorType(x.shape)], [x])[0], want, rtol=1e-6)


EMPTY = [
    (reductions.ReduceSum, 0.0),
    (reductions.ReduceProd, 1.0),
    (reductions.ReduceMean, np.nan),
    (reductions.ReduceMax, -np.inf),
    (reductions.ReduceMin, np.inf),
    (reductions.ReduceL1, 0.0),
    (reductions.ReduceL2, 0.0),
    (reductions.ReduceSumSquare, 0.0),
    (reductions.ReduceLogSum, -np.inf),
    (reductions.ReduceLogSumExp, -np.inf),
]


@pytest.mark.parametrize(("op", "want"), EMPTY, ids=[op.__name__ for op, _ in EMPTY])
def test_nothing_reduces_to_the_neutral_element(op: Any, want: float) -> None:
    x = np.zeros((2, 0, 3), np.float32)
    np.testing.assert_array_equal(op((1,), False).reference(x), np.full((2, 3), want, np.float32))
    (compiled,) = run_compute(op((1,), False), [TensorType(x.shape)], [x])
    np.testing.assert_array_equal(compiled, np.full((2, 3), want, np.float32))


def test_nothing_of_integers_and_bools() -> None:
    assert reductions.ReduceMax((0,), False).reference(np.zeros(0, np.int8)) == -128
    assert reductions.ReduceMin((0,), False).reference(np.zeros(0, np.int64)) == 2**63 - 1
    assert not reductions.ReduceMax((0,), False).reference(np.zeros(0, np.bool_))
    assert reductions.ReduceMin((0,), False).reference(np.zeros(0, np.bool_))


@pytest.mark.parametrize("op", [reductions.ReduceMax, reductions.ReduceMin])
def test_extremes_keep_nan(op: Any) -> None:
    x = np.array([[1, np.nan, 2], [np.nan, np.inf, 0], [3, 4, 5]], np.float32)
    want = op((1,)).reference(x)
    assert np.isnan(want).ravel().tolist() == [True, True, False]
    np.testing.assert_array_equal(run_compute(op((1,)), [TensorType(x.shape)], [x])[0], want)


def test_layouts() -> None:
    x = TensorType((2, 5, 3, 3), DType.F32, Layout("NCHW4c"))
    assert infer_types(reductions.ReduceMean((2, 3)), (x,)) == (TensorType((2, 5, 1, 1), DType.F32, x.layout),)
    for op in (reductions.ReduceMean((1,)), reductions.ReduceMean((2, 3), False), reductions.ReduceMean((0, 2))):
        with pytest.raises(ShapeError, match="takes a plain tensor"):
            infer_types(op, (x,))


def test_errors() -> None:
    x = TensorType((2, 3))
    with pytest.raises(ShapeError, match=r"reduce_sum: axis 2 is outside \[-2, 1\]"):
        infer_types(reductions.ReduceSum((2,)), (x,))
    with pytest.raises(ShapeError, match=r"reduce_sum: axes \[1, 1\] name one axis twice"):
        infer_types(reductions.ReduceSum((1, 1)), (x,))
    with pytest.raises(ShapeError, match="must be sorted and not negative"):
        infer_types(reductions.ReduceSum((-1,)), (x,))
    with pytest.raises(ShapeError, match="reduce_mean: takes elements of f32, f16, bf16, f64, not x : i64"):
        infer_types(reductions.ReduceMean((0,)), (x.with_dtype(DType.I64),))


def test_a_run_time_axis_is_not_reduced_at_its_bound() -> None:
    n = TensorType((Dim.symbol("n", 4), 3))
    assert infer_types(reductions.ReduceMean((0,)), (n,)) == (TensorType((1, 3)),)
    with pytest.raises(UnsupportedError, match="known only at run time"):
        run_compute(reductions.ReduceMean((0,)), [n], [np.zeros((4, 3), np.float32)])


REDUCTIONS = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2", "ReduceProd", "ReduceLogSumExp", "ReduceSumSquare")


@pytest.mark.parametrize("op_type", REDUCTIONS)
@pytest.mark.parametrize("keepdims", [0, 1])
def test_onnx_axes_as_attribute_and_input(op_type: str, keepdims: int) -> None:
    x = RNG.uniform(0.1, 2, (2, 3, 4)).astype(np.float32)
    assert_agrees(op_type, [x], opset=11, axes=[-1, 0], keepdims=keepdims)
    assert_agrees(op_type, [x], opset=11, keepdims=keepdims)
    assert_agrees(op_type, [x, np.array([-2])], opset=18, constants=[1], keepdims=keepdims)
    assert_agrees(op_type, [x], opset=18, keepdims=keepdims)


def test_onnx_no_axes() -> None:
    x = RNG.uniform(-2, 2, (2, 3)).astype(np.float32)
    none = np.zeros(0, np.int64)
    for inputs in ([x], [x, none]):
        (kept,) = ours(one_node("ReduceL1", inputs, opset=18, constants=[1], noop_with_empty_axes=1), {"x0": x})
        np.testing.assert_array_equal(kept, np.abs(x))
        (total,) = ours(one_node("ReduceL1", inputs, opset=18, constants=[1]), {"x0": x})
        np.testing.assert_allclose(total, np.abs(x).sum(keepdims=True), rtol=1e-6)


def test_onnx_reductions_of_integers() -> None:
    x = RNG.integers(-20, 20, (3, 5)).astype(np.int32)
    for op_type in ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean"):
        assert_agrees(op_type, [x], opset=13)
    assert_agrees("ReduceProd", [x[0]], opset=13)


@pytest.mark.parametrize("op", [ArgMax, ArgMin])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_positions(op: Any, axis: int) -> None:
    x = RNG.integers(0, 3, (4, 5, 6)).astype(np.float32)
    first = getattr(np, "argmax" if op is ArgMax else "argmin")(x, axis)
    np.testing.assert_array_equal(op(axis, False).reference(x), first)
    np.testing.assert_array_equal(run_compute(op(axis, False), [TensorType(x.shape)], [x])[0], first)
    best = np.take_along_axis(x, np.expand_dims(first, axis), axis)
    # The last of equals, found by brute force.
    last = np.where(x == best, np.arange(x.shape[axis]).reshape([-1 if i == axis else 1 for i in range(3)]), -1).max(
        axis
    )
    np.testing.assert_array_equal(op(axis, False, True).reference(x), last)
    np.testing.assert_array_equal(run_compute(op(axis, False, True), [TensorType(x.shape)], [x])[0], last)


def test_positions_in_onnx() -> None:
    x = RNG.integers(0, 4, (4, 7)).astype(np.float32)
    for op_type in ("ArgMax", "ArgMin"):
        for attributes in ({}, {"axis": -1, "keepdims": 0}, {"axis": 1, "select_last_index": 1}):
            assert_agrees(op_type, [x], opset=13, **attributes)


def test_position_in_nothing() -> None:
    with pytest.raises(ShapeError, match=r"arg_max: axis 0 of x .* has no elements"):
        infer_types(ArgMax(0), (TensorType((0, 3)),))


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_running_sums(exclusive: bool, reverse: bool) -> None:
    x = RNG.uniform(-2, 2, (3, 7, 2)).astype(np.float32)
    want = np.zeros(x.shape)
    for i in range(7):
        chosen = range(i + exclusive, 7) if reverse else range(i + 1 - exclusive)
        want[:, i] = x[:, list(chosen)].astype(np.float64).sum(1)
    op = CumSum(1, exclusive, reverse)
    np.testing.assert_allclose(op.reference(x), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run_compute(op, [TensorType(x.shape)], [x])[0], want, rtol=1e-5, atol=1e-5)
    assert_agrees("CumSum", [x, np.array(-2)], constants=[1], exclusive=int(exclusive), reverse=int(reverse))


def test_running_sums_keep_values_apart() -> None:
    # Infinity after a position must not turn it into NaN.
    x = np.array([1, 2, np.inf, 3], np.float32)
    np.testing.assert_array_equal(run_compute(CumSum(0), [TensorType((4,))], [x])[0], [1, 3, np.inf, np.inf])


def test_onnx_axis_that_does_not_exist() -> None:
    with pytest.raises(ModelError, match="axis 3 is outside"):
        imported(one_node("CumSum", [np.zeros((2, 2), np.float32), np.array(3)], constants=[1]))
