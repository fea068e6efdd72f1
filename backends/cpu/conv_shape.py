"""The sizes of a convolution, and the tile sizes it is computed with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from cnnc.backends.cpu.segments import Segment, row_segments

__all__ = ["MOST_PARTS", "ConvShape", "DirectParams", "reshaped", "rows_read", "segments_of"]

MOST_PARTS = 3
"""The bf16 numbers that hold all of a float32."""


@dataclass(frozen=True)
class ConvShape:
    """A convolution: logical sizes, and the channel block of its layouts.

    `pad` is (top, left, bottom, right).  `plain_input`: the input is NCHW and the weight OIHW{block}o.  `prologue`: the
    operations by which the kernel computes each element of its input first; 0 where it reads what another computed.
    `weight_bytes` is what a number of the weight takes in memory, `parts` how many bf16 numbers hold all of a number of
    the input, and of the weight (see bf16_parts.py).
    """

    n: int
    ic: int
    h: int
    w: int
    oc: int
    kh: int
    kw: int
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    block: int = 16
    plain_input: bool = False
    prologue: float = 0.0
    weight_bytes: int = 4
    parts: tuple[int, int] = (MOST_PARTS, MOST_PARTS)

    @property
    def oh(self) -> int:
        """Output rows."""
        return (self.h + self.pad[0] + self.pad[2] - self.dilation[0] * (self.kh - 1) - 1) // self.stride[0] + 1

    @property
    def ow(self) -> int:
        """Output columns."""
        return (self.w + self.pad[1] + self.pad[3] - self.dilation[1] * (self.kw - 1) - 1) // self.stride[1] + 1

    @property
    def oc_blocks(self) -> int:
        """Blocks of output channels, the last one perhaps padded."""
        return -(-self.oc // self.block)

    @property
    def ic_blocks(self) -> int:
        """Blocks of input channels of one group: what the reduction runs over outermost."""
        channels = self.ic // self.groups
        return channels if self.plain_input else -(-channels // self.block)

    @property
    def inner(self) -> int:
        """Input channels that lie next to each other."""
        return 1 if self.plain_input else self.block

    @property
    def last_inner(self) -> int:
        """Input channels in the last block of a group; the rest of it is padding."""
        return (self.ic // self.groups - 1) % self.inner + 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The physical shape of the input."""
        shape = (self.n, self.ic_blocks * self.groups, self.h, self.w)
        return shape if self.plain_input else (*shape, self.block)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The physical shape of the weight."""
        shape = (self.oc_blocks, self.ic_blocks, self.kh, self.kw)
        return (*shape, self.block) if self.plain_input else (*shape, self.block, self.block)

    @property
    def operand_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The physical shapes of the operands: input and weight."""
        return (self.input_shape, self.weight_shape)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The physical shape of the output."""
        return (self.n, self.oc_blocks, self.oh, self.ow, self.block)

    @property
    def flops(self) -> int:
        """Floating point operations of the logical convolution, padding counted as data."""
        return 2 * self.n * self.oc * self.oh * self.ow * (self.ic // self.groups) * self.kh * self.kw


@dataclass(frozen=True)
class DirectParams:
    """Tile sizes.

    Register tiles have at most `pixels` pixels; a slice computes `oc_tiles` groups of `vectors` blocks of output
    channels on `rows` rows.  `oc_outer` (0 or 1): whether slices with the same weights follow each other, or
    those with the same input rows.  `width`, for 1x1 kernels: pixels are taken in rows of this length (else 0).
    `channels`: blocks of input channels in a pass over a slice's pixels, whose weights then stay in L1, while the
    output holds the sums of earlier passes (0: all of them in one).
    """

    pixels: int
    vectors: int
    oc_tiles: int
    rows: int
    oc_outer: int = 1
    width: int = 0
    channels: int = 0


def reshaped(shape: ConvShape, params: DirectParams) -> ConvShape:
    """Give the shape in rows of `params.width` pixels."""
    return replace(shape, h=shape.h * shape.w // params.width, w=params.width) if params.width else shape


def rows_read(shape: ConvShape, rows: int) -> int:
    """Give how many input rows, padding among them, some rows of output are computed from."""
    return (rows - 1) * shape.stride[0] + (shape.kh - 1) * shape.dilation[0] + 1


@lru_cache(4096)
def segments_of(shape: ConvShape, pixels: int) -> tuple[Segment, ...]:
    """Cut a row of output into register tiles of at most `pixels`."""
    return row_segments(shape.w, shape.ow, shape.kw, shape.stride[1], shape.pad[1], shape.dilation[1], pixels)
