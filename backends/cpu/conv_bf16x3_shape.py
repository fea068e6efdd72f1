"""The sizes a convolution on matrix tiles is computed with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from cnnc.backends.cpu.conv_shape import MOST_PARTS, ConvShape
from cnnc.backends.cpu.planes import Planes

__all__ = ["MatrixParams", "is_flat", "is_pointwise", "part_products", "reshaped"]


@dataclass(frozen=True)
class MatrixParams:
    """Tile sizes.

    A slice computes `oc_blocks` blocks of output channels on `rows` rows, or pixels of a 1x1 convolution, of which
    `tiles` tiles of 16 pixels are in registers at a time.  `pairs`: pairs of blocks of input channels in a pass over
    the slice, whose parts then stay near, while memory holds the sums of earlier passes (0: all in one).
    """

    rows: int
    tiles: int
    oc_blocks: int
    pairs: int = 0


def is_pointwise(shape: ConvShape) -> bool:
    """Whether output pixel i depends on input pixel i alone."""
    return shape.kh == shape.kw == 1 and shape.stride == (1, 1) and not any(shape.pad)


@lru_cache(256)
def reshaped(shape: ConvShape) -> ConvShape:
    """Give the shape in rows of one pixel where rows do not matter."""
    return replace(shape, h=shape.h * shape.w, w=1) if is_pointwise(shape) and shape.w > 1 else shape


def is_flat(shape: ConvShape) -> bool:
    """Whether there are no pixels between the rows of output."""
    return Planes(shape, 1).width == shape.ow


def part_products(of_x: int, of_w: int) -> list[range]:
    """Give for each part of x the parts of w it is multiplied by; the other products are too small to count."""
    return [range(min(of_w, MOST_PARTS - part)) for part in range(of_x)]
