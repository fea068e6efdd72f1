"""Convolution: numbers against PyTorch and ONNX Runtime, and everything it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import CnncError, ModelError, ShapeError, UnsupportedError
from cnnc.ir.build import infer_types
from cnnc.ir.layout import Layout
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.conv import Conv
from tests.ops.kernels import run_compute
from tests.ops.onnx_nodes import assert_agrees, imported, one_node

torch = pytest.importorskip("torch")

_TORCH = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


def random_conv(rng: np.random.Generator) -> tuple[Conv, tuple[np.ndarray, ...]]:
    """Draw a valid convolution of any rank, with strides, asymmetric pads, dilation and groups."""
    rank = int(rng.integers(1, 4))
    groups = int(rng.choice([1, 1, 2, 3]))
    inputs, outputs = (int(n) for n in rng.integers(1, 4, 2))
    kernel, stride, dilation = (tuple(map(int, rng.integers(1, 4, rank))) for _ in range(3))
    pad = tuple(map(int, rng.integers(0, 4, 2 * rank)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    spatial = [max(int(rng.integers(1, 8)), r - pad[i] - pad[i + rank]) for i, r in enumerate(reach)]
    x = rng.standard_normal((int(rng.integers(1, 3)), inputs * groups, *spatial)).astype(np.float32)
    w = rng.standard_normal((outputs * groups, inputs, *kernel)).astype(np.float32)
    b = rng.standard_normal(outputs * groups).astype(np.float32)
    return Conv(stride, pad, dilation, groups), (x, w, b)


def torch_conv(op: Conv, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    rank = len(op.stride)
    sides = [(op.pad[i], op.pad[i + rank]) for i in reversed(range(rank))]
    padded = torch.nn.functional.pad(torch.from_numpy(x), [p for pair in sides for p in pair])
    weights, bias = torch.from_numpy(w), torch.from_numpy(b)
    return _TORCH[rank](padded, weights, bias, op.stride, 0, op.dilation, op.groups).numpy()


@pytest.mark.parametrize("seed", range(40))
def test_equals_pytorch(seed: int) -> None:
    op, arrays = random_conv(np.random.default_rng(seed))
    wanted = torch_conv(op, *arrays)
    got = op.reference(*arrays)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(100, 106))
def test_compiled_equals_pytorch(seed: int) -> None:
    op, arrays = random_conv(np.random.default_rng(seed))
    types = [TensorType(a.shape) for a in arrays]
    np.testing.assert_allclose(run_compute(op, types, arrays)[0], torch_conv(op, *arrays), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("auto_pad", ["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 1)])
def test_auto_pad_as_onnxruntime(auto_pad: str, stride: tuple[int, int], kernel: tuple[int, int]) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((1, 2, 7, 8)).astype(np.float32)
    w = rng.standard_normal((3, 2, *kernel)).astype(np.float32)
    assert_agrees("Conv", [x, w], auto_pad=auto_pad, strides=stride)


@pytest.mark.parametrize("opset", [7, 11, 22])
def test_reader_takes_all_attributes(opset: int) -> None:
    rng = np.random.default_rng(opset)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 4, 9), (6, 2, 3), (6,)))
    attributes = {"group": 2, "pads": [1, 2], "strides": [2], "dilations": [2], "kernel_shape": [3]}
    assert_agrees("Conv", [x, w, b], opset=opset, **attributes)


def test_run_time_batch_stays() -> None:
    batch = Dim.symbol("n", 8)
    op = Conv((2, 2), (1, 1, 1, 1), (1, 1))
    assert op.infer(TensorType((batch, 3, 8, 8)), TensorType((5, 3, 3, 3))).shape == (batch, 5, 4, 4)


X = TensorType((1, 128, 56, 56))
W = TensorType((64, 64, 3, 3))
ONES, NONE = (1, 1), (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("op", "types", "message"),
    [
        (
            Conv(ONES, NONE, ONES),
            (X, W),
            r"conv: weight takes 64 channels but x : f32\[1,128,56,56\] has 128 \(groups=1\)",
        ),
        (Conv(ONES, NONE, ONES, 0), (X, W), "groups=0 must divide the 64 output channels"),
        (Conv(ONES, NONE, ONES, -2), (X, W), "groups=-2 must divide"),
        (Conv(ONES, NONE, ONES, 3), (X, W), "groups=3 must divide"),
        (Conv((0, 1), NONE, ONES, 2), (X, W), r"stride \(0, 1\) has an entry below 1"),
        (Conv((-1, 1), NONE, ONES, 2), (X, W), "stride .* has an entry below 1"),
        (Conv(ONES, NONE, (0, 1), 2), (X, W), "dilation .* has an entry below 1"),
        (Conv(ONES, (0, -1, 0, 0), ONES, 2), (X, W), "pad .* has an entry below 0"),
        (Conv(ONES, (0, 0), ONES, 2), (X, W), r"pad \(0, 0\) needs 4 entries"),
        (Conv((1,), (0, 0), (1,), 2), (X, W), "needs an input of rank 3"),
        (Conv(ONES, NONE, (30, 1), 2), (X, W), "window of 61 .* larger than spatial axis 0 of 56 padded by 0"),
        (Conv(ONES, NONE, ONES, 2), (X, TensorType((64, 64, 0, 3))), "kernel .* has an entry below 1"),
        (Conv(ONES, NONE, ONES, 2), (X, TensorType((64, 64, 3))), "of the rank of x"),
        (Conv(ONES, NONE, ONES, 2), (X, W.with_dtype(DType.F64)), "weight is f64 but x is f32"),
        (Conv(ONES, NONE, ONES, 2), (X.with_dtype(DType.I32), W), "must be of a float type"),
        (Conv(ONES, NONE, ONES, 2), (X, W, TensorType((63,))), "bias must be a vector of 64"),
        (Conv(ONES, NONE, ONES), (X,), "another number of inputs"),
    ],
)
def test_refuses(op: Conv, types: tuple[TensorType, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        infer_types(op, types)


@pytest.mark.parametrize(
    ("groups", "x", "w"),
    [
        (1, Layout("NCHW8c"), None),
        (1, Layout("NCHW8c"), Layout("OIHW4i8o")),
        (1, Layout("NHWC"), None),
        (2, Layout("NCHW8c"), Layout("OIHW8i16o")),
        (8, Layout("NCHW4c"), Layout("OIHW8o")),
    ],
)
def test_refuses_layouts(groups: int, x: Layout, w: Layout | None) -> None:
    types = (TensorType((1, 8, 5, 5), layout=x), TensorType((8, 8 // groups, 3, 3), layout=w))
    with pytest.raises(ShapeError, match=r"layout|block|plain"):
        infer_types(Conv(ONES, NONE, ONES, groups), types)


def test_blocked_layouts() -> None:
    types = (TensorType((1, 8, 5, 5), layout=Layout("NCHW8c")), TensorType((12, 8, 3, 3), layout=Layout("OIHW8i4o")))
    assert infer_types(Conv(ONES, NONE, ONES), types)[0] == TensorType((1, 12, 3, 3), layout=Layout("NCHW4c"))


@pytest.mark.parametrize(
    ("attributes", "error"),
    [
        ({"strides": [0, 1]}, ModelError),
        ({"dilations": [1, 0]}, ModelError),
        ({"pads": [1, 1]}, ModelError),
        ({"pads": [-1, 0, 0, 0]}, ModelError),
        ({"pads": [1, 1, 1, 1], "auto_pad": "SAME_UPPER", "strides": [2, 2]}, ModelError),
        ({"kernel_shape": [5, 5]}, ModelError),
        ({"auto_pad": "SOMEHOW"}, ModelError),
        ({"auto_pad": "SAME_LOWER", "strides": [0, 0]}, ModelError),
        ({"auto_pad": "SAME_UPPER", "strides": [8, 8]}, UnsupportedError),
        ({"group": 0}, ModelError),
        ({"dilations": [4, 4]}, ModelError),
    ],
)
def test_reader_refuses(attributes: dict[str, object], error: type[CnncError]) -> None:
    x, w = np.zeros((1, 2, 8, 7), np.float32), np.zeros((3, 2, 3, 3), np.float32)
    with pytest.raises(error, match="'the_node'"):
        imported(one_node("Conv", [x, w], constants=[1], **attributes))


def test_four_spatial_axes_are_unsupported() -> None:
    x, w = np.zeros((1, 1, 3, 3, 3, 3), np.float32), np.zeros((1, 1, 1, 1, 1, 1), np.float32)
    with pytest.raises(UnsupportedError, match="one to three spatial axes"):
        imported(one_node("Conv", [x, w]))


def test_flops() -> None:
    op = Conv((2, 2), (3, 3, 3, 3), ONES)
    types = (TensorType((1, 3, 224, 224)), TensorType((64, 3, 7, 7)), TensorType((64,)))
    assert op.flops(*types) == 64 * 112 * 112 * (2 * 3 * 49 + 1)
