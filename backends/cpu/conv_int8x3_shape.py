"""The sizes a 1x1 convolution in int8 digits is computed with."""

from __future__ import annotations

from dataclasses import dataclass

from cnnc.backends.cpu.conv_shape import ConvShape

__all__ = ["IN_A_STEP", "TILES", "DigitParams", "slices_of"]

IN_A_STEP = 4
"""Blocks of input channels that a product of tiles adds up."""

TILES = 2
"""Tiles of pixels whose sums are in registers: three each."""


@dataclass(frozen=True)
class DigitParams:
    """Tile sizes: a slice computes `oc_blocks` blocks of output channels of `pixels` pixels of an image."""

    pixels: int
    oc_blocks: int


def slices_of(shape: ConvShape, params: DigitParams) -> tuple[int, int]:
    """Give how many parts there are of the pixels of an image, and of the blocks of output channels."""
    return -(-shape.oh * shape.ow // params.pixels), -(-shape.oc_blocks // params.oc_blocks)
