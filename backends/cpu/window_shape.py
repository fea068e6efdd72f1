"""The sizes of sliding windows that keep the channel, on channels in blocks."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WindowShape"]


@dataclass(frozen=True)
class WindowShape:
    """Windows over channels in blocks: logical sizes, and output sizes, which rounding modes may decide.

    `pad` is (top, left); what lies beyond the input after it needs no mention.
    """

    n: int
    c: int
    h: int
    w: int
    oh: int
    ow: int
    kh: int
    kw: int
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    block: int = 16

    @property
    def blocks(self) -> int:
        """Blocks of channels, the last one perhaps padded."""
        return -(-self.c // self.block)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The physical shape of the input."""
        return (self.n, self.blocks, self.h, self.w, self.block)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The physical shape of the output."""
        return (self.n, self.blocks, self.oh, self.ow, self.block)
