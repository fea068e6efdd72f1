"""What of a program runs on a GPU: machine code for one architecture, and how it is launched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cnnc.backends.host.program import Slot

MODULE_ALIGNMENT = 64
"""Bytes each module in a binary is aligned to."""


@dataclass(frozen=True)
class DeviceLaunch:
    """One launch of a function of a module, by its number.

    `shared_bytes` are of dynamic shared memory.  The slot ("status", 0) is a word that is 0 when a run begins, and
    that a launch sets where a value is out of range.
    """

    module: int
    function: str
    args: tuple[Slot, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0


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
