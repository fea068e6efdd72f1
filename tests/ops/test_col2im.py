"""Columns into images: numbers against PyTorch and ONNX Runtime, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.errors import ModelError, ShapeError
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Col2Im
from tests.ops.onnx_nodes import assert_agrees, imported, one_node

WINDOWS = [
    ((6, 8), {"kernel_size": (2, 2), "stride": (2, 2)}),
    ((7, 6), {"kernel_size": (3, 3), "stride": (1, 2), "padding": (1, 1)}),
    ((9, 1), {"kernel_size": (3, 1), "stride": (2, 1), "dilation": (2, 1)}),
    ((9, 8), {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (3, 2)}),
]


@pytest.mark.parametrize(("size", "windows"), WINDOWS)
def test_as_pytorch(size: tuple[int, int], windows: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32))
    columns = torch.nn.functional.unfold(image, **windows)
    wanted = torch.nn.functional.fold(columns, size, **windows)
    pad = windows.get("padding", (0, 0))
    op = Col2Im(size, windows["kernel_size"], windows["stride"], (*pad, *pad), windows.get("dilation", (1, 1)))
    np.testing.assert_allclose(op.reference(columns.numpy()), wanted.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "kernel", "windows"),
    [
        ([6, 8], [2, 2], {"strides": [2, 2]}),
        ([5, 6], [3, 2], {"pads": [1, 0, 2, 1]}),
        ([9], [3], {"strides": [2]}),  # with dilations, ONNX Runtime runs over into the next channel along one axis
        ([4, 3, 5], [2, 2, 3], {}),
    ],
)
def test_as_onnxruntime(size: list[int], kernel: list[int], windows: dict[str, Any]) -> None:
    rank = len(size)
    op = Col2Im(
        tuple(size),
        tuple(kernel),
        tuple(windows.get("strides", (1,) * rank)),
        tuple(windows.get("pads", (0,) * 2 * rank)),
        tuple(windows.get("dilations", (1,) * rank)),
    )
    shape = (2, 3 * int(np.prod(kernel)), int(np.prod(op.counts)))
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    sizes = [np.array(size, np.int64), np.array(kernel, np.int64)]
    assert_agrees("Col2Im", [x, *sizes], opset=18, constants=(1, 2), **windows)


@pytest.mark.parametrize(
    ("x", "size", "message"),
    [
        (TensorType((1, 9, 4)), (4, 4), r"the 4 taps of kernel=\(2, 2\) must divide axis 1"),
        (TensorType((1, 8, 5)), (4, 4), r"an image of \(4, 4\) has 4 windows .* but x : .* has 5"),
        (TensorType((1, 2, 2, 4)), (4, 4), "takes columns"),
        (TensorType((1, 8, 4), DType.I32), (4, 4), "must be of a float type"),
        (TensorType((1, 8, 4)), (1, 4), "larger than spatial axis 0"),
    ],
)
def test_what_does_not_fit(x: TensorType, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Col2Im(size, (2, 2), (2, 2), (0,) * 4, (1, 1)).infer(x)


def test_sizes_of_different_ranks() -> None:
    sizes = [np.array([4, 4], np.int64), np.array([2], np.int64)]
    model = one_node("Col2Im", [np.zeros((1, 8, 4), np.float32), *sizes], opset=18, constants=(1, 2))
    with pytest.raises(ModelError, match="block_shape"):
        imported(model)
