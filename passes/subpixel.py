"""Compute transposed convolutions of stride s as one convolution whose channels are then spread over s x s pixels.

    conv_transpose(x, w, b, stride=s) -> slice(depth_to_space{s}(conv(x, w', b')))

An output pixel p = q * s + r - pad gets its taps k = r + s * t from x[q - t]: for each of the s x s phases r a
convolution of its own, all of them over the same windows where s divides the kernel, so that their filters stand side
by side in one weight (Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016).  The very
products of the definition are added up, none by an added zero, at the rate of a convolution.  With a stride of 1 it is
the convolution with the filters turned around.  Where s does not divide the kernel, phases have more taps or fewer, and
each is a convolution of its own:

    conv_transpose(x, w, b, stride=s) -> slice(depth_to_space{s}(concat(conv(x, w0, b), conv(x, w1, b), ...)))

Only with two axes, constant weights, one group, no dilation; other transposed convolutions stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.rewrite import miss, rewrite
from cnnc.ops.blocked import fixed
from cnnc.ops.concat import Concat
from cnnc.ops.conv import Conv
from cnnc.ops.conv_transpose import ConvTranspose
from cnnc.ops.slice import Slice
from cnnc.ops.source import Constant, constant
from cnnc.ops.space import DepthToSpace
from cnnc.passes.registry import Pass
from cnnc.target import Target


@dataclass(frozen=True)
class Subpixel(Pass):
    """Make convolutions of transposed ones."""

    def run(self, graph: Graph, target: Target) -> Graph:
        """Apply the rule everywhere."""
        return rewrite(graph, (conv_of_conv_transpose,))


def conv_of_conv_transpose(v: Value) -> Value | None:
    """conv_transpose(x, w, b) -> slice(depth_to_space(conv(x, w', b')))."""
    match v.node:
        case Node(ConvTranspose() as op, (x, Value(Node(Constant() as weight)), *bias)):
            reason = _obstacle(op, weight.value.array.shape[2:], x, bias)
            if reason:
                miss(reason)
                return None
            w: np.ndarray = weight.value.array
            even = not np.any(np.mod(w.shape[2:], op.stride))
            return _subpixel(v, op, x, w, bias) if even else _phase_by_phase(v, op, x, w, bias)
    return None


def _obstacle(op: ConvTranspose, kernel: tuple[int, ...], x: Value, bias: list[Value]) -> str:
    """Say why a transposed convolution stays as it is; nothing if it need not."""
    if len(kernel) != 2 or not all(isinstance(size, int) for size in x.shape[1:]):
        return "it does not have two axes of fixed size"
    if op.groups != 1 or op.dilation != (1, 1):
        return "it has groups or a dilation"
    if op.stride[0] != op.stride[1] or any(k < op.stride[0] for k in kernel):
        return "its strides differ, or exceed the kernel"
    if x.type.layout is not None or not all(isinstance(b.op, Constant) for b in bias):
        return "the layout is chosen already, or the bias is no constant"
    # Cropping as much as a window would need a negative padding.
    return "it crops whole windows" if any(p >= k for p, k in zip(op.pad, kernel * 2, strict=True)) else ""


def _subpixel(v: Value, op: ConvTranspose, x: Value, w: np.ndarray, bias: list[Value]) -> Value | None:
    stride = op.stride[0]
    begins, ends, starts = [], [], []
    sizes = zip(fixed(op.name, x.shape[2:]), fixed(op.name, v.shape[2:]), op.pad[:2], w.shape[2:], strict=True)
    for size, wanted, pad, kernel in sizes:
        taps = kernel // stride
        first, start = divmod(pad, stride)
        begins.append(taps - 1 - first)
        # The convolution's rows first .. last-1 hold what is wanted; without padding, its row `size` would be the last.
        last = -(-(pad + wanted) // stride)
        ends.append(last - size)
        starts.append(start)
        if not 0 <= last - size < taps:
            miss("its output ends before the last window begins, or after it ends")
            return None
    conv = Conv((1, 1), (*begins, *ends), (1, 1))
    operands = [constant(_phases(w, stride))]
    operands += [constant(np.tile(b.op.value.array, stride**2)) for b in bias if isinstance(b.op, Constant)]
    y = call(conv, x, *operands)
    if stride > 1:
        y = call(DepthToSpace(stride), y)
    if y.shape == v.shape:
        return y
    return call(Slice((0, 0, *starts), v.shape, (1, 1, 1, 1)), y)


def _phase_by_phase(v: Value, op: ConvTranspose, x: Value, w: np.ndarray, bias: list[Value]) -> Value | None:
    """Make a convolution of each phase: pixels p = q * s + r get the taps k = (r + pad) % s + s * t."""
    stride = op.stride[0]
    sizes, wanted = fixed(op.name, x.shape[2:]), fixed(op.name, v.shape[2:])
    phases = []
    for phase in np.ndindex(stride, stride):
        begins, ends, firsts = [], [], []
        for r, size, out, pad, kernel in zip(phase, sizes, wanted, op.pad[:2], w.shape[2:], strict=True):
            ahead, first = divmod(r + pad, stride)
            taps = -(-(kernel - first) // stride)
            begins.append(taps - 1 - ahead)
            ends.append(-(-out // stride) - size + ahead)
            firsts.append(first)
        if min(*begins, *ends) < 0:
            miss("a phase leaves out the border of the input")
            return None
        part = w[:, :, firsts[0] :: stride, firsts[1] :: stride][:, :, ::-1, ::-1].swapaxes(0, 1)
        conv = Conv((1, 1), (*begins, *ends), (1, 1))
        phases.append(call(conv, x, constant(np.ascontiguousarray(part)), *bias))
    y = call(DepthToSpace(stride), call(Concat(1), *phases))
    return y if y.shape == v.shape else call(Slice((0, 0, 0, 0), v.shape, (1, 1, 1, 1)), y)


def _phases(w: np.ndarray, stride: int) -> np.ndarray:
    """Rearrange w[i, o, t*s + r, u*s + q] as w'[(r*s + q)*O + o, i, -t, -u]: a filter for each phase, turned around."""
    inputs, outputs, height, width = w.shape
    parts = w.reshape(inputs, outputs, height // stride, stride, width // stride, stride)[:, :, ::-1, :, ::-1, :]
    ordered = parts.transpose(3, 5, 1, 0, 2, 4)
    return np.ascontiguousarray(ordered).reshape(stride**2 * outputs, inputs, height // stride, width // stride)
