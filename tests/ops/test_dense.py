"""Matrix products: numbers against numpy and ONNX Runtime, and everything they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import ModelError, ShapeError, UnsupportedError
from cnnc.ir.build import infer_types
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.dense import Dense, MatMul
from tests.ops.onnx_nodes import assert_agrees, imported, one_node


@pytest.mark.parametrize("bias", [None, (5,), (1, 5), (3, 1), (3, 5), ()])
@pytest.mark.parametrize("transpose_b", [0, 1])
@pytest.mark.parametrize("transpose_a", [0, 1])
@pytest.mark.parametrize("stored", [(), (1, 2)])
def test_gemm_as_onnxruntime(
    transpose_a: int, transpose_b: int, bias: tuple[int, ...] | None, stored: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(4)
    a = rng.standard_normal((4, 3) if transpose_a else (3, 4)).astype(np.float32)
    b = rng.standard_normal((5, 4) if transpose_b else (4, 5)).astype(np.float32)
    c = None if bias is None else rng.standard_normal(bias).astype(np.float32)
    inputs = [a, b] if c is None else [a, b, c]
    constants = [i for i in stored if i < len(inputs)]
    for alpha, beta in ((1.0, 1.0), (0.5, -2.0)):
        attributes = {"transA": transpose_a, "transB": transpose_b, "alpha": alpha, "beta": beta}
        assert_agrees("Gemm", inputs, constants=constants, **attributes)


def test_ordinary_layers_become_dense() -> None:
    x, b = np.zeros((2, 4), np.float32), np.zeros(5, np.float32)
    for transposed in (0, 1):
        w = np.zeros((5, 4) if transposed else (4, 5), np.float32)
        graph = imported(one_node("Gemm", [x, w, b], constants=[1, 2], transB=transposed))
        assert graph.outputs[0].op == Dense()
        assert len(graph.outputs[0].inputs) == 3
    graph = imported(one_node("MatMul", [x, np.zeros((4, 5), np.float32)], constants=[1]))
    assert graph.outputs[0].op == Dense()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((2, 1, 3, 4), (5, 4, 2)),
        ((4,), (4, 5)),
        ((3, 4), (4,)),
        ((4,), (2, 4, 3)),
    ],
)
@pytest.mark.parametrize("constants", [(), (1,)])
def test_mat_mul_as_onnxruntime(a: tuple[int, ...], b: tuple[int, ...], constants: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in (a, b)]
    assert_agrees("MatMul", arrays, constants=constants)


def test_integers_are_exact() -> None:
    big = np.array([[2**40 + 1, 3]], np.int64)
    np.testing.assert_array_equal(MatMul(transpose_b=True).reference(big, big), [[(2**40 + 1) ** 2 % 2**64 + 9]])


@pytest.mark.parametrize(
    ("op", "types", "message"),
    [
        (Dense(), (TensorType((2, 5)), TensorType((3, 4))), r"dense: weight takes 4 features but x : f32\[2,5\] has 5"),
        (Dense(), (TensorType((2, 4)), TensorType((4,))), r"takes x\[...,I\] and weight\[O,I\]"),
        (Dense(), (TensorType(()), TensorType((3, 4))), r"takes x\[...,I\]"),
        (Dense(), (TensorType((2, 4)), TensorType((3, 4)), TensorType((4,))), "bias must be a vector of 3"),
        (Dense(), (TensorType((2, 4)), TensorType((3, 4), DType.F64)), "weight is f64 but x is f32"),
        (Dense(), (TensorType((2, 4), DType.I32), TensorType((3, 4), DType.I32)), "must be of a float type"),
        (
            MatMul(),
            (TensorType((2, 3)), TensorType((4, 5))),
            r"a : f32\[2,3\] has 3 columns but b : f32\[4,5\] has 4 rows",
        ),
        (MatMul(True), (TensorType((2, 3)), TensorType((3, 5))), "has 2 columns but b .* has 3 rows"),
        (MatMul(), (TensorType(()), TensorType((3, 5))), "takes matrices, not the scalar"),
        (MatMul(), (TensorType((2, 2, 3)), TensorType((3, 3, 5))), "do not broadcast"),
    ],
)
def test_refuses(op: Dense | MatMul, types: tuple[TensorType, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        infer_types(op, types)


def test_run_time_batch_stays() -> None:
    batch = Dim.symbol("n", 7)
    assert Dense().infer(TensorType((batch, 4)), TensorType((3, 4))).shape == (batch, 3)
    assert MatMul().infer(TensorType((batch, 2, 4)), TensorType((4, 3))).shape == (batch, 2, 3)


def test_gemm_refuses() -> None:
    matrix, vector = np.zeros((3, 4), np.float32), np.zeros(4, np.float32)
    with pytest.raises(ModelError, match="Gemm takes matrices"):
        imported(one_node("Gemm", [matrix, vector]))
    with pytest.raises(ModelError, match=r"not broadcast"):
        imported(one_node("Gemm", [matrix, matrix, vector], transB=1))
    whole = np.zeros((3, 3), np.int32)
    with pytest.raises(UnsupportedError, match=r"the factor 0.5 of integers"):
        imported(one_node("Gemm", [whole, whole], alpha=0.5))
