"""The template that takes every kernel: launches found from its TE stages (see generic_schedule)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

_BYTES_PER_SECOND = 1e12
"""What a GPU streams."""

_FLOPS_PER_SECOND = 1e12
"""What it computes when every operand comes from memory or a cache."""

_SECONDS_PER_KERNEL = 2e-6


@dataclass(frozen=True)
class Generic:
    """Kernels of every kind; what they read comes from memory each time, so others are to be preferred."""

    name: str = "generic"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take every kernel of a GPU."""
        return target.is_gpu

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the one schedule: it follows from the kernel."""
        return (Schedule(self.name),)

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds from the memory moved and the arithmetic, by whichever takes longer."""
        inputs = [value.type for value in kernel.body.inputs]
        moved = sum(type_.nbytes for type_ in (*inputs, *(value.type for value in kernel.body.outputs)))
        return max(moved / _BYTES_PER_SECOND, kernel.flops(*inputs) / _FLOPS_PER_SECOND) + _SECONDS_PER_KERNEL

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the scheduled PrimFunc over the kernel's inputs, then its outputs."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.generic_schedule import schedule_generic
        from cnnc.backends.lower.kernel import lower_kernel

        lowered = lower_kernel(kernel)
        return lowered.prim_func() if lowered.is_empty else schedule_generic(lowered.prim_func())
