"""Convolution as a product of matrices that is never laid out (implicit GEMM), on tensor cores.

    columns[m, k] = x[n, ic, oh * stride - pad + r * dilation, ...]   m = (n, oh, ow), k = (r, s, ic), 0 in padding
    y[n, o, j]    = epilogue(sum over k of columns[m, k] * w[o, k])

and so for each group.  Channels lie in blocks of 16 bytes, so that one copy takes the block of a pixel, and
neighbouring pixels lie side by side; a sum of 8 columns is a block of the output.  Products of f16, bf16 or of what was
rounded to tf32, added up in f32, on which the epilogue works in registers.  Where there are few pixels and channels,
blocks share the sums over k: each writes its part, and a second launch adds them up in order, so that every run gives
the same bits.

Chetlur et al., "cuDNN", 2014, section 3; NVIDIA's CUTLASS, "Implicit GEMM convolution".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from cnnc.backends.cuda.machine import CHUNK_BYTES
from cnnc.backends.cuda.mma_operands import stored_for_mma
from cnnc.backends.cuda.mma_params import TILES, BlockTile, MmaParams, MmaShape, seconds
from cnnc.backends.cuda.operands import follows_in_registers
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.graph import Node, Value
from cnnc.ops.blocked import channel_layout, tile_layout
from cnnc.ops.conv import Conv, fills_tiles
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

_RANK = 4


@dataclass(frozen=True)
class ConvMma:
    """Convolutions in blocks of channels, of which groups have whole ones, with an elementwise epilogue."""

    name: str = "conv_mma"
    tiles: ClassVar[tuple[BlockTile, ...]] = TILES
    params: ClassVar[type[BlockTile]] = MmaParams

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take convolutions of images whose operands are narrow, or rounded to tf32."""
        return target.is_gpu and matched(kernel) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give every tile that fits, with the parts that keep multiprocessors busy."""
        return [schedule_of(self.name, tile) for tile in shape_of(_matched(kernel)).candidates(self.tiles, target)]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds."""
        return seconds(shape_of(_matched(kernel)), params_of(self.params, schedule), target)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.conv_mma_loops import conv_mma_func

        return conv_mma_func(kernel, _matched(kernel), params_of(self.params, schedule))


@dataclass(frozen=True)
class MmaConv:
    """A kernel's convolution: its node, and what it reads from memory."""

    node: Node
    conv: Conv
    image: Value
    weight: Value

    @property
    def block(self) -> int:
        """The channels in 16 bytes."""
        return CHUNK_BYTES // self.image.dtype.itemsize


@lru_cache(256)
def matched(kernel: Fused) -> MmaConv | None:
    """Find a kernel's convolution; None where it is not for tensor cores."""
    node = follows_in_registers(kernel, Conv)
    if node is None or not isinstance(node.op, Conv):
        return None
    image, weight = (stored_for_mma(value, kernel.body) for value in node.inputs[:2])
    if image is None or weight is None or image.dtype is not weight.dtype or image.type.rank != _RANK:
        return None
    found = MmaConv(node, node.op, image, weight)
    layouts = channel_layout(_RANK, found.block), tile_layout(_RANK, found.block)
    fits = fills_tiles(node.op, weight.type, found.block)
    return found if fits and (image.type.layout, weight.type.layout) == layouts else None


def shape_of(found: MmaConv) -> MmaShape:
    """Give the product of matrices that a convolution is, or each of its groups."""
    images, channels, height, width = found.node.types[0].static_shape
    _, inputs, kh, kw = found.weight.type.static_shape
    chunks, groups = kh * kw * math.ceil(inputs / found.block), found.conv.groups
    return MmaShape(images * height * width, channels // groups, chunks, found.image.dtype, groups)


def _matched(kernel: Fused) -> MmaConv:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found
