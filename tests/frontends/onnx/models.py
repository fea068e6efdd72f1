"""Small ONNX models for the front end's tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17


def value(name: str, shape: Sequence[int | str] | None = (1, 3, 8, 8), dtype: int = TensorProto.FLOAT) -> Any:
    """Declare a tensor."""
    return helper.make_tensor_value_info(name, dtype, shape)


def weight(name: str, array: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    """Store a tensor."""
    return numpy_helper.from_array(np.asarray(array, dtype), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Any] | None = None,
    outputs: Sequence[Any] | None = None,
    weights: Sequence[onnx.TensorProto] = (),
    *,
    opset: int = OPSET,
    functions: Sequence[onnx.FunctionProto] = (),
    imports: Sequence[str] = (),
    value_info: Sequence[Any] = (),
) -> onnx.ModelProto:
    """Make a model; by default from `x`, f32[1,3,8,8], to `y` of any shape.  Nothing is checked."""
    graph = helper.make_graph(
        list(nodes),
        "net",
        [value("x")] if inputs is None else list(inputs),
        [value("y", None)] if outputs is None else list(outputs),
        list(weights),
        value_info=list(value_info),
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in imports)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=9)


def node(op_type: str, inputs: str, outputs: str = "y", name: str | None = None, **attributes: Any) -> onnx.NodeProto:
    """Make a node; inputs and outputs are separated by spaces, `-` is one left out."""
    read = ["" if word == "-" else word for word in inputs.split()]
    made = ["" if word == "-" else word for word in outputs.split()]
    return helper.make_node(op_type, read, made, name=op_type.lower() if name is None else name, **attributes)


def relu(**attributes: Any) -> onnx.ModelProto:
    """The smallest sound model."""
    return model([node("Relu", "x", **attributes)])


def residual_net(seed: int = 0) -> onnx.ModelProto:
    """A real network in small: convolutions, batch norm, a residual sum, pooling, shape arithmetic, a classifier."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) * 0.3

    nodes = [
        node("Conv", "x w1 b1", "c1", "conv1", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", "c1 gamma beta mean var", "n1", "bn1", epsilon=1e-5),
        node("Relu", "n1", "r1", "relu1"),
        node("Conv", "r1 w2", "c2", "conv2", kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=2),
        node("Add", "c2 r1", "s", "add"),
        node("MaxPool", "s", "p", "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", "p", "a", "gap"),
        node("Shape", "a", "shape", "shape"),
        node("Gather", "shape zero", "batch", "batch"),
        node("Unsqueeze", "batch axis0", "batch1", "unsqueeze"),
        node("Concat", "batch1 minus_one", "target", "target", axis=0),
        node("Reshape", "a target", "flat", "reshape"),
        node("Gemm", "flat w3 b3", "logits", "fc", transB=1),
        node("Softmax", "logits", "y", "softmax", axis=1),
    ]
    weights = [
        weight("w1", draw(8, 3, 3, 3)),
        weight("b1", draw(8)),
        weight("gamma", 1 + draw(8)),
        weight("beta", draw(8)),
        weight("mean", draw(8)),
        weight("var", np.abs(draw(8)) + 0.5),
        weight("w2", draw(8, 4, 3, 3)),
        weight("w3", draw(5, 8)),
        weight("b3", draw(5)),
        weight("zero", 0, np.int64),
        weight("axis0", [0], np.int64),
        weight("minus_one", [-1], np.int64),
    ]
    return model(nodes, [value("x", (2, 3, 16, 16))], [value("y", (2, 5))], weights)
