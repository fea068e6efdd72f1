"""Sliding windows that keep the channel, in strips: output rows of four neighbours for each thread, in registers.

Where channels lie in blocks, a thread has four neighbouring channels of a column, and neighbouring threads the rest of
the block and the next columns.  Where they do not, it has up to four columns.  Either way what it loads, it loads four
at a time, once for all rows of its strip, and of what is padding it loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cnnc.backends.cuda.direct import VECTOR, Work, moved_bytes, seconds
from cnnc.ir.graph import Node, Value
from cnnc.ops.fused import Fused
from cnnc.target import Target

THREADS = 128
"""Of a block."""

MOST_TAPS = 7
"""Rows and columns of a kernel whose steps are written out."""

_ADDRESSES, _EPILOGUE = 60, 4
"""Instructions of a thread that find its place, and those that finish an element."""

_IN_FLIGHT = 24
"""Loads that a thread has under way at once."""


@dataclass(frozen=True)
class StripParams:
    """The output rows and columns of a thread."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Windows:
    """A kernel's windows: the operator, the image it reads, how many channels lie together; (down, across) each.

    `pad` is what comes before the image.
    """

    node: Node
    image: Value
    block: int
    taps: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def lanes(self) -> int:
        """The channels of a thread."""
        return min(self.block, VECTOR)

    def counts(self, strip: StripParams) -> tuple[int, ...]:
        """Count the threads: images, blocks of channels, strips, across, parts of a block of channels."""
        images, blocks, height, width, *_ = self.node.types[0].physical_shape
        across = width // strip.columns
        return images, blocks, math.ceil(height / strip.rows), across, self.block // self.lanes

    def vectors(self, strip: StripParams) -> range:
        """Give where the vectors of a plain row begin that a strip reads, from the first one that no padding moves."""
        first = -self.pad[1]
        last = first + (strip.columns - 1) * self.stride[1] + (self.taps[1] - 1) * self.dilation[1]
        return range(first // strip.columns * strip.columns, last + 1, strip.columns)

    def space(self) -> Iterable[StripParams]:
        """Give strips of several heights; the columns of plain images are as many as can be loaded at once, or one."""
        height, width = self.node.types[0].static_shape[2:]
        columns = 1 if self.block > 1 else math.gcd(math.gcd(width, self.image.type.static_shape[3]), VECTOR)
        heights = [rows for rows in (1, 2, 4) if rows < 2 * height]
        return [StripParams(rows, count) for rows in heights for count in sorted({1, columns})]

    def cost(self, kernel: Fused, strip: StripParams, target: Target, step: int, weights: int) -> float:
        """Estimate seconds; a tap of a window takes `step` instructions, and a channel has so many `weights`."""
        threads = math.prod(self.counts(strip))
        (kh, kw), outputs = self.taps, strip.rows * strip.columns * self.lanes
        rows = len({row * self.stride[0] + tap * self.dilation[0] for row in range(strip.rows) for tap in range(kh)})
        loads = rows * (kw if self.block > 1 else len(self.vectors(strip))) + weights
        # What is stored in 16 bits is converted, number by number.
        narrow = self.image.dtype.itemsize < 4
        converted = loads * strip.columns * self.lanes + outputs if narrow else 0
        instructions = _ADDRESSES + 3 * loads + converted + outputs * (kh * kw * step + _EPILOGUE)
        registers = 40 + outputs + (weights // kw * self.lanes if self.block > 1 else weights)
        work = Work(math.ceil(threads / THREADS), THREADS, instructions, 1 + loads / _IN_FLIGHT, registers)
        return seconds(work, moved_bytes(kernel), target)
