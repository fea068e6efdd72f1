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
    training_mode = node.const(training)
    if training_mode is not None and training_mode.any() and (ratio is None or node.const(ratio) != 0):
        raise node.unsupported("drops elements at random (training_mode); only inference is compiled")
    node.attr("ratio")
    node.attr("seed")
    if node.outputs < 2:
        return x
    if node.opset < 10:
        raise node.unsupported("the mask is undefined at inference before opset 10")
    return x, constant(np.ones(x.type.static_shape, np.bool_))
