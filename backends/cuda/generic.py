"""The template that takes every kernel: launches found from its TE stages (see generic_schedule)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cnnc.backends.cuda.machine import GPUS, SECONDS_PER_LAUNCH
from cnnc.ir.op import Kind
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

_SHARE_OF_BANDWIDTH = 0.5
"""What threads with a number each to read get of a GPU's memory."""

_FLOPS_PER_SECOND = 1e12
"""What it computes when every operand comes from memory or a cache."""

_REDUCTIONS = {"attention": 4, "softmax": 2, "log_softmax": 2, "layer_norm": 2}
"""Stages that reduce, of operators that have several."""


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
        """Estimate seconds from the memory moved and the arithmetic, by whichever takes longer.

        A stage that reduces is taken to have a launch of its own.
        """
        inputs = [value.type for value in kernel.body.inputs]
        moved = sum(type_.nbytes for type_ in (*inputs, *(value.type for value in kernel.body.outputs)))
        reducing = [node.op.name for node in kernel.body.nodes if node.op.kind is Kind.REDUCTION]
        stages = sum(_REDUCTIONS.get(name, 1) for name in reducing)
        bandwidth = _SHARE_OF_BANDWIDTH * GPUS[target.arch].bandwidth
        seconds = max(moved / bandwidth, kernel.flops(*inputs) / _FLOPS_PER_SECOND)
        return seconds + SECONDS_PER_LAUNCH * (1 + stages)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the scheduled PrimFunc over the kernel's inputs, then its outputs."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.generic_schedule import schedule_generic
        from cnnc.backends.lower.kernel import lower_kernel

        lowered = lower_kernel(kernel)
        return lowered.prim_func() if lowered.is_empty else schedule_generic(lowered.prim_func())
