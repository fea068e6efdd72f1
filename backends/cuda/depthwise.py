"""Depthwise convolution on a GPU's ordinary cores, in strips of registers (see strips.py).

    y[n, c, oh, ow] = epilogue(sum over r, s of x[n, c, oh * stride - pad + r * dilation, ...] * w[c, r, s])

Products and sums are f32, whatever is stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cnnc.backends.cuda.direct import image_block
from cnnc.backends.cuda.operands import STORED, follows_in_registers, stored_operand
from cnnc.backends.cuda.strips import MOST_TAPS, StripParams, Windows
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.graph import Value
from cnnc.ops.blocked import weight_layout
from cnnc.ops.conv import Conv
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

_RANK = 4


@dataclass(frozen=True)
class Depthwise:
    """Convolutions whose groups are single channels, up to 7x7, with an elementwise epilogue."""

    name: str = "depthwise"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take f32 and 16-bit images, plain or in blocks of channels."""
        return target.is_gpu and matched(kernel) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give every strip."""
        windows, _ = _matched(kernel)
        return [schedule_of(self.name, strip) for strip in windows.space()]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds: a product and its sum are one instruction."""
        windows, _ = _matched(kernel)
        kh, kw = windows.taps
        return windows.cost(kernel, params_of(StripParams, schedule), target, step=1, weights=kh * kw)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.strip_loops import Gather, strip_func

        windows, weight = _matched(kernel)
        products = Gather(0.0, lambda total, value, tap: total + value * tap, weight)
        return strip_func(kernel, windows, params_of(StripParams, schedule), products)


@lru_cache(256)
def matched(kernel: Fused) -> tuple[Windows, Value] | None:
    """Find the windows of a kernel's depthwise convolution, and its weight; None where it is not for this template."""
    node = follows_in_registers(kernel, Conv)
    if node is None or not isinstance(node.op, Conv) or node.op.algorithm != "direct":
        return None
    image, weight = (stored_operand(value, kernel.body) for value in node.inputs[:2])
    if image is None or weight is None or node.types[0].dtype not in STORED:
        return None
    block = image_block(image.type)
    if block is None or weight.type.layout != (weight_layout(_RANK, 1, block) if block > 1 else None):
        return None
    outputs, inputs, kh, kw = weight.type.static_shape
    if inputs != 1 or node.op.groups != outputs or max(kh, kw) > MOST_TAPS:
        return None
    (down, across), (top, left, *_), (dh, dw) = node.op.stride, node.op.pad, node.op.dilation
    return Windows(node, image, block, (kh, kw), (down, across), (top, left), (dh, dw)), weight


def _matched(kernel: Fused) -> tuple[Windows, Value]:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found
