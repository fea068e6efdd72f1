"""Pools: numbers against PyTorch and ONNX Runtime, and everything they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.errors import CnncError, ModelError, ShapeError, UnsupportedError
from cnnc.ir.build import infer_types
from cnnc.ir.layout import Layout
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.pool import AveragePool, MaxPool, MinPool
from tests.ops.onnx_nodes import assert_agrees, imported, one_node

torch = pytest.importorskip("torch")


def random_window(rng: np.random.Generator, rank: int, dilated: bool) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Draw windows as PyTorch takes them (pads equal and at most half the kernel) and an input shape."""
    kernel, stride = (tuple(map(int, rng.integers(1, 5, rank))) for _ in range(2))
    dilation = tuple(map(int, rng.integers(1, 4, rank))) if dilated else (1,) * rank
    side = tuple(int(rng.integers(0, k // 2 + 1)) for k in kernel)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    spatial = [int(r + rng.integers(0, 7)) for r in reach]
    fields = {
        "kernel": kernel,
        "stride": stride,
        "pad": side + side,
        "dilation": dilation,
        "ceil_mode": bool(rng.integers(2)),
    }
    return fields, (int(rng.integers(1, 3)), int(rng.integers(1, 4)), *spatial)


@pytest.mark.parametrize("seed", range(30))
def test_max_pool_equals_pytorch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fields, shape = random_window(rng, rank := int(rng.integers(1, 4)), dilated=True)
    x = rng.integers(-9, 9, shape).astype(np.float32)
    pool = {1: torch.nn.functional.max_pool1d, 2: torch.nn.functional.max_pool2d, 3: torch.nn.functional.max_pool3d}[
        rank
    ]
    wanted, where = pool(
        torch.from_numpy(x), fields["kernel"], fields["stride"], fields["pad"][:rank], fields["dilation"],
        ceil_mode=fields["ceil_mode"], return_indices=True,
    )  # fmt: skip
    y, indices = MaxPool(**fields, with_indices=True).reference(x)
    np.testing.assert_array_equal(y, wanted.numpy())
    # Integers make many ties: both must name the first.  PyTorch counts inside an image.
    image = np.prod(shape[2:])
    np.testing.assert_array_equal(indices % image, where.numpy())
    np.testing.assert_array_equal(
        indices // image, np.arange(shape[0] * shape[1]).reshape(*shape[:2], *(1,) * rank) + 0 * indices
    )
    np.testing.assert_array_equal(MinPool(**fields).reference(-x), -wanted.numpy())


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("include", [False, True])
def test_average_pool_equals_pytorch(seed: int, include: bool) -> None:
    rng = np.random.default_rng(seed)
    fields, shape = random_window(rng, rank := int(rng.integers(1, 4)), dilated=False)
    x = rng.standard_normal(shape).astype(np.float32)
    pool = {1: torch.nn.functional.avg_pool1d, 2: torch.nn.functional.avg_pool2d, 3: torch.nn.functional.avg_pool3d}[
        rank
    ]
    wanted = pool(
        torch.from_numpy(x), fields["kernel"], fields["stride"], fields["pad"][:rank], fields["ceil_mode"], include
    )
    got = AveragePool(**fields, count_include_pad=include).reference(x)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-6)


ATTRIBUTES = [
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [0, 1, 2, 0], "ceil_mode": 1},
    {"kernel_shape": [2, 3], "strides": [1, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [2, 4], "strides": [2, 3], "auto_pad": "SAME_LOWER"},
    {"kernel_shape": [2, 3], "strides": [2, 2], "auto_pad": "VALID", "ceil_mode": 1},
    {"kernel_shape": [2, 2], "dilations": [2, 3]},
    {"kernel_shape": [3, 3]},
]


@pytest.mark.parametrize("attributes", ATTRIBUTES, ids=str)
@pytest.mark.parametrize(
    ("op_type", "more"),
    [
        ("MaxPool", {"outputs": 1}),
        ("MaxPool", {"outputs": 2}),
        ("MaxPool", {"outputs": 2, "storage_order": 1}),
        ("AveragePool", {"count_include_pad": 0}),
        ("AveragePool", {"count_include_pad": 1}),
        ("LpPool", {"p": 1}),
        ("LpPool", {"p": 3}),
    ],
)
def test_readers_as_onnxruntime(op_type: str, more: dict[str, int], attributes: dict[str, Any]) -> None:
    x = np.random.default_rng(5).standard_normal((2, 3, 8, 9)).astype(np.float32)
    assert_agrees(op_type, [x], opset=19, **attributes, **more)


@pytest.mark.parametrize("opset", [7, 8, 10, 11, 12, 22])
def test_every_opset_of_max_pool(opset: int) -> None:
    x = np.random.default_rng(opset).standard_normal((1, 2, 7, 7)).astype(np.float32)
    assert_agrees("MaxPool", [x], opset=opset, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    assert_agrees("AveragePool", [x], opset=opset, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 0])


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 4, 2)])
@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
def test_global_pools_as_onnxruntime(op_type: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    assert_agrees(op_type, [x])


@pytest.mark.parametrize("p", [1, 2, 3])
def test_global_norm_as_onnxruntime(p: int) -> None:
    x = np.random.default_rng(p).standard_normal((2, 3, 4, 5)).astype(np.float32)
    assert_agrees("GlobalLpPool", [x], p=p)


def test_nan_is_the_maximum() -> None:
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    x[0, 0, 1, 0] = np.nan
    y, indices = MaxPool((2, 2), (2, 2), (0, 0, 0, 0), (1, 1), with_indices=True).reference(x)
    np.testing.assert_array_equal(y, [[[[np.nan, 7], [13, 15]]]])
    np.testing.assert_array_equal(indices, [[[[4, 7], [13, 15]]]])


def test_padding_never_wins() -> None:
    x = np.full((1, 1, 2, 2), -5, np.float32)
    fields = {"kernel": (2, 2), "stride": (1, 1), "pad": (1, 1, 1, 1), "dilation": (1, 1)}
    assert (MaxPool(**fields).reference(x) == -5).all()
    assert (MinPool(**fields).reference(-x) == 5).all()
    assert (AveragePool(**fields).reference(x) == -5).all()


@pytest.mark.parametrize(
    ("fields", "x", "message"),
    [
        ({"kernel": (0, 2)}, TensorType((1, 1, 4, 4)), "kernel .* has an entry below 1"),
        ({"stride": (0, 1)}, TensorType((1, 1, 4, 4)), "stride .* has an entry below 1"),
        ({"dilation": (1, 0)}, TensorType((1, 1, 4, 4)), "dilation .* has an entry below 1"),
        ({"pad": (2, 0, 0, 0)}, TensorType((1, 1, 4, 4)), "padding 2.0 of spatial axis 0 must be below the window, 2"),
        ({"pad": (1, 0, 0, 0), "dilation": (3, 1)}, TensorType((1, 1, 2, 4)), r"window of 4 .* is larger|steps over"),
        ({"pad": (2, 0, 2, 0), "dilation": (3, 1)}, TensorType((1, 1, 2, 4)), "dilation 3 steps over the whole"),
        ({}, TensorType((1, 1, 1, 4)), "larger than spatial axis 0 of 1"),
        ({}, TensorType((1, 1, 4)), "needs an input of rank 4"),
        ({"ceil_mode": True}, TensorType((1, 1, 4, Dim.symbol("w", 9))), "ceil_mode with stride 2 needs a fixed size"),
    ],
)
def test_refuses(fields: dict[str, Any], x: TensorType, message: str) -> None:
    defaults = {"kernel": (2, 2), "stride": (2, 2), "pad": (0, 0, 0, 0), "dilation": (1, 1)}
    for make in (MaxPool, MinPool, AveragePool):
        with pytest.raises(ShapeError, match=message):
            infer_types(make(**{**defaults, **fields}), (x,))


def test_refuses_dtypes_and_layouts() -> None:
    fields = ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1))
    with pytest.raises(ShapeError, match="must be of a float type"):
        infer_types(AveragePool(*fields), (TensorType((1, 1, 4, 4), DType.I32),))
    with pytest.raises(ShapeError, match="takes numbers"):
        infer_types(MaxPool(*fields), (TensorType((1, 1, 4, 4), DType.BOOL),))
    with pytest.raises(ShapeError, match="is in layout NHWC"):
        infer_types(MaxPool(*fields), (TensorType((1, 1, 4, 4), layout=Layout("NHWC")),))


@pytest.mark.parametrize(
    ("shape", "attributes", "error"),
    [
        ((1, 1, 4, 4), {"kernel_shape": [2]}, ModelError),
        ((1, 1, 4, 4), {"kernel_shape": [2, 2], "pads": [2, 0, 0, 0]}, ModelError),
        ((1, 1, 4, 4), {"kernel_shape": [2, 2], "strides": [1]}, ModelError),
        ((1, 1, 2, 2, 2, 2), {"kernel_shape": [1, 1, 1, 1]}, UnsupportedError),
    ],
)
def test_reader_refuses(shape: tuple[int, ...], attributes: dict[str, Any], error: type[CnncError]) -> None:
    with pytest.raises(error, match="the_node"):
        imported(one_node("MaxPool", [np.zeros(shape, np.float32)], **attributes))
