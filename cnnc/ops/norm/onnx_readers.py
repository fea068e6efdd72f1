"""The ONNX normalisations: readers that make the operators of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.op import ForeignNode, onnx
from cnnc.ir.types import DType
from cnnc.ops.axes import normal_axes, normal_axis
from cnnc.ops.binary import Add, Div, Mul, Sub
from cnnc.ops.cast import Cast
from cnnc.ops.norm.batch import BatchNorm
from cnnc.ops.norm.layer import LayerNorm, RmsNorm
from cnnc.ops.norm.lp import LpNormalize
from cnnc.ops.norm.spatial import GroupNorm, InstanceNorm
from cnnc.ops.reduce import ReduceMean
from cnnc.ops.reshape import Expand, Reshape
from cnnc.ops.source import constant
from cnnc.ops.unary import Reciprocal, Sqrt

_STASH_TYPES = {1: DType.F32, 10: DType.F16, 11: DType.F64, 16: DType.BF16}
"""ONNX's numbers of the types that statistics are calculated in."""


def _cast(value: Value, dtype: DType) -> Value:
    return value if value.dtype is dtype else call(Cast(dtype), value)


def _plus(x: Value, number: float) -> Value:
    return call(Add(), x, constant(np.asarray(number), x.dtype))


def _times(x: Value, number: float) -> Value:
    return call(Mul(), x, constant(np.asarray(number), x.dtype))


def _centred(x: Value, axes: Sequence[int]) -> tuple[Value, Value, Value]:
    """Give mean, x - mean and the population variance over some axes, which stay as 1."""
    reduction = ReduceMean(tuple(axes), keepdims=True)
    mean = call(reduction, x)
    distance = call(Sub(), x, mean)
    return mean, distance, call(reduction, call(Mul(), distance, distance))


@onnx("BatchNormalization")
def _batch_normalization(
    node: ForeignNode, x: Value, gamma: Value, beta: Value, mean: Value, var: Value
) -> Value | tuple[Value, ...]:
    """Read batch norm; in training mode (opset 14) the statistics are the batch's own."""
    momentum = node.attr("momentum", 0.9)
    if node.attr("spatial", 1) != 1:
        raise node.unsupported("spatial=0, statistics for each element of an image")
    if len(x.shape) < 2:
        raise node.unsupported(f"batch norm of {x.type}, which has no channel axis")
    op = BatchNorm(node.attr("epsilon", 1e-5))
    if not node.attr("training_mode", 0):
        if node.outputs > 1:
            raise node.unsupported("more outputs than the first, which exist in training only")
        return call(op, x, *(_cast(v, x.dtype) for v in (gamma, beta, mean, var)))
    # The statistics are calculated in their own type, which may be wider than x's.
    axes = tuple(axis for axis in range(len(x.shape)) if axis != 1)
    batch_mean, _, batch_var = _centred(_cast(x, mean.dtype), axes)
    statistics = [call(Reshape((x.shape[1],)), value) for value in (batch_mean, batch_var)]
    y = call(op, x, *(_cast(v, x.dtype) for v in (gamma, beta, *statistics)))
    running = [
        call(Add(), _times(old, momentum), _times(_cast(new, old.dtype), 1 - momentum))
        for old, new in zip((mean, var), statistics, strict=True)
    ]
    return (y, *running)[: node.outputs]


@onnx("LayerNormalization")
def _layer_normalization(
    node: ForeignNode, x: Value, gamma: Value, beta: Value | None = None
) -> Value | tuple[Value, ...]:
    """Read layer norm; mean and inverse deviation, if asked for, are calculated beside it."""
    axis = normal_axis("LayerNormalization", node.attr("axis", -1), len(x.shape))
    epsilon = node.attr("epsilon", 1e-5)
    stash = _stash_type(node, x)
    whole = all(v is None or v.shape == x.shape[axis:] for v in (gamma, beta))
    if node.outputs == 1 and whole:
        return call(LayerNorm(axis, epsilon), x, *(v for v in (gamma, beta) if v is not None))
    mean, distance, var = _centred(_cast(x, stash), range(axis, len(x.shape)))
    inverse = call(Reciprocal(), call(Sqrt(), _plus(var, epsilon)))
    y = _cast(call(Mul(), distance, inverse), x.dtype)
    y = call(Mul(), y, gamma)
    y = y if beta is None else call(Add(), y, beta)
    if y.shape != x.shape:
        raise node.invalid(f"scale : {gamma.type} or bias do not broadcast to X : {x.type}")
    return (y, mean, inverse)[: node.outputs]


def _stash_type(node: ForeignNode, x: Value) -> DType:
    """Give the type statistics are calculated in; only f32, or x's own, is compiled."""
    number = node.attr("stash_type", 1)
    stash = _STASH_TYPES.get(number)
    if stash is None:
        raise node.invalid(f"stash_type {number} is no float type")
    if x.dtype is DType.F64:
        return DType.F64
    if stash is not DType.F32:
        raise node.unsupported(f"statistics in {stash} (stash_type {number}); they are calculated in f32")
    return stash


@onnx("RMSNormalization")
def _rms_normalization(node: ForeignNode, x: Value, gamma: Value) -> Value:
    axis = normal_axis("RMSNormalization", node.attr("axis", -1), len(x.shape))
    _stash_type(node, x)
    wanted = x.shape[axis:]
    # A scale of other axes, or of another type, is multiplied afterwards.
    plain = gamma.shape == wanted and gamma.dtype is x.dtype
    ones = gamma if plain else call(Expand(wanted), constant(np.asarray(1), x.dtype))
    y = call(RmsNorm(axis, node.attr("epsilon", 1e-5)), x, ones)
    if plain:
        return y
    y = call(Mul(), _cast(y, gamma.dtype), gamma)
    if y.shape != x.shape:
        raise node.invalid(f"scale : {gamma.type} does not broadcast to X : {x.type}")
    return y


@onnx("InstanceNormalization")
def _instance_normalization(node: ForeignNode, x: Value, gamma: Value, beta: Value) -> Value:
    return call(InstanceNorm(node.attr("epsilon", 1e-5)), x, gamma, beta)


@onnx("GroupNormalization")
def _group_normalization(node: ForeignNode, x: Value, gamma: Value, beta: Value) -> Value:
    """Read group norm; before opset 21 scale and bias have one entry for each *group*."""
    groups = node.attr("num_groups", 0)
    if len(x.shape) < 2:
        raise node.invalid(f"group norm needs axes N and C, not {x.type}")
    channels = x.shape[1]
    if not isinstance(channels, int):
        raise node.unsupported(f"group norm of {channels} channels, known only at run time")
    if groups < 1 or channels % groups:
        raise node.invalid(f"num_groups {groups} must divide the {channels} channels of X : {x.type}")
    _stash_type(node, x)
    if node.opset < 21:
        gamma, beta = (_each_channel(node, v, groups, channels) for v in (gamma, beta))
    return call(GroupNorm(groups, node.attr("epsilon", 1e-5)), x, gamma, beta)


def _each_channel(node: ForeignNode, vector: Value, groups: int, channels: int) -> Value:
    """Repeat an entry for each group so that there is one for each channel."""
    if vector.shape != (groups,):
        raise node.invalid(
            f"scale and bias have an entry for each of {groups} groups before opset 21, not {vector.type}"
        )
    column = call(Reshape((groups, 1)), vector)
    return call(Reshape((channels,)), call(Expand((groups, channels // groups)), column))


@onnx("LpNormalization")
def _lp_normalization(node: ForeignNode, x: Value) -> Value:
    p = node.attr("p", 2)
    if p not in (1, 2):
        raise node.invalid(f"p={p} is neither 1 nor 2")
    return call(LpNormalize(normal_axis("LpNormalization", node.attr("axis", -1), len(x.shape)), p), x)


@onnx("MeanVarianceNormalization")
def _mean_variance_normalization(node: ForeignNode, x: Value) -> Value:
    """Read (x - mean) / (deviation + 1e-9), as ONNX defines it."""
    axes = normal_axes("MeanVarianceNormalization", node.attr("axes", (0, 2, 3)), len(x.shape))
    _, distance, var = _centred(x, axes)
    return call(Div(), distance, _plus(call(Sqrt(), var), 1e-9))
