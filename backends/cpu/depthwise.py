"""Depthwise convolution, and grouped convolution with a few channels in each group, on blocked channels (NCHWc).

    y[n, c, h, w] = sum over j, r, s of x[n, g(c) + j, h * stride + r * dilation - pad, ...] * weight[c, j, r, s]

with g(c) the first channel of c's group and j one of its `group` channels, `group` a divisor of the block.  The
weight is OIHW{block}o.  For group > 1 lane c takes input lane g(c) + j: a shuffle of the input vector, which
costs less than expanding the groups to blocks of zeros would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.machine import Machine

if TYPE_CHECKING:
    from cnnc.backends.cpu.body import Body
    from cnnc.backends.cpu.windows import WindowShape

__all__ = ["DepthwiseParams", "build", "cost", "space", "weight_shape"]


@dataclass(frozen=True)
class DepthwiseParams:
    """Register tiles of at most `pixels` pixels; slices of `rows` output rows of one channel block."""

    pixels: int
    rows: int


def weight_shape(shape: WindowShape, group: int) -> tuple[int, ...]:
    """Give the physical shape of the weight for groups of `group` channels."""
    return (shape.blocks, group, shape.kh, shape.kw, shape.block)


def space(shape: WindowShape, machine: Machine) -> Iterator[DepthwiseParams]:
    """Give the tile sizes worth considering."""
    most = (machine.registers - 2) // 2
    rows = sorted({-(-shape.oh // parts) for parts in (1, 2, 4, 8) if parts <= shape.oh})
    for pixels in sorted({most, max(most * 2 // 3, 1), max(most // 2, 1)}):
        for count in rows:
            yield DepthwiseParams(pixels, count)


def cost(shape: WindowShape, group: int, params: DepthwiseParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    from cnnc.backends.cpu.segments import row_segments

    cycles = 0.0
    for segment in row_segments(
        shape.w, shape.ow, shape.kw, shape.stride[1], shape.pad[1], shape.dilation[1], params.pixels
    ):
        tile = 8.0 + 0.5 * segment.pixels + 2.0 * shape.kh
        for run in segment.runs:
            products = (run.end - run.begin) * group * (1.0 if group == 1 else 1.25)
            tile += shape.kh * (run.last - run.first) * max(products / machine.fma_ports, machine.fma_latency / 2)
        cycles += segment.count * tile
    row_blocks = -(-shape.oh // params.rows)
    slices = shape.n * shape.blocks * row_blocks
    per_slice = cycles * params.rows + 40.0
    waves = -(-slices // machine.threads)
    halo = max(shape.kh - shape.stride[0], 0) / (params.rows * shape.stride[0])
    moved = 4.0 * shape.n * shape.blocks * shape.block * (shape.h * shape.w * (1 + 0.3 * halo) + shape.oh * shape.ow)
    uneven = -(-slices // 8) * 8 / slices
    far = moved / machine.memory_bytes / machine.threads
    return max(per_slice * waves, far) * (1.0 + 0.01 * uneven) / machine.hertz


def build(shape: WindowShape, group: int, params: DepthwiseParams, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands are x and weight."""
    from tvm import tirx

    from cnnc.backends.cpu import loops
    from cnnc.backends.cpu.windows import window_kernel

    bound = body.bind(shape.output_shape)
    weight = bound.operands[1]

    def step(total: Any, x: Any, channel: Any, row: Any, column: Any) -> Any:
        for j in range(group):
            taps = loops.load(weight, channel, j, row, column, 0, lanes=shape.block)
            lanes = [loops.const(lane // group * group + j) for lane in range(shape.block)]
            total = total + (x if group == 1 else tirx.Shuffle([x], lanes)) * taps
        return total

    return window_kernel(shape, bound, params.pixels, params.rows, 0.0, step)
