"""ONNX operators that do nothing when a network is only run."""

from __future__ import annotations

import numpy as np

from cnnc.ir.graph import Value
from cnnc.ir.op import ForeignNode, onnx
from cnnc.ops.source import constant


@onnx("Identity")
def _identity(node: ForeignNode, x: Value) -> Value:
    return x


@onnx("Dropout")
def _dropout(
    node: ForeignNode, x: Value, ratio: Value | None = None, training: Value | None = None
) -> Value | tuple[Value, Value]:
    """Drop nothing: the mask, where it is asked for, is all true."""
    if _single(node, training, "training_mode", 0) and _single(node, ratio, "ratio", 0.5):
        raise node.unsupported("drops elements at random (training_mode); only inference is compiled")
    node.attr("ratio")
    node.attr("seed")
    if node.outputs < 2:
        return x
    if node.opset < 10:
        raise node.unsupported("the mask is undefined at inference before opset 10")
    return x, constant(np.ones(x.type.static_shape, np.bool_))


def _single(node: ForeignNode, value: Value | None, name: str, default: float) -> float:
    """Read a constant input of one element."""
    array = node.const(value)
    if array is None:
        return default
    if array.size != 1:
        raise node.invalid(f"{name} must be a single number, not {array.size} of them")
    return float(array.reshape(()))
