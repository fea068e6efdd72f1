"""The sizes of a Winograd convolution, and the tile sizes it is computed with."""

from __future__ import annotations

from dataclasses import dataclass

from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.ops.winograd import KERNEL

__all__ = ["WinogradParams", "WinogradShape"]


@dataclass(frozen=True)
class WinogradShape:
    """A 3x3 convolution of stride 1, computed in tiles of `tile` x `tile` outputs."""

    conv: ConvShape
    tile: int

    @property
    def size(self) -> int:
        """Rows, and columns, of an input tile."""
        return self.tile + KERNEL - 1

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return -(-self.conv.oh // self.tile)

    @property
    def columns(self) -> int:
        """Columns of tiles."""
        return -(-self.conv.ow // self.tile)

    @property
    def tiles(self) -> int:
        """Tiles of all images."""
        return self.conv.n * self.rows * self.columns

    @property
    def has_inner_tiles(self) -> bool:
        """Whether an input tile may lie inside the input as a whole."""
        return min(self.conv.h, self.conv.w) >= self.size

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
        weight = (self.size, self.size, conv.oc_blocks, conv.ic_blocks, conv.block, conv.block)
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
