"""The input of a convolution staged in planes, so that a tap of the kernel is a shift of all pixels.

    plane[r % stride, s % stride][row, column] = x[row * stride + r % stride - pad, ...]
    x at output pixel p and tap (r, s)         = plane[...][p + (r / stride) * width + s / stride]

Pixels are counted through rows of `width` pixels, some more than the output has: what is computed for those is left
out.  Any stride and dilation come down to this, and runs of pixels may go on from one row to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cnnc.backends.cpu.conv_shape import ConvShape

__all__ = ["Planes"]


@dataclass(frozen=True)
class Planes:
    """The planes from which `rows` output rows of a convolution are computed; sizes are for one block of channels."""

    shape: ConvShape
    rows: int

    @property
    def phases(self) -> tuple[int, int]:
        """How many planes there are along either axis."""
        shape = self.shape
        return (
            min(shape.stride[0], shape.dilation[0] * (shape.kh - 1) + 1),
            min(shape.stride[1], shape.dilation[1] * (shape.kw - 1) + 1),
        )

    @property
    def width(self) -> int:
        """Pixels in a row of a plane."""
        shape = self.shape
        return shape.ow + shape.dilation[1] * (shape.kw - 1) // shape.stride[1]

    @property
    def height(self) -> int:
        """Rows of a plane."""
        shape = self.shape
        return self.rows + shape.dilation[0] * (shape.kh - 1) // shape.stride[0]

    @property
    def pixels(self) -> int:
        """Pixels of all planes."""
        return self.phases[0] * self.phases[1] * self.height * self.width

    @property
    def outputs(self) -> int:
        """Pixels to run over, from the first of the output to the last, those between its rows among them."""
        return (self.rows - 1) * self.width + self.shape.ow

    def start(self, row: Any, column: Any) -> Any:
        """Give where the pixels of a plane begin."""
        return (row * self.phases[1] + column) * self.height * self.width

    def shift(self, kernel_row: Any, kernel_column: Any) -> Any:
        """Give how far from an output pixel, counted from the first of all planes, its input at a tap is."""
        shape = self.shape
        down, across = kernel_row * shape.dilation[0], kernel_column * shape.dilation[1]
        plane = self.start(down % shape.stride[0], across % shape.stride[1])
        return plane + down // shape.stride[0] * self.width + across // shape.stride[1]
