"""The search for schedules: what may replace the default."""

from __future__ import annotations

import numpy as np
import pytest

import cnnc
from cnnc.backends.cpu.templates import template
from cnnc.backends.lower.build import fused_nodes, fused_of
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.module import KernelTiming
from cnnc.ops import Conv, Relu, constant, graph_input
from cnnc.profiler.tune import _divides_as_well, tunable_kernels
from cnnc.target import Target


@pytest.mark.parametrize(
    ("slices", "default", "allowed"),
    [
        (1, 4, False),  # nothing for a second thread
        (3, 4, False),
        (9, 64, False),  # 16 of 9 with 8 threads
        (15, 64, True),
        (57, 64, True),
        (4, 4, True),
        (1, 1, True),
        (5, 1, True),
    ],
)
def test_candidates_must_divide_among_threads_as_well_as_the_default(slices: int, default: int, allowed: bool):
    assert _divides_as_well(slices, default) is allowed


@pytest.mark.parametrize(
    ("target", "weights"),
    [("cpu:x86-64-v3", "f32"), ("cpu:x86-64-v4", "f16"), ("cpu:sapphirerapids", "f32"), ("cpu:sapphirerapids", "bf16")],
)
def test_every_kernel_with_a_choice_is_tuned(rng: np.random.Generator, target: str, weights: str):
    build = cnnc.compile(_small_network(rng), target=target, weights=weights).build
    assert build is not None
    kernels = [fused_of(node) for node in fused_nodes(build.graphs[0])]
    timings = [KernelTiming(i, f"k{i}", (), "", "", 0, 0, 1.0) for i in range(len(kernels))]
    cpu = Target.parse(target)
    choices = {kernel.body for kernel in kernels if len({*template(kernel.schedule.template).space(kernel, cpu)}) > 1}
    assert len(choices) >= 5
    assert {kernel.kernel.body for kernel in tunable_kernels(build, timings, cpu)} == choices


def _small_network(rng: np.random.Generator) -> Graph:
    """Make convolutions for which every algorithm is the best of some target."""
    x = graph_input("x", (1, 3, 56, 56))
    shapes = [(64, 3, 7), (256, 64, 1), (64, 256, 1), (64, 64, 3), (256, 64, 3), (256, 256, 3)]
    return Graph("net", (x,), (_convolved(rng, x, shapes),))


def _convolved(rng: np.random.Generator, x: Value, shapes: list[tuple[int, int, int]]) -> Value:
    for outputs, inputs, size in shapes:
        w = rng.standard_normal((outputs, inputs, size, size)).astype(np.float32)
        pad = (size // 2,) * 4
        x = call(Relu(), call(Conv((1, 1), pad, (1, 1)), x, constant(w)))
    return x
