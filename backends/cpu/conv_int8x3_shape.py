"""The sizes a convolution in int8 digits is computed with."""

from __future__ import annotations

from dataclasses import dataclass

from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.digit_sizes import TILES
from cnnc.backends.cpu.machine import TILE_ROWS

__all__ = ["DigitParams", "lines_of", "row_blocks_of", "slices_of"]


@dataclass(frozen=True)
class DigitParams:
    """Tile sizes: a slice computes `oc_blocks` blocks of output channels of `pixels` pixels of an image."""

    pixels: int
    oc_blocks: int


def lines_of(rows: int) -> int:
    """Give the lines of a digit of some rows: as many as tiles are loaded of, and an odd number for the sets of L1."""
    together = TILE_ROWS if rows <= TILE_ROWS else TILES * TILE_ROWS
    return -(-rows // together) * together | 1


def row_blocks_of(shape: ConvShape) -> int:
    """Give the blocks of numbers that a sum runs over: of all channels, tap by tap."""
    return shape.kh * shape.kw * shape.ic_blocks


def slices_of(shape: ConvShape, params: DigitParams) -> tuple[int, int]:
    """Give how many parts there are of the pixels of an image, and of the blocks of output channels."""
    return -(-shape.oh * shape.ow // params.pixels), -(-shape.oc_blocks // params.oc_blocks)
