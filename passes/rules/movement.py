"""Rules of data movement: moves that cancel, moves that move nothing."""

from __future__ import annotations

import math
from dataclasses import replace

from cnnc.ir.build import call
from cnnc.ir.graph import Node, Value
from cnnc.ir.rewrite import sole_use
from cnnc.ops.concat import Concat, Split
from cnnc.ops.gather import Gather
from cnnc.ops.layout_transform import LayoutTransform
from cnnc.ops.pad import Pad
from cnnc.ops.reduce import ReduceMax, ReduceMean, ReduceMin, ReduceSum
from cnnc.ops.reshape import Expand, Reshape, Tile, Transpose
from cnnc.ops.shuffle import ShuffleChannels
from cnnc.ops.slice import Slice
from cnnc.passes.constants import array_of


def move_nothing(v: Value) -> Value | None:
    """f(x) -> x for an expand, slice, pad, tile, reshape, concat, split or layout transform that keeps x as it is."""
    match v.node:
        case Node(Expand() | Reshape() | Slice() | Pad() | Tile() | Concat() | Split() | LayoutTransform() as op, (x,)):
            reverses = isinstance(op, Slice) and any(s != 1 for s, n in zip(op.steps, op.sizes, strict=True) if n != 1)
            rolls = isinstance(op, Pad) and any(op.pads)
            return None if x.type != v.type or reverses or rolls else x
        case Node(Transpose(perm), (x,)) if perm == tuple(range(len(perm))):
            return x
    return None


def reshape_twice(v: Value) -> Value | None:
    """reshape(reshape(x)) -> reshape(x)."""
    match v.node:
        case Node(Reshape() as op, (Value(Node(Reshape(), (x,))),)):
            return call(op, x)
    return None


def transpose_twice(v: Value) -> Value | None:
    """transpose(transpose(x)) -> transpose(x)."""
    match v.node:
        case Node(Transpose(outer), (Value(Node(Transpose(inner), (x,))),)):
            return call(Transpose(tuple(inner[axis] for axis in outer)), x)
    return None


def transpose_of_ones(v: Value) -> Value | None:
    """transpose(x) -> reshape(x) where only axes of size 1 change places."""
    match v.node:
        case Node(Transpose(perm), (x,)):
            moved = [axis for axis in perm if x.shape[axis] != 1]
            return call(Reshape(v.shape), x) if moved == sorted(moved) else None
    return None


def transform_twice(v: Value) -> Value | None:
    """layout_transform(layout_transform(x)) -> layout_transform(x)."""
    match v.node:
        case Node(LayoutTransform() as op, (Value(Node(LayoutTransform(), (x,))),)):
            return call(op, x)
    return None


def concat_of_concat(v: Value) -> Value | None:
    """concat(a, concat(b, c)) -> concat(a, b, c), where nothing else reads the inner one."""
    match v.node:
        case Node(Concat() as op, inputs):
            parts: list[Value] = []
            for x in inputs:
                parts += x.inputs if x.op == op and sole_use(x) else (x,)
            return call(op, *parts) if len(parts) > len(inputs) else None
    return None


def keep_reduced_axes(v: Value) -> Value | None:
    """reduce(x, spatial axes) -> reshape(reduce(x, spatial axes, keepdims)).

    A reduction that keeps its axes takes blocked layouts, and the reshape is a view.
    """
    match v.node:
        case Node(ReduceMean() | ReduceMax() | ReduceMin() | ReduceSum() as op, (x,)):
            spatial = tuple(range(2, x.type.rank))
            if op.keepdims or not spatial or op.axes != spatial:
                return None
            return call(Reshape(v.shape), call(replace(op, keepdims=True), x))
    return None


def slice_of_slice(v: Value) -> Value | None:
    """slice(slice(x)) -> slice(x)."""
    match v.node:
        case Node(Slice() as outer, (Value(Node(Slice() as inner, (x,))),)) if x.type.is_static:
            starts = tuple(a + b * s for a, b, s in zip(inner.starts, outer.starts, inner.steps, strict=True))
            steps = tuple(a * b for a, b in zip(inner.steps, outer.steps, strict=True))
            return call(Slice(starts, outer.sizes, steps), x) if math.prod(v.type.static_shape) else None
    return None


def gather_one(v: Value) -> Value | None:
    """gather(x, number) -> reshape(slice(x))."""
    match v.node:
        case Node(Gather(axis), (x, c)) if x.type.is_static:
            indices, shape = array_of(c), x.type.static_shape
            if indices is None or indices.size != 1 or not -shape[axis] <= int(indices.flat[0]) < shape[axis]:
                return None
            starts = tuple(int(indices.flat[0]) % shape[axis] if i == axis else 0 for i in range(len(shape)))
            sizes = tuple(1 if i == axis else size for i, size in enumerate(shape))
            return call(Reshape(v.shape), call(Slice(starts, sizes, (1,) * len(shape)), x))
    return None


def shuffle_channels(v: Value) -> Value | None:
    """reshape(transpose(reshape(x, [N, g, C/g, ...]), 1 <-> 2), [N, C, ...]) -> shuffle_channels(x)."""
    match v.node:
        case Node(Reshape(), (Value(Node(Transpose(perm), (Value(Node(Reshape(), (x,))) as parts,))),)):
            if x.type.layout is not None or x.type.rank < 3 or x.shape != v.shape or parts.type.rank != x.type.rank + 1:
                return None
            turned = (0, 2, 1, *range(3, parts.type.rank))
            if perm != turned or (parts.shape[0], *parts.shape[3:]) != (x.shape[0], *x.shape[2:]):
                return None
            groups, channels = parts.shape[1], x.shape[1]
            if not isinstance(groups, int) or not isinstance(channels, int) or groups < 1:
                return None
            return call(ShuffleChannels(groups, 0, channels), x)
    return None


def shuffle_of_concat(v: Value) -> Value | None:
    """shuffle_channels(concat(a, b)) -> shuffle_channels(a, b), where nothing else reads what is joined."""
    match v.node:
        case Node(ShuffleChannels() as op, (Value(Node(Concat(1), parts)) as x,)) if sole_use(x):
            return call(op, *parts)
    return None


def part_of_shuffle(v: Value) -> Value | None:
    """split(shuffle_channels(x)), and slices of channels -> shuffle_channels(x) of fewer channels."""
    match v.node:
        case Node(Split(1, sizes), (Value(Node(ShuffleChannels() as op, parts)),)):
            start = op.start + sum(sizes[: v.index])
            return call(ShuffleChannels(op.groups, start, sizes[v.index]), *parts)
        case Node(Slice(starts, _, steps), (Value(Node(ShuffleChannels() as op, parts)) as x,)):
            others = v.shape[:1] + v.shape[2:] == x.shape[:1] + x.shape[2:]
            if not others or any(s != 1 for s in steps) or not isinstance(v.shape[1], int) or not v.shape[1]:
                return None
            return call(ShuffleChannels(op.groups, op.start + starts[1], v.shape[1]), *parts)
    return None


MOVEMENT = (
    move_nothing,
    reshape_twice,
    transpose_twice,
    transpose_of_ones,
    transform_twice,
    concat_of_concat,
    keep_reduced_axes,
    slice_of_slice,
    gather_one,
    shuffle_channels,
    shuffle_of_concat,
    part_of_shuffle,
)
