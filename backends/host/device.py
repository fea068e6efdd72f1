"""What of a program runs on a GPU: machine code for one architecture, and how it is launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cnnc.backends.host.program import Slot

MODULE_ALIGNMENT = 64
"""Bytes each module in a binary is aligned to."""


MAP_TYPES = {"f16": 2, "bf16": 2, "u64": 8}
"""The bytes of a tensor map's elements: types of numbers, and what stands for any eight bytes."""

MOST_BOX = 256
"""Elements of a tiled map's box in each direction."""


@dataclass(frozen=True)
class TensorMap:
    """What a GPU is told of a tensor in memory to copy boxes of it by itself (TMA), as CUDA's driver takes it.

    Axes are counted from the innermost, whose neighbours lie side by side; `strides` are the bytes between neighbours
    along each of the others.  A tiled map has the extents of a `box`.  One with the corners of a bounding box is for
    windows (im2col): `box` is then channels and pixels, `steps` are those between windows, and corners are counted from
    the first and the last element of each axis but the innermost and the outermost.  What is outside of the tensor is
    0.  With `swizzled`, chunks of 16 bytes change places in lines of 128 bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzled: bool = False
    lower: tuple[int, ...] = ()
    upper: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()

    @property
    def is_im2col(self) -> bool:
        """Whether boxes are of pixels of windows."""
        return bool(self.lower)

    @property
    def is_possible(self) -> bool:
        """Whether all is within the limits of `cuTensorMapEncodeTiled` or `cuTensorMapEncodeIm2col`.

        From the CUDA Driver API reference; that of im2col offsets, in which no map is asked for, is not among them.
        """
        rank, line = len(self.shape), self.box[0] * MAP_TYPES[self.dtype]
        return (
            all(0 < extent <= 2**32 for extent in self.shape)
            and all(stride % 16 == 0 and 0 < stride < 2**40 for stride in self.strides)
            and all(stride >= extent for stride, extent in zip(self.strides, self.shape, strict=False))
            and line % 16 == 0
            and (line <= 128 or not self.swizzled)
            and all(0 < step <= 8 for step in self.steps)
            and (self._has_possible_window(rank) if self.is_im2col else rank <= 5 and _within(self.box, 1, MOST_BOX))
        )

    def _has_possible_window(self, rank: int) -> bool:
        most = {3: 1 << 15, 4: 1 << 7, 5: 1 << 4}.get(rank, 0)
        channels, pixels = self.box
        corners = zip(self.shape[1:], self.lower, self.upper, strict=False)
        return (
            _within((*self.lower, *self.upper), -most, most - 1)
            and all(extent + upper - lower > 0 for extent, lower, upper in corners)
            and channels <= 256
            and pixels <= 1024
        )


def _within(numbers: Sequence[int], least: int, most: int) -> bool:
    return all(least <= number <= most for number in numbers)


@dataclass(frozen=True)
class DeviceLaunch:
    """One launch of a function of a module, by its number.

    `shared_bytes` are of dynamic shared memory.  The slot ("status", 0) is a word that is 0 when a run begins, and
    that a launch sets where a value is out of range.  ("map", i) is the i-th of its `maps`, each of what lies in some
    slot.
    """

    module: int
    function: str
    args: tuple[Slot, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    maps: tuple[tuple[Slot, TensorMap], ...] = ()


@dataclass(frozen=True)
class DeviceCode:
    """Modules (fat binaries) with machine code for GPUs of an architecture, `sm_90`.

    With `portable` they have PTX too, which the driver of a newer GPU compiles for it; else they are for no other.
    """

    arch: str
    modules: tuple[bytes, ...] = field(repr=False)
    portable: bool = False

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability: (9, 0) for `sm_90`, and for `sm_90a`, which has what no later one has."""
        digits = self.arch.removeprefix("sm_").rstrip("a")
        return int(digits[:-1]), int(digits[-1])
