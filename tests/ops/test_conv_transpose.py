"""Transposed convolution: numbers against PyTorch and ONNX Runtime, and everything it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import CnncError, ModelError, ShapeError, UnsupportedError
from cnnc.ir.build import infer_types
from cnnc.ir.types import TensorType
from cnnc.ops.conv_transpose import ConvTranspose
from tests.ops.kernels import run_compute
from tests.ops.onnx_nodes import assert_agrees, imported, one_node

torch = pytest.importorskip("torch")

_TORCH = {
    1: torch.nn.functional.conv_transpose1d,
    2: torch.nn.functional.conv_transpose2d,
    3: torch.nn.functional.conv_transpose3d,
}


def random_case(rng: np.random.Generator) -> tuple[ConvTranspose, tuple[np.ndarray, ...]]:
    """Draw a valid transposed convolution with equal pads on both sides, as PyTorch has them."""
    rank = int(rng.integers(1, 4))
    groups = int(rng.choice([1, 1, 2, 3]))
    inputs, outputs = (int(n) for n in rng.integers(1, 4, 2))
    kernel, stride, dilation = (tuple(map(int, rng.integers(1, 4, rank))) for _ in range(3))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    spatial = [int(n) for n in rng.integers(2, 6, rank)]
    sides = [
        int(rng.integers(0, min(3, (n - 1) * s + r - 1) // 2 + 1))
        for n, s, r in zip(spatial, stride, reach, strict=True)
    ]
    extra = tuple(int(rng.integers(0, max(s, d))) for s, d in zip(stride, dilation, strict=True))
    x = rng.standard_normal((int(rng.integers(1, 3)), inputs * groups, *spatial)).astype(np.float32)
    w = rng.standard_normal((inputs * groups, outputs, *kernel)).astype(np.float32)
    b = rng.standard_normal(outputs * groups).astype(np.float32)
    return ConvTranspose(stride, (*sides, *sides), dilation, groups, extra), (x, w, b)


def torch_result(op: ConvTranspose, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    rank = len(op.stride)
    tensors = (torch.from_numpy(a) for a in (x, w, b))
    return _TORCH[rank](*tensors, op.stride, op.pad[:rank], op.output_pad, op.groups, op.dilation).numpy()


@pytest.mark.parametrize("seed", range(40))
def test_equals_pytorch(seed: int) -> None:
    op, arrays = random_case(np.random.default_rng(seed))
    wanted = torch_result(op, *arrays)
    got = op.reference(*arrays)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(100, 106))
def test_compiled_equals_pytorch(seed: int) -> None:
    op, arrays = random_case(np.random.default_rng(seed))
    types = [TensorType(a.shape) for a in arrays]
    np.testing.assert_allclose(run_compute(op, types, arrays)[0], torch_result(op, *arrays), rtol=1e-4, atol=1e-5)


CASES = [
    {"pads": [1, 0, 2, 1], "strides": [2, 3], "output_padding": [1, 2]},
    {"dilations": [2, 1], "strides": [2, 2], "group": 2},
    {"auto_pad": "VALID", "strides": [2, 2]},
    {"auto_pad": "SAME_UPPER", "strides": [2, 1]},
    {"auto_pad": "SAME_LOWER", "strides": [2, 1]},
    {"output_shape": [8, 9], "strides": [2, 2]},
    {"output_shape": [8, 9], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"output_shape": [8, 9], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    {"output_shape": [11, 12], "strides": [3, 2]},
    {"output_shape": [8, 9], "strides": [2, 2], "output_padding": [1, 1]},
]


@pytest.mark.parametrize("attributes", CASES, ids=str)
@pytest.mark.parametrize("opset", [7, 22])
def test_reader_as_onnxruntime(opset: int, attributes: dict[str, object]) -> None:
    rng = np.random.default_rng(3)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((2, 4, 4, 5), (4, 3, 3, 3)))
    b = rng.standard_normal(3 * int(str(attributes.get("group", 1)))).astype(np.float32)
    assert_agrees("ConvTranspose", [x, w, b], opset=opset, **attributes)


X, W = TensorType((1, 4, 5, 5)), TensorType((4, 3, 3, 3))
ONES, NONE = (1, 1), (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("op", "types", "message"),
    [
        (ConvTranspose(ONES, NONE, ONES), (TensorType((1, 5, 5, 5)), W), "weight takes 4 channels but x .* has 5"),
        (ConvTranspose(ONES, NONE, ONES, 3), (X, W), "groups=3 must divide the 4 input channels"),
        (ConvTranspose((0, 1), NONE, ONES), (X, W), "stride .* below 1"),
        (ConvTranspose(ONES, (4, 0, 4, 0), ONES), (X, W), "padding 4.4 leaves nothing"),
        (ConvTranspose(ONES, NONE, ONES, 1, (1,)), (X, W), "output_pad .* needs 2 entries"),
        (ConvTranspose(ONES, NONE, ONES, 1, (0, -1)), (X, W), "output_pad .* none below 0"),
        (ConvTranspose(ONES, NONE, ONES, 2), (X, W, TensorType((3,))), "bias must be a vector of 6"),
        (ConvTranspose(ONES, NONE, ONES), (TensorType((1, 4, 0, 5)), W), "spatial axis 0 is empty"),
    ],
)
def test_refuses(op: ConvTranspose, types: tuple[TensorType, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        infer_types(op, types)


@pytest.mark.parametrize(
    ("attributes", "error", "message"),
    [
        ({"output_shape": [30, 30]}, UnsupportedError, "the windows cover 6 only"),
        ({"auto_pad": "SAME_UPPER", "strides": [4, 4]}, UnsupportedError, "the windows cover 15 only"),
        ({"auto_pad": "AROUND"}, ModelError, "auto_pad 'AROUND'"),
        ({"kernel_shape": [2, 2]}, ModelError, "contradicts the weight"),
        ({"pads": [9, 9, 9, 9]}, ModelError, "leaves nothing"),
    ],
)
def test_reader_refuses(attributes: dict[str, object], error: type[CnncError], message: str) -> None:
    x, w = np.zeros((1, 2, 4, 4), np.float32), np.zeros((2, 3, 3, 3), np.float32)
    with pytest.raises(error, match=message):
        imported(one_node("ConvTranspose", [x, w], constants=[1], **attributes))
