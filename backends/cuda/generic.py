"""The template that takes every kernel: launches found from its TE stages (see generic_schedule)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cnnc.backends.cuda.machine import GPUS, LATENCY, SECONDS_PER_LAUNCH
from cnnc.ir.graph import Node
from cnnc.ir.op import Kind
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

THREADS = 256
"""Threads of a block, at most."""

MANY_OUTPUTS = 1 << 16
"""Outputs from which a thread for each fills a GPU."""

LONG_SUM = 64
"""Terms from which a sum is worth a block of threads."""

_STREAMED = 0.5
"""The part of its bandwidth at which a GPU streams."""

_COMPUTED = 0.05
"""The part of its peak at which it computes when every operand comes from memory or a cache."""

_IN_FLIGHT = 8
"""Loads that a thread has under way at once."""

_SHARING = 400
"""Operations' worth of time that a block takes to add up what its threads found."""

_REDUCTIONS = {"attention": 4, "softmax": 2, "log_softmax": 2, "layer_norm": 2, "rms_norm": 1}
"""Stages that reduce, each in a launch of its own, of operators that go on with what they find."""


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
        """Estimate seconds from the memory moved, the arithmetic and the latency, by whichever takes longest."""
        inputs = [value.type for value in kernel.body.inputs]
        moved = sum(type_.nbytes for type_ in (*inputs, *(value.type for value in kernel.body.outputs)))
        reducing = [node for node in kernel.body.nodes if node.op.kind is Kind.REDUCTION]
        sums = [_terms(node) for node in reducing]
        long = [terms >= LONG_SUM and outputs < MANY_OUTPUTS for terms, outputs in sums]
        # What follows the sums of blocks of threads is a launch of its own.
        stages = (_REDUCTIONS.get(node.op.name, int(is_long)) for node, is_long in zip(reducing, long, strict=True))
        launches = 1 + sum(stages)
        chain = sum(terms / (THREADS if is_long else 1) for (terms, _), is_long in zip(sums, long, strict=True))
        latency = LATENCY * (1 + chain / _IN_FLIGHT)
        gpu = GPUS[target.arch]
        shared = sum(_SHARING * outputs for (_, outputs), is_long in zip(sums, long, strict=True) if is_long)
        arithmetic = (shared + sum(map(_operations, kernel.body.nodes))) / (_COMPUTED * gpu.flops)
        memory = moved / (_STREAMED * gpu.bandwidth)
        return max(memory, arithmetic, latency) + launches * SECONDS_PER_LAUNCH

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the scheduled PrimFunc over the kernel's inputs, then its outputs."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.generic_schedule import schedule_generic
        from cnnc.backends.lower.kernel import lower_kernel

        lowered = lower_kernel(kernel)
        return lowered.prim_func() if lowered.is_empty else schedule_generic(lowered.prim_func())


def _flops(node: Node) -> int:
    return node.op.flops(*(value.type for value in node.inputs))


def _operations(node: Node) -> int:
    """Count operations; one that reduces a number by itself costs what a product and its sum do: to read it."""
    return _flops(node) * (2 if node.op.kind is Kind.REDUCTION and len(node.inputs) == 1 else 1)


def _terms(node: Node) -> tuple[float, int]:
    """Give the numbers that an output of a reduction is made from, and how many outputs there are."""
    outputs = sum(type_.elements for type_ in node.types)
    return _operations(node) / 2 / max(outputs, 1), outputs
