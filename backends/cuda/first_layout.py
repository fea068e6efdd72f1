"""Whether a convolution of few channels reads its image as it comes, or in blocks of channels on tensor cores.

    conv(layout_transform(x), w) on tensor cores, missing channels included   or   conv(x, w) on ordinary ones

The cost models decide.
"""

from __future__ import annotations

from cnnc.backends.cuda.conv_mma import ConvMma
from cnnc.backends.cuda.machine import GPUS, SECONDS_PER_LAUNCH
from cnnc.backends.lower.template import Template
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType
from cnnc.ops.blocked import channel_layout, tile_layout, weight_layout
from cnnc.ops.cast import Cast
from cnnc.ops.conv import Conv
from cnnc.ops.fused import Fused
from cnnc.ops.round_tf32 import RoundTf32
from cnnc.ops.source import Input
from cnnc.target import Target

_RANK = 4


def is_cheaper_plain(template: Template, node: Node, block: int, target: Target) -> bool:
    """Whether a template that reads plain images beats tensor cores and what they need of an image in blocks."""
    if not isinstance(node.op, Conv) or node.op.groups > 1 or node.op.tile is not None:
        return False
    x, w = (value.type for value in node.inputs[:2])
    if not (x.is_static and x.rank == w.rank == _RANK):
        return False
    stored = DType.F32 if block == 4 else DType.F16
    blocked = TensorType(x.shape, stored, channel_layout(x.rank, block))
    direct = _kernel(node.op, x, w, stored, weight_layout(w.rank, 1, block))
    tiled = _kernel(node.op, blocked, w, stored, tile_layout(w.rank, block))
    if not template.matches(direct, target) or not ConvMma().matches(tiled, target):
        return False
    transform = (x.nbytes + blocked.nbytes) / GPUS[target.arch].bandwidth + SECONDS_PER_LAUNCH
    return _seconds(template, direct, target) < _seconds(ConvMma(), tiled, target) + transform


def _kernel(conv: Conv, x: TensorType, w: TensorType, stored: DType, layout: Layout) -> Fused:
    """Make the kernel that a convolution becomes, its weight and its result stored as `stored`."""
    inputs = (call(Input("x", x)), call(Input("w", TensorType(w.shape, stored, layout))))
    widen = RoundTf32() if stored is DType.F32 else Cast(DType.F32)
    read = [value if value.dtype is DType.F32 is not stored else call(widen, value) for value in inputs]
    y = call(conv, *read)
    return Fused(Graph("conv", inputs, (y if stored is DType.F32 else call(Cast(stored), y),)), conv.name)


def _seconds(template: Template, kernel: Fused, target: Target) -> float:
    return min(template.cost(kernel, schedule, target) for schedule in template.space(kernel, target))
