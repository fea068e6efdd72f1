"""Max unpooling: numbers against PyTorch and ONNX Runtime, its checks of indices, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import cnnc
from cnnc.errors import CnncError, ModelError, ShapeError, UnsupportedError
from cnnc.ir.build import call, infer_types
from cnnc.ir.graph import Graph
from cnnc.ir.types import DType, TensorType
from cnnc.module import Module
from cnnc.ops.pool import MaxPool
from cnnc.ops.source import graph_input
from cnnc.ops.unpool import ArgMaxPool, MaxUnpool, TapUnpool
from tests.ops.onnx_nodes import assert_agrees, imported, one_node, ours, theirs

torch = pytest.importorskip("torch")


def whole(indices: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Turn PyTorch's indices into an image into indices into the whole tensor."""
    images = np.arange(np.prod(indices.shape[:2])).reshape(*indices.shape[:2], *(1,) * len(size))
    return indices + images * int(np.prod(size))


@pytest.mark.parametrize("seed", range(12))
def test_equals_pytorch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernel, stride = (tuple(map(int, rng.integers(1, 4, 2))) for _ in range(2))
    size = tuple(int(k + rng.integers(0, 8)) for k in kernel)
    # Ties are all over; PyTorch and we must name the first, or values would land elsewhere.
    x = torch.from_numpy(rng.integers(-3, 3, (2, 3, *size)).astype(np.float32))
    maxima, indices = torch.nn.functional.max_pool2d(x, kernel, stride, return_indices=True)
    wanted = np.zeros((2 * 3, size[0] * size[1]), np.float32)
    np.put_along_axis(wanted, indices.reshape(6, -1).numpy(), maxima.reshape(6, -1).numpy(), 1)
    op = MaxUnpool(size)
    y = op.reference(maxima.numpy(), whole(indices.numpy(), size))
    np.testing.assert_array_equal(y, wanted.reshape(2, 3, *size))
    if all(k <= s for k, s in zip(kernel, stride, strict=True)):
        taps = ArgMaxPool(kernel, stride).reference(x.numpy())
        np.testing.assert_array_equal(TapUnpool(kernel, stride, size).reference(maxima.numpy(), taps), y)


@pytest.mark.parametrize("size", [None, (1, 2, 4, 6)])
def test_as_onnxruntime(size: tuple[int, ...] | None) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, 2, 2, 3)).astype(np.float32)
    room = int(np.prod(size or (1, 2, 4, 6)))
    indices = rng.permutation(room)[: x.size].reshape(x.shape)
    shape = [] if size is None else [np.array(size, np.int64)]
    assert_agrees("MaxUnpool", [x, indices, *shape], opset=11, constants=(2,), kernel_shape=[2, 2], strides=[2, 2])


@pytest.mark.parametrize(("kernel", "stride"), [([2, 2], [2, 2]), ([3, 3], [2, 2])])
def test_odd_sizes_come_back_as_in_onnxruntime(kernel: list[int], stride: list[int]) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 5)).astype(np.float32)
    where = {"kernel_shape": kernel, "strides": stride}
    nodes = [
        helper.make_node("MaxPool", ["x"], ["v", "i"], name="pool", **where),
        helper.make_node("MaxUnpool", ["v", "i", "shape"], ["y"], name="unpool", **where),
    ]
    shape = numpy_helper.from_array(np.array(x.shape, np.int64), "shape")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in "xy"]
    graph = helper.make_graph(nodes, "odd", ends[:1], ends[1:], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (wanted,) = theirs(model, {"x": x})
    np.testing.assert_array_equal(ours(model, {"x": x})[0], wanted)
    np.testing.assert_array_equal(cnnc.compile(model).run({"x": x})["y"], wanted)


def unpool_model(shape: tuple[int, ...], size: tuple[int, ...], threads: int = 1) -> Module:
    v, indices = graph_input("v", shape), graph_input("i", shape, DType.I64)
    return cnnc.compile(Graph("net", (v, indices), (call(MaxUnpool(size), v, indices),)), threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_at_any_indices(threads: int) -> None:
    shape, size = (2, 5, 12, 13), (25, 24)
    rng = np.random.default_rng(threads)
    model = unpool_model(shape, size, threads)
    assert "unpool" in {kernel.algorithm for kernel in model.kernels}
    x = rng.standard_normal(shape).astype(np.float32)
    total = 10 * 25 * 24
    for low, high in ((0, total), (-total, total), (0, 50)):
        where = rng.integers(low, high, shape)
        (y,) = model.run({"v": x, "i": where}).values()
        np.testing.assert_array_equal(y, MaxUnpool(size).reference(x, where))


def test_an_index_outside_is_an_error() -> None:
    model = unpool_model((1, 2, 2, 2), (4, 4))
    x = np.ones((1, 2, 2, 2), np.float32)
    for bad in (32, -33, 2**40):
        where = np.arange(8).reshape(x.shape)
        where[0, 1, 0, 1] = bad
        with pytest.raises(CnncError):
            model.run({"v": x, "i": where})


def test_an_overlapping_pool_and_its_unpooling_compile() -> None:
    x = graph_input("x", (2, 3, 17, 15))
    maxima, indices = call(MaxPool((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), with_indices=True), x).node.values
    graph = Graph("net", (x,), (call(MaxUnpool((17, 15)), maxima, indices),))
    data = np.random.default_rng(0).integers(-4, 4, (2, 3, 17, 15)).astype(np.float32)
    pooled, where = MaxPool((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), with_indices=True).reference(data)
    (y,) = cnnc.compile(graph).run({"x": data}).values()
    np.testing.assert_array_equal(y, MaxUnpool((17, 15)).reference(pooled, where))


def test_refuses() -> None:
    x = TensorType((1, 2, 3, 3))
    with pytest.raises(ShapeError, match=r"max_unpool: indices .* must be"):
        infer_types(MaxUnpool((6, 6)), (x, x))
    with pytest.raises(ShapeError, match="max_unpool: size"):
        infer_types(MaxUnpool((6,)), (x, x.with_dtype(DType.I64)))
    with pytest.raises(ShapeError, match=r"arg_max_pool: windows .* overlap"):
        infer_types(ArgMaxPool((3, 3), (2, 2)), (x,))
    with pytest.raises(ShapeError, match=r"tap_unpool: the windows of x .* do not fit"):
        infer_types(TapUnpool((2, 2), (2, 2), (5, 6)), (x, x))


def test_refuses_onnx_nodes() -> None:
    x, where = np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 1, 2, 2), np.int64)
    with pytest.raises(ModelError, match="kernel_shape"):
        imported(one_node("MaxUnpool", [x, where], opset=11, kernel_shape=[2]))
    other, given = np.array([1, 2, 4, 4]), np.array([1, 1, 4, 4])
    with pytest.raises(ModelError, match="output_shape"):
        imported(one_node("MaxUnpool", [x, where, other], opset=11, constants=(2,), kernel_shape=[2, 2]))
    with pytest.raises(UnsupportedError):
        imported(one_node("MaxUnpool", [x, where, given], opset=11, kernel_shape=[2, 2]))
    with pytest.raises(UnsupportedError, match="not agreed on"):
        imported(one_node("MaxUnpool", [x, where, given], opset=11, constants=(2,), kernel_shape=[2, 2]))
