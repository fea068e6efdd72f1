"""Softmax: numbers against ONNX Runtime at every opset, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import ModelError, ShapeError
from cnnc.ir.build import infer_types
from cnnc.ir.types import DType, TensorType
from cnnc.ops.softmax import LogSoftmax, Softmax
from tests.ops.onnx_nodes import assert_agrees, imported, one_node


@pytest.mark.parametrize("opset", [7, 11, 12, 13, 20])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1, -2])
@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 5, 1)])
def test_as_onnxruntime(op_type: str, axis: int | None, opset: int, shape: tuple[int, ...]) -> None:
    if opset < 11 and axis is not None and axis < 0:
        axis += 3
    x = (np.random.default_rng(opset).standard_normal(shape) * 20).astype(np.float32)
    attributes = {} if axis is None else {"axis": axis}
    assert_agrees(op_type, [x], opset=opset, **attributes)


def test_shares_add_up_however_large_the_numbers() -> None:
    x = np.array([[1e30, 1e30, -1e30], [700, 800, 900], [-1000, -1001, -1002]], np.float32)
    y = Softmax(1).reference(x)
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(y[0], [0.5, 0.5, 0])
    np.testing.assert_allclose(LogSoftmax(1).reference(x)[1], [-200, -100, 0])


def test_refuses() -> None:
    with pytest.raises(ShapeError, match="softmax: axis 2"):
        infer_types(Softmax(2), (TensorType((3, 4)),))
    with pytest.raises(ShapeError, match="log_softmax: x must be of a float type"):
        infer_types(LogSoftmax(0), (TensorType((3,), DType.I32),))
    with pytest.raises(ModelError, match="axis 5 does not exist"):
        imported(one_node("Softmax", [np.zeros((2, 3), np.float32)], axis=5))
