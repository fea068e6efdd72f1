"""The sizes of a Winograd convolution, and the tile sizes it is computed with."""

from __future__ import annotations

from dataclasses import dataclass

from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.ops.winograd import Transform, transform

__all__ = ["WinogradParams", "WinogradShape"]


@dataclass(frozen=True)
class WinogradShape:
    """A convolution computed in tiles of `tile` outputs along each axis of more than one tap."""

    conv: ConvShape
    tile: int

    @property
    def vertical(self) -> Transform:
        """The filter along the rows' direction, from the top."""
        return transform(self.tile, self.conv.kh, self.conv.stride[0])

    @property
    def horizontal(self) -> Transform:
        """The filter along a row."""
        return transform(self.tile, self.conv.kw, self.conv.stride[1])

    @property
    def positions(self) -> int:
        """Products for a tile and a pair of channels."""
        return self.vertical.positions * self.horizontal.positions

    @property
    def outputs(self) -> int:
        """Pixels of a tile."""
        return self.vertical.tile * self.horizontal.tile

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return -(-self.conv.oh // self.vertical.tile)

    @property
    def columns(self) -> int:
        """Columns of tiles."""
        return -(-self.conv.ow // self.horizontal.tile)

    @property
    def tiles(self) -> int:
        """Tiles of all images."""
        return self.conv.n * self.rows * self.columns

    @property
    def has_inner_tiles(self) -> bool:
        """Whether an input tile may lie inside the input as a whole."""
        return self.conv.h >= self.vertical.inputs and self.conv.w >= self.horizontal.inputs

    def data_rows(self, tiles: int) -> int:
        """Give the vectors of transformed input for each position in the tile, for a chunk of `tiles` tiles.

        Beyond those needed there are so many that they take an odd number of cache lines: else vectors of equal
        tile and channel would share few sets of the L1 cache, which are all written one after the other.
        """
        per_line = 16 // self.conv.block
        lines = -(-self.conv.ic_blocks * tiles // per_line)
        return (lines | 1) * per_line

    @property
    def operand_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The physical shapes of the operands: input and transformed weight."""
        conv = self.conv
        sizes = (self.vertical.weights, self.horizontal.weights)
        weight = (*sizes, conv.oc_blocks, conv.ic_blocks, conv.block, conv.block)
        return (conv.input_shape, weight)


@dataclass(frozen=True)
class WinogradParams:
    """Tile sizes.

    A slice transforms `tiles` tiles at once and computes one of `oc_slices` parts of the output channels, `group`
    blocks of them at a time.  Register tiles hold at most `pixels` of the tiles.
    """

    tiles: int
    pixels: int
    group: int
    oc_slices: int
