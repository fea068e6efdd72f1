"""Reading and writing at indices, and what is made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.errors import ModelError, ShapeError, UnsupportedError
from cnnc.ir.build import infer_types
from cnnc.ir.types import DType, TensorType
from cnnc.ops.gather import Gather, GatherElements, GatherNd
from cnnc.ops.scatter import ScatterElements, ScatterNd
from tests.ops.kernels import run_compute
from tests.ops.onnx_nodes import assert_agrees, imported, one_node, ours

RNG = np.random.default_rng(20240507)
X = RNG.random((4, 5, 3)).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_gather(axis: int, shape: tuple[int, ...]) -> None:
    indices = RNG.integers(-X.shape[axis], X.shape[axis], shape)
    want = np.take(X, np.where(indices < 0, indices + X.shape[axis], indices), axis)
    types = [TensorType(X.shape), TensorType(shape, DType.I64)]
    np.testing.assert_array_equal(run_compute(Gather(axis), types, [X, indices])[0], want)
    if indices.size:
        for constants in ([], [1]):
            assert_agrees("Gather", [X, indices], axis=axis, constants=constants, rtol=0, atol=0)


def test_indices_outside_are_never_read() -> None:
    indices = np.array([0, 5, 2**40, -6, -(2**62), 4])
    types = [TensorType((5,)), TensorType((6,), DType.I64)]
    x = np.arange(5, dtype=np.float32)
    (y,) = run_compute(Gather(0), types, [x, indices])
    np.testing.assert_array_equal(y, [0, 4, 4, 0, 0, 4])
    (y,) = run_compute(GatherElements(0), types, [x, indices])
    np.testing.assert_array_equal(y, [0, 4, 4, 0, 0, 4])
    with pytest.raises(ShapeError, match="gather: index 5 is outside an axis of size 5"):
        Gather(0).reference(x, indices)


@pytest.mark.parametrize("op_type", ["Gather", "GatherElements", "ScatterElements"])
def test_onnx_constant_index_outside(op_type: str) -> None:
    indices = np.array([[0], [7]])
    inputs: list[Any] = [X[:, :1, 0], indices] + (
        [np.zeros((2, 1), np.float32)] if op_type == "ScatterElements" else []
    )
    with pytest.raises(ModelError, match="index 7"):
        imported(one_node(op_type, inputs, constants=[1]))


def test_gather_errors() -> None:
    x, i = TensorType((4, 5)), TensorType((2,), DType.I64)
    with pytest.raises(ShapeError, match=r"gather: indices are i32 or i64, not f32\[2\]"):
        infer_types(Gather(0), (x, TensorType((2,))))
    with pytest.raises(ShapeError, match="gather: axis 2 is outside"):
        infer_types(Gather(2), (x, i))
    with pytest.raises(ShapeError, match="have nothing to choose from"):
        infer_types(Gather(0), (TensorType((0, 5)), i))
    with pytest.raises(ShapeError, match=r"gather_elements: indices .* do not lie inside x"):
        infer_types(GatherElements(0), (x, TensorType((2, 6), DType.I64)))
    with pytest.raises(ShapeError, match=r"gather_nd: indices .* hold no positions"):
        infer_types(GatherNd(), (x, TensorType((2, 3), DType.I64)))
    with pytest.raises(ShapeError, match="gather_nd: batch_dims 1 does not fit"):
        infer_types(GatherNd(1), (x, i))
    with pytest.raises(ShapeError, match=r"scatter_nd: updates .* must be"):
        infer_types(ScatterNd(), (x, TensorType((3, 1), DType.I64), TensorType((3, 4))))
    with pytest.raises(ShapeError, match=r"updates .* have another element type"):
        infer_types(ScatterNd(), (x, TensorType((3, 1), DType.I64), TensorType((3, 5), DType.F16)))
    with pytest.raises(ShapeError, match="reduction is none, add, mul, max, min, not 'sub'"):
        infer_types(ScatterElements(0, "sub"), (x, TensorType((2, 5), DType.I64), TensorType((2, 5))))


@pytest.mark.parametrize("constants", [[], [1]])
def test_onnx_gather_elements_and_nd(constants: list[int]) -> None:
    along = RNG.integers(-5, 5, (4, 7, 2))
    assert_agrees("GatherElements", [X, along], axis=1, constants=constants)
    assert_agrees("GatherND", [X, RNG.integers(-3, 3, (2, 6, 3))], constants=constants)
    assert_agrees("GatherND", [X, RNG.integers(0, 4, (6, 1))], constants=constants)
    assert_agrees("GatherND", [X, RNG.integers(0, 3, (4, 2, 2))], batch_dims=1, constants=constants)


def scattered(x: np.ndarray, indices: np.ndarray, updates: np.ndarray, axis: int, reduction: str) -> np.ndarray:
    """ONNX's definition, one update at a time."""
    y = x.astype(np.float64)
    for at in np.ndindex(indices.shape):
        where = (*at[:axis], int(indices[at]), *at[axis + 1 :])
        old, new = y[where], float(updates[at])
        y[where] = {"none": new, "add": old + new, "mul": old * new, "max": max(old, new), "min": min(old, new)}[
            reduction
        ]
    return y


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
@pytest.mark.parametrize("axis", [0, 1])
def test_scatter_elements(reduction: str, axis: int) -> None:
    x = RNG.random((5, 6)).astype(np.float32)
    indices, updates = RNG.integers(-5, 5, (4, 5)), RNG.random((4, 5)).astype(np.float32)
    op = ScatterElements(axis, reduction)
    want = scattered(x, indices, updates, axis, reduction)
    np.testing.assert_allclose(op.reference(x, indices, updates), want, rtol=1e-5)
    types = [TensorType(x.shape), TensorType((4, 5), DType.I64), TensorType((4, 5))]
    np.testing.assert_allclose(run_compute(op, types, [x, indices, updates])[0], want, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
@pytest.mark.parametrize("constants", [[], [1]])
@pytest.mark.parametrize("shape", [(6, 1), (2, 4, 2), (9, 3), (1,)])
def test_scatter_nd(reduction: str, constants: list[int], shape: tuple[int, ...]) -> None:
    x = RNG.random((3, 4, 3)).astype(np.float32)
    indices = RNG.integers(-3, 3, shape)
    updates = RNG.random((*shape[:-1], *x.shape[shape[-1] :])).astype(np.float32)
    want = x.astype(np.float64)
    for at in np.ndindex(shape[:-1]):
        where = tuple(indices[at].tolist())
        old, new = want[where], updates[at].astype(np.float64)
        want[where] = {
            "none": new, "add": old + new, "mul": old * new, "max": np.maximum(old, new), "min": np.minimum(old, new)
        }[reduction]  # fmt: skip
    model = one_node("ScatterND", [x, indices, updates], opset=18, constants=constants, reduction=reduction)
    feeds = {"x0": x, "x1": indices, "x2": updates}
    np.testing.assert_allclose(ours(model, feeds)[0], want, rtol=1e-5)
    types = [TensorType(x.shape), TensorType(shape, DType.I64), TensorType(updates.shape)]
    np.testing.assert_allclose(run_compute(ScatterNd(reduction), types, [x, indices, updates])[0], want, rtol=1e-5)


def test_known_positions_need_no_search() -> None:
    x = np.zeros((4, 3), np.float32)
    graph = imported(one_node("ScatterND", [x, np.array([[1]]), x[:1]], opset=18, constants=[1]))
    assert sorted(node.op.name for node in graph.nodes if node.inputs) == ["gather", "where"]


def test_updates_outside_are_dropped() -> None:
    x, updates = np.zeros(4, np.float32), np.array([1, 2, 3], np.float32)
    indices = np.array([1, 9, -9])
    types = [TensorType((4,)), TensorType((3,), DType.I64), TensorType((3,))]
    np.testing.assert_array_equal(run_compute(ScatterElements(0), types, [x, indices, updates])[0], [0, 1, 0, 0])
    types[1] = TensorType((3, 1), DType.I64)
    np.testing.assert_array_equal(run_compute(ScatterNd(), types, [x, indices[:, None], updates])[0], [0, 1, 0, 0])


@pytest.mark.parametrize("axis", [0, -1, 1])
def test_onnx_one_hot(axis: int) -> None:
    indices = np.array([[0, 3, -1], [5, -5, 2]])
    values = np.array([0.5, 2.0], np.float32)
    assert_agrees("OneHot", [indices, np.array(5), values], axis=axis, constants=[1])
    assert_agrees("OneHot", [indices, np.array(5), values], axis=axis, constants=[1, 2])


def test_onnx_hardmax() -> None:
    x = RNG.integers(0, 4, (3, 4, 5)).astype(np.float32)
    assert_agrees("Hardmax", [x], opset=13)
    assert_agrees("Hardmax", [x], opset=13, axis=1)
    assert_agrees("Hardmax", [x], opset=11)


def test_onnx_triangles_and_eye() -> None:
    x = RNG.random((2, 4, 5)).astype(np.float32)
    for k in (-1, 0, 2):
        for upper in (0, 1):
            assert_agrees("Trilu", [x, np.array(k)], opset=14, constants=[1], upper=upper)
        assert_agrees("EyeLike", [x[0]], k=k, dtype=7)
    with pytest.raises(ModelError, match="needs a matrix"):
        imported(one_node("EyeLike", [x]))


def test_onnx_dropout_is_identity_at_inference() -> None:
    x = RNG.random((3, 4)).astype(np.float32)
    assert_agrees("Dropout", [x], opset=10, ratio=0.3)
    assert_agrees("Dropout", [x, np.array(0.3, np.float32), np.array(False)], opset=13, constants=[1, 2], outputs=2)
    with pytest.raises(UnsupportedError, match="drops elements at random"):
        imported(one_node("Dropout", [x, np.array(0.3, np.float32), np.array(True)], opset=13, constants=[1, 2]))
    with pytest.raises(UnsupportedError, match="mask is undefined"):
        imported(one_node("Dropout", [x], opset=7, outputs=2))
    empty = np.zeros(0, np.float32)
    with pytest.raises(ModelError, match="single number"):
        imported(one_node("Dropout", [x, empty, np.array(True)], opset=13, constants=[1, 2]))
