"""Depthwise convolution, and grouped convolution with a few channels in each group, on blocked channels (NCHWc).

    y[n, c, h, w] = sum over j, r, s of x[n, g(c) + j, h * stride + r * dilation - pad, ...] * weight[c, j, r, s]

with g(c) the first channel of c's group and j one of its `group` channels, `group` a divisor of the block.  The
weight is OIHW{block}o.  For group > 1 a pixel has a sum for each way from an input lane to an output lane (see
group_sums.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import anchor_of, body_of, machine_of
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.segments import Segment, row_segments
from cnnc.backends.cpu.window_shape import WindowShape
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.blocked import channel_layout, weight_layout
from cnnc.ops.conv import Conv
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["Depthwise", "DepthwiseParams", "build", "cost", "space", "weight_shape"]


@dataclass(frozen=True)
class DepthwiseParams:
    """Register tiles of at most `pixels` pixels; slices of `rows` output rows of one channel block."""

    pixels: int
    rows: int


def weight_shape(shape: WindowShape, group: int) -> tuple[int, ...]:
    """Give the physical shape of the weight for groups of `group` channels."""
    return (shape.blocks, group, shape.kh, shape.kw, shape.block)


def space(shape: WindowShape, group: int, machine: Machine) -> Iterator[DepthwiseParams]:
    """Give the tile sizes worth considering."""
    rows = sorted({-(-shape.oh // parts) for parts in (1, 2, 4, 8) if parts <= shape.oh})
    for pixels, count in product(_tile_widths(group, machine), rows):
        yield DepthwiseParams(pixels, count)


def _tile_widths(group: int, machine: Machine) -> list[int]:
    if group == 1:
        most = (machine.registers - 2) // 2
        return sorted({most, max(most * 2 // 3, 1), max(most // 2, 1)})
    most = max((p for p in range(1, machine.registers) if machine.fits(p, group)), default=1)
    return sorted({max(most - fewer, 1) for fewer in range(3)})


def cost(shape: WindowShape, group: int, params: DepthwiseParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    cycles = 0.0
    for segment in row_segments(
        shape.w, shape.ow, shape.kw, shape.stride[1], shape.pad[1], shape.dilation[1], params.pixels
    ):
        tile = (
            _tile_cycles(shape, segment, machine)
            if group == 1
            else _grouped_tile_cycles(shape, group, segment, machine)
        )
        cycles += segment.count * tile
    row_blocks = -(-shape.oh // params.rows)
    slices = shape.n * shape.blocks * row_blocks
    turning = 0.0 if group == 1 else shape.kh * shape.kw * group * group
    per_slice = cycles * params.rows + 40.0 + turning
    waves = machine.turns(slices)
    halo = max(shape.kh - shape.stride[0], 0) / (params.rows * shape.stride[0])
    moved = 4.0 * shape.n * shape.blocks * shape.block * (shape.h * shape.w * (1 + 0.3 * halo) + shape.oh * shape.ow)
    far = moved / machine.memory_bytes / machine.threads
    return max(per_slice * waves, far) * machine.sharing(slices) / machine.hertz


def _tile_cycles(shape: WindowShape, segment: Segment, machine: Machine) -> float:
    """Count the cycles of a tile of a depthwise convolution."""
    cycles = 8.0 + 0.5 * segment.pixels + 2.0 * shape.kh
    for run in segment.runs:
        products = run.end - run.begin
        cycles += shape.kh * (run.last - run.first) * max(products / machine.fma_ports, machine.fma_latency / 2)
    return cycles


def _grouped_tile_cycles(shape: WindowShape, group: int, segment: Segment, machine: Machine) -> float:
    """Count the cycles of a tile whose pixels have a sum for each distance.

    LLVM keeps the input of neighbouring kernel columns in registers, even where that makes it spill more than a few.
    """
    moves = (group - 1) * segment.pixels * 2 / machine.fma_ports
    live = segment.pixels * (group + 1) + shape.kw - 1 + (group if segment.pixels >= group else 1)
    cycles = 8.0 + moves + shape.kh * (2.0 + 2.0 * max(live - machine.registers - 2, 0))
    for run in segment.runs:
        pixels = run.end - run.begin
        step = machine.tile_cycles(pixels, group) + machine.load_cycles * (pixels + group)
        cycles += shape.kh * (run.last - run.first) * step
    return cycles


def build(shape: WindowShape, group: int, params: DepthwiseParams, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands begin with x and weight."""
    from cnnc.backends.cpu.group_sums import sums_by_distance
    from cnnc.backends.cpu.windows import window_kernel

    bound = body.bind(shape.output_shape)
    gather = sums_by_distance(bound.operands[1], group, shape)
    return window_kernel(shape, bound, params.pixels, params.rows, gather)


@dataclass(frozen=True)
class Depthwise:
    """The template: 2-D convolutions whose groups lie inside a block of channels."""

    name: str = "depthwise"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a convolution with as many output as input channels and a weight in OIHW{block}o."""
        return _find(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tile sizes worth considering."""
        _, shape, group = _known(kernel, target)
        return (schedule_of(self.name, params) for params in space(shape, group, machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        _, shape, group = _known(kernel, target)
        return cost(shape, group, params_of(DepthwiseParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        anchor, shape, group = _known(kernel, target)
        return build(shape, group, params_of(DepthwiseParams, schedule), body_of(kernel, anchor))


def _known(kernel: Fused, target: Target) -> tuple[Node, WindowShape, int]:
    found = _find(kernel, target)
    if found is None:
        raise VerifyError(f"depthwise cannot compute kernel {kernel.anchor}")
    return found


@lru_cache(64)
def _find(kernel: Fused, target: Target) -> tuple[Node, WindowShape, int] | None:
    """Give the convolution, its windows and the channels of a group, if this template can compute it."""
    anchor = anchor_of(kernel, target, "conv", narrow=(1,))
    if anchor is None or not isinstance(anchor.op, Conv) or anchor.op.algorithm != "direct":
        return None
    op, x, w, block = anchor.op, anchor.inputs[0].type, anchor.inputs[1].type, target.vector_lanes
    if x.rank != 4 or x.layout != channel_layout(4, block) or w.layout != weight_layout(4, 1, block):
        return None
    (channels, group, kh, kw), (n, ic, height, width) = w.static_shape, x.static_shape
    if channels != ic or ic != op.groups * group or block % group:
        return None
    _, _, oh, ow = anchor.types[0].static_shape
    shape = WindowShape(
        *(n, channels, height, width, oh, ow, kh, kw),
        stride=(op.stride[0], op.stride[1]),
        pad=(op.pad[0], op.pad[1]),
        dilation=(op.dilation[0], op.dilation[1]),
        block=block,
    )
    return anchor, shape, group
