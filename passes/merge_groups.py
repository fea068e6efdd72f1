"""Merge groups of convolutions until they are whole blocks of channels.

    conv{groups=8}(x, w[192,24,3,3]) -> conv{groups=4}(x, w'[192,48,3,3])        for blocks of 16

where w' is 0 for the inputs of other groups.  Groups that are left over become one, beside the others:

    conv{groups=17}(x, w) -> concat(conv{groups=8}(slice(x), w'), conv(slice(x), w''))

Kernels for CPUs read channels in blocks, of which a group must be whole
ones or a part of one, as in depthwise convolutions.  What is neither, as in half of the RegNets, would be computed a
number at a time, which takes about twenty times as long for each product; so a few times the products are worth it.

Outputs are the same numbers, unless an input of a merged group is infinite or NaN: then those of all of it are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.rewrite import miss, rewrite
from cnnc.ir.types import DType
from cnnc.ops.concat import Concat
from cnnc.ops.conv import Conv
from cnnc.ops.slice import Slice
from cnnc.ops.source import Constant, constant
from cnnc.passes.registry import Pass
from cnnc.target import Target

FEW = 4
"""Groups that are better one, whose algorithm can be any, than two parts."""

IMAGE_RANK = 4
"""The rank of what is blocked: float32 images."""


@dataclass(frozen=True)
class MergeGroups(Pass):
    """Merge groups, at most so `many` into one; `block` is the channel block, by default the lanes of vectors."""

    many: int = 8
    block: int = 0

    def run(self, graph: Graph, target: Target) -> Graph:
        """Merge wherever groups fit into no blocks; a GPU has none."""
        block = self.block or target.vector_lanes
        if target.is_gpu:
            return graph

        def merge_groups(v: Value) -> Value | None:
            """conv{groups=n}(x, w) -> conv{groups=n/m}(x, w')."""
            match v.node:
                case Node(Conv(algorithm="direct") as conv, (x, Value(Node(Constant() as weight)), *bias)):
                    if x.type.rank != IMAGE_RANK or x.type.dtype is not DType.F32 or weight.layout is not None:
                        return None
                    array: np.ndarray = weight.value.array
                    inputs, outputs = array.shape[1], array.shape[0] // conv.groups
                    if _fits(conv.groups, inputs, outputs, block):
                        return None
                    fitting = [m for m in range(2, self.many + 1) if _fits(2, m * inputs, m * outputs, block)]
                    counts = [m for m in fitting if conv.groups % m == 0]
                    if not counts and conv.groups <= (FEW if fitting else self.many):
                        counts = [conv.groups]
                    if counts:
                        return _part(conv, x, array, bias, slice(0, conv.groups), counts[0])
                    if not fitting or not all(isinstance(b.op, Constant) for b in bias):
                        miss(f"no {self.many} groups or fewer of {weight.infer()} are whole blocks of {block}")
                        return None
                    whole = conv.groups // fitting[0] * fitting[0]
                    first = _part(conv, x, array, bias, slice(0, whole), fitting[0])
                    rest = _part(conv, x, array, bias, slice(whole, conv.groups), conv.groups - whole)
                    return call(Concat(1), first, rest)
            return None

        return rewrite(graph, (merge_groups,))


def _fits(groups: int, inputs: int, outputs: int, block: int) -> bool:
    """Whether groups of so many channels are whole blocks, or parts of one; a single one is filled up."""
    whole = inputs % block == 0 and outputs % block == 0
    return groups == 1 or whole or (inputs == outputs and block % inputs == 0)


def _part(conv: Conv, x: Value, w: np.ndarray, bias: Sequence[Value], part: slice, count: int) -> Value:
    """Give the convolution of some of the groups, `count` of which are one from now on."""
    inputs, outputs, groups = w.shape[1], w.shape[0] // conv.groups, part.stop - part.start
    weight = w[part.start * outputs : part.stop * outputs]
    merged = constant(_merged(weight, groups, count))
    if groups < conv.groups:
        n, _, *spatial = x.shape
        x = call(Slice((0, part.start * inputs, 0, 0), (n, groups * inputs, *spatial), (1,) * IMAGE_RANK), x)
        arrays = [b.op.value.array for b in bias if isinstance(b.op, Constant)]
        bias = [constant(array[part.start * outputs : part.stop * outputs]) for array in arrays]
    return call(replace(conv, groups=groups // count), x, merged, *bias)


def _merged(w: np.ndarray, groups: int, count: int) -> np.ndarray:
    """Give the weight w[O,I/groups,...] of groups of which `count` are one."""
    outputs, inputs, *kernel = w.shape
    parts = w.reshape(groups // count, count, outputs // groups, inputs, *kernel)
    wide = np.zeros((groups // count, count, outputs // groups, count, inputs, *kernel), w.dtype)
    for group in range(count):
        wide[:, group, :, group] = parts[:, group]
    return wide.reshape(outputs, count * inputs, *kernel)
