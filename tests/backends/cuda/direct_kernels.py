"""Kernels for the templates that compute in registers: images of any layout and type, with what follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cnnc.backends.cuda.codegen import CudaSource, cuda_source
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.backends.lower.template import Template
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Add, Cast, Mul, Relu, Sigmoid
from cnnc.ops.blocked import channel_layout
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.source import Input
from cnnc.target import Target
from tests.backends.cuda.emulator import Emulator
from tests.backends.cuda.test_conv_mma import check

TARGET = Target.parse("cuda:sm_80")


class Kernel:
    """A kernel in the making: its inputs; `dtype` is what images are stored in, `block` the channels that lie together.

    What is stored in 16 bits is widened before it is used, as `narrow_activations` has it, unless `raw`.
    """

    def __init__(self, dtype: DType = DType.F32, block: int = 1, raw: bool = False) -> None:
        self.dtype, self.block, self.raw = dtype, block, raw
        self.inputs: list[Value] = []

    def input(self, shape: Sequence[int], dtype: DType | None = None, layout: Layout | None = None) -> Value:
        """Declare an input; gives what computes with it."""
        stored = dtype or (self.dtype if self.raw else DType.F32)
        value = call(Input(f"x{len(self.inputs)}", TensorType(tuple(shape), stored, layout)))
        self.inputs.append(value)
        wide = self.raw or value.dtype is DType.F32
        return value if wide else call(Cast(DType.F32), value)

    def image(self, *shape: int) -> Value:
        return self.input(shape, self.dtype, channel_layout(4, self.block))

    def fused(self, y: Value, anchor: str, out: DType | None = None) -> Fused:
        out = out or self.dtype
        y = y if y.dtype is out else call(Cast(out), y)
        return Fused(Graph("kernel", tuple(self.inputs), (y,)), anchor)


Follow = Callable[[Kernel, Value], Value]


def nothing(made: Kernel, y: Value) -> Value:
    return y


def relu(made: Kernel, y: Value) -> Value:
    return call(Relu(), y)


def residual(made: Kernel, y: Value) -> Value:
    """A scale for each channel, and an image of the same shape."""
    y = call(Mul(), y, made.image(1, y.type.static_shape[1], 1, 1))
    return call(Relu(), call(Add(), y, made.image(*y.type.static_shape)))


def gated(made: Kernel, y: Value) -> Value:
    """What every image has for each channel; the result is used twice."""
    gate = made.image(*y.type.static_shape[:2], 1, 1)
    return call(Mul(), call(Mul(), y, call(Sigmoid(), y)), gate)


def source_of(template: Template, fused: Fused, schedule: Schedule, symbol: str, target: Target = TARGET) -> CudaSource:
    assert template.matches(fused, target)
    return cuda_source(template.build(fused, schedule, target), symbol, target)


def check_turns(template: Template, kernels: Sequence[Fused], folder: Path, turns: int = 2) -> None:
    """Hold kernels against the interpreter; schedules take turns, so that each kernel meets several and each some."""
    jobs = []
    for number, fused in enumerate(kernels):
        assert template.matches(fused, TARGET), number
        schedules = list(template.space(fused, TARGET))
        for turn in range(min(turns, len(schedules))):
            schedule = schedules[(number + turn * -(-len(schedules) // turns)) % len(schedules)]
            jobs.append((fused, source_of(template, fused, schedule, f"{template.name}{number}_{turn}")))
    emulator = Emulator([source for _, source in jobs], folder)
    rng = np.random.default_rng(len(jobs))
    for fused, source in jobs:
        check(emulator, source, fused, rng)
        assert len(source.launches) == 1
        assert source.scratch_bytes == 0


def check_registers(template: Template, fused: Fused, target: Target, most: int) -> None:
    """Compile every schedule: nothing may be on a thread's stack."""
    for schedule in template.space(fused, target):
        source = source_of(template, fused, schedule, "hot", target)
        for usage in compile_fatbin(source, target).usage:
            assert (usage.stack_bytes, usage.spill_bytes) == (0, 0), schedule
            assert usage.registers <= most, schedule


def best(template: Template, fused: Fused, target: Target = TARGET) -> Schedule:
    return min(template.space(fused, target), key=lambda schedule: template.cost(fused, schedule, target))
