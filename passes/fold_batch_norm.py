"""Fold batch norm, and scales and shifts of channels, into the convolution or dense layer before it.

    batch_norm(conv(x, w, b)) -> conv(x, w * k, (b - mean) * k + beta),  k = gamma / sqrt(var + epsilon)
    conv(x, w, b) * k         -> conv(x, w * k, b * k)                   k one number a channel
    conv(x, w, b) + c         -> conv(x, w, b + c)                       c one number a channel
    batch_norm(x)             -> x * k + (beta - mean * k)               where nothing before it takes it

and the same for conv_transpose and dense, and across a layout transform.  The arithmetic is done in float64 and
rounded once.  A channel with a negative variance is NaN before and after; an infinite k would turn Inf into NaN, so
it is refused, as is anything that makes a weight overflow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.literal import Literal
from cnnc.ir.rewrite import miss, rewrite, sole_use
from cnnc.ir.types import DType
from cnnc.ops.binary import Add, Div, Mul, Sub
from cnnc.ops.conv import Conv
from cnnc.ops.conv_transpose import ConvTranspose
from cnnc.ops.dense import Dense
from cnnc.ops.layout_transform import LayoutTransform
from cnnc.ops.norm import BatchNorm
from cnnc.ops.source import Constant, constant
from cnnc.passes.constants import Array, array_of, constant_operand, per_channel
from cnnc.passes.registry import Pass
from cnnc.target import Target


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold what is one number for each output channel."""

    def run(self, graph: Graph, target: Target) -> Graph:
        """Apply the rules until none fires."""
        return rewrite(graph, (fold_batch_norm, fold_scale, fold_shift, split_batch_norm))


def fold_batch_norm(v: Value) -> Value | None:
    """batch_norm(conv(x, w, b)) -> conv(x, w * k, (b - mean) * k + beta)."""
    match v.node:
        case Node(BatchNorm(), (x, *_)):
            affine = _scale_and_shift(v)
            layer = _layer(x)
            if affine is None or layer is None or (isinstance(layer.op, Dense) and v.type.rank != 2):
                return None
            return _into(x, *affine)
    return None


def fold_scale(v: Value) -> Value | None:
    """conv(x, w, b) * k -> conv(x, w * k, b * k), and so for a division."""
    match v.node:
        case Node(Mul()):
            operands = constant_operand(v)
            k = None if operands is None else _of_channels(*operands, v)
            return None if operands is None or k is None else _into(operands[0], k, np.zeros_like(k))
        case Node(Div(), (x, c)):
            k = _of_channels(x, c, v)
            if k is None or not v.dtype.is_float:
                return None
            with np.errstate(divide="ignore"):
                return _into(x, 1 / k, np.zeros_like(k))
    return None


def fold_shift(v: Value) -> Value | None:
    """conv(x, w, b) + c -> conv(x, w, b + c), and so for both subtractions."""
    match v.node:
        case Node(Add()):
            operands = constant_operand(v)
            c = None if operands is None else _of_channels(*operands, v)
            return None if operands is None or c is None else _into(operands[0], np.ones_like(c), c)
        case Node(Sub(), (x, Value(Node(Constant())) as operand)):
            c = _of_channels(x, operand, v)
            return None if c is None else _into(x, np.ones_like(c), -c)
        case Node(Sub(), (Value(Node(Constant())) as operand, x)):
            c = _of_channels(x, operand, v)
            return None if c is None else _into(x, -np.ones_like(c), c)
    return None


def split_batch_norm(v: Value) -> Value | None:
    """batch_norm(x) -> x * k + (beta - mean * k).

    Not in half precision, where the product would be rounded before the sum.
    """
    match v.node:
        case Node(BatchNorm(), (x, *_)) if v.dtype in (DType.F32, DType.F64):
            affine = _scale_and_shift(v)
            if affine is None:
                return None
            k, shift = (part.astype(v.dtype.numpy) for part in affine)
            if not (np.isnan(k) | (np.isfinite(k) & np.isfinite(shift))).all():
                miss("the scale of a channel is infinite")
                return None
            shape = (1, -1, *(1,) * (v.type.rank - 2))
            factors = [_like(x, constant(part.reshape(shape))) for part in (k, shift)]
            return call(Add(), call(Mul(), x, factors[0]), factors[1])
    return None


def _like(x: Value, c: Value) -> Value:
    """Give a constant in the layout of the value it meets."""
    return call(replace(c.op, layout=x.type.layout)) if isinstance(c.op, Constant) else c


def _scale_and_shift(v: Value) -> tuple[Array, Array] | None:
    """Give batch norm as x * k + shift, in float64."""
    arrays = [array_of(operand) for operand in v.inputs[1:]]
    if any(a is None for a in arrays) or not isinstance(v.op, BatchNorm):
        miss("gamma, beta, mean and var are not all constants")
        return None
    gamma, beta, mean, var = (np.asarray(a, np.float64) for a in arrays)
    with np.errstate(all="ignore"):
        k = gamma / np.sqrt(var + v.op.epsilon)
        return k, beta - mean * k


def _of_channels(x: Value, c: Value, v: Value) -> Array | None:
    """Give a constant operand as one number for each channel of x, if it is that and leaves x its shape."""
    if x.shape != v.shape:
        return None
    layer = _layer(x)
    return None if layer is None else per_channel(c, x.shape, -1 if isinstance(layer.op, Dense) else 1)


def _layer(x: Value) -> Node | None:
    """Give the convolution or dense layer that makes a value, perhaps through a layout transform."""
    while isinstance(x.op, LayoutTransform):
        x = x.inputs[0]
    return x.node if isinstance(x.op, Conv | ConvTranspose | Dense) else None


def _into(x: Value, k: Array, shift: Array) -> Value | None:
    """Give x * k + shift by changing the layer that makes x, if only this reads it."""
    layer = _layer(x)
    if layer is None:
        return None
    if not sole_use(x):
        miss("the layer's output has other uses")
        return None
    if isinstance(x.op, LayoutTransform):
        inner = _into(x.inputs[0], k, shift)
        return None if inner is None else call(x.op, inner)
    operands = _folded(layer, k, shift)
    return None if operands is None else call(layer.op, layer.inputs[0], *operands)


def _folded(layer: Node, k: Array, shift: Array) -> tuple[Value, Value] | None:
    """Give the weight and the bias of a layer scaled and shifted; None where they are no constants or overflow."""
    weight = layer.inputs[1]
    bias = layer.inputs[2] if len(layer.inputs) == 3 else constant(np.zeros(len(k), weight.dtype.numpy))
    w, b = array_of(weight), array_of(bias)
    if w is None or b is None:
        miss("weight or bias is no constant")
        return None
    with np.errstate(all="ignore"):
        scaled = w if (k == 1).all() else (w * _along_outputs(layer, k, w)).astype(w.dtype)
        shifted = (b * k + shift).astype(b.dtype)
        by_channel = np.isfinite(_by_output(layer, scaled, len(k))).all(axis=1)
    if not (np.isnan(k) | (np.isfinite(k) & np.isfinite(shifted) & by_channel)).all():
        miss("a weight would overflow")
        return None
    return _changed(weight, scaled), _changed(bias, shifted)


def _along_outputs(layer: Node, k: Array, w: Array) -> Array:
    """Shape one number an output channel so that it broadcasts over the weight."""
    if not isinstance(layer.op, ConvTranspose):
        return k.reshape(-1, *(1,) * (w.ndim - 1))
    groups = layer.op.groups
    by_input = np.repeat(k.reshape(groups, -1), w.shape[0] // groups, axis=0)
    return by_input.reshape(*by_input.shape, *(1,) * (w.ndim - 2))


def _by_output(layer: Node, w: Array, channels: int) -> Array:
    """Give the weight as one row an output channel."""
    if not isinstance(layer.op, ConvTranspose):
        return w.reshape(channels, -1)
    groups = layer.op.groups
    grouped = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    return np.moveaxis(grouped, 2, 1).reshape(channels, -1)


def _changed(c: Value, array: Array) -> Value:
    """Give a constant with other numbers, of the same name and layout."""
    if not isinstance(c.op, Constant) or array is c.op.value.array:
        return c
    return call(replace(c.op, value=Literal(array)))
