"""The template that takes every kernel: loop nests found from its TE stages (see generic_schedule)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

_BYTES_PER_SECOND = 8e9
"""What one core streams."""

_FLOPS_PER_SECOND = 1e9
"""What one core computes with no tile in registers; high where memory is the limit, low beside a template's."""

_SECONDS_PER_KERNEL = 1e-6


@dataclass(frozen=True)
class Generic:
    """Elementwise, injective, reduction and opaque kernels, and anything no other template takes."""

    name: str = "generic"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take every kernel of a CPU."""
        return target.kind == "cpu"

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the one schedule: it follows from the kernel."""
        return (Schedule(self.name),)

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds from the memory moved and the arithmetic, by whichever takes longer."""
        inputs = [value.type for value in kernel.body.inputs]
        moved = sum(type_.nbytes for type_ in (*inputs, *(value.type for value in kernel.body.outputs)))
        seconds = max(moved / _BYTES_PER_SECOND, kernel.flops(*inputs) / _FLOPS_PER_SECOND)
        return seconds / target.threads + _SECONDS_PER_KERNEL

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the scheduled PrimFunc over the kernel's inputs, then its outputs."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cpu.generic_schedule import schedule_generic
        from cnnc.backends.lower.kernel import lower_kernel

        lowered = lower_kernel(kernel)
        return lowered.prim_func() if lowered.is_empty else schedule_generic(lowered.prim_func(), target.vector_lanes)
