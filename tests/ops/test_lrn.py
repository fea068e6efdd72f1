"""Local response normalisation: numbers against PyTorch and ONNX Runtime, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import ModelError, ShapeError
from cnnc.ir.build import infer_types
from cnnc.ir.types import TensorType
from cnnc.ops.lrn import Lrn
from tests.ops.onnx_nodes import assert_agrees, imported, one_node

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("size", [1, 3, 5, 9])
@pytest.mark.parametrize("beta", [0.75, 0.5, 1.3])
def test_equals_pytorch_and_onnxruntime(size: int, beta: float) -> None:
    x = np.random.default_rng(size).standard_normal((3, 7, 4, 5)).astype(np.float32)
    wanted = torch.nn.functional.local_response_norm(torch.from_numpy(x), size, 0.3, beta, 2.0).numpy()
    np.testing.assert_allclose(Lrn(size, 0.3, beta, 2.0).reference(x), wanted, rtol=1e-5, atol=1e-6)
    assert_agrees("LRN", [x], size=size, alpha=0.3, beta=beta, bias=2.0)


def test_even_windows_reach_further_ahead() -> None:
    """ONNX: from c - floor((size-1)/2) to c + ceil((size-1)/2), by hand."""
    x = np.array([1, 2, 3, 4], np.float32).reshape(1, 4, 1)
    y = Lrn(4, 4.0, 1.0, 0.0).reference(x).reshape(-1)
    np.testing.assert_allclose(y, [1 / (1 + 4 + 9), 2 / (1 + 4 + 9 + 16), 3 / (4 + 9 + 16), 4 / (9 + 16)], rtol=1e-6)


def test_refuses() -> None:
    with pytest.raises(ShapeError, match="lrn: size=0 must be at least 1"):
        infer_types(Lrn(0), (TensorType((1, 2, 3)),))
    with pytest.raises(ShapeError, match="lrn: needs axes N and C"):
        infer_types(Lrn(3), (TensorType((4,)),))
    with pytest.raises(ModelError, match="size"):
        imported(one_node("LRN", [np.zeros((1, 2, 3, 3), np.float32)]))
