"""Timing candidates of a kernel: only those that give the default's numbers count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.layout import Layout
from cnnc.ir.op import Op
from cnnc.ir.types import TensorType
from cnnc.ops import Conv, Neg, Relu
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.source import Input
from cnnc.profiler.candidates import priced
from cnnc.profiler.kernel_bench import Candidate, KernelBench, Setting
from cnnc.target import Target

TARGET = Target.parse("cpu")
LANES = TARGET.vector_lanes


def kernel(after: Op, channels: int = 5) -> Fused:
    """Make a convolution from 3 to `channels` channels, which leave lanes of padding, and what follows it."""
    blocks = Layout(f"NCHW{LANES}c"), Layout(f"OIHW{LANES}i{LANES}o")
    x = call(Input("x", TensorType((1, 3, 9, 7), layout=blocks[0])))
    w = call(Input("w", TensorType((channels, 3, 3, 3), layout=blocks[1])))
    y = call(after, call(Conv((1, 1), (1, 1, 1, 1), (1, 1)), x, w))
    return Fused(Graph("kernel", (x, w), (y,)), "conv")


def bench(after: Op, threads: int = 1) -> KernelBench:
    return KernelBench(kernel(after), TARGET.with_threads(threads), Setting((1,), (0,), 1 << 16), seed=7)


def schedules(count: int) -> list[Schedule]:
    found = [p.schedule for p in priced(kernel(Relu()), TARGET)]
    return [s for s in found if s.template == "conv_direct"][:count]


@pytest.mark.parametrize("threads", [1, 2])
def test_candidates_that_agree_are_timed_beside_the_default(threads: int):
    subject = bench(Relu(), threads)
    candidates, faults = subject.compile(schedules(4))
    measured = subject.measure(candidates, rounds=3, budget=1.0)
    assert not faults
    assert not measured.faults
    assert [t.candidate.schedule for t in measured.timings] == schedules(4)
    assert measured.timings[0].ratio == 1.0
    assert all(0 < t.seconds < 1 for t in measured.timings)


def test_a_candidate_with_other_numbers_is_a_fault():
    default, other = schedules(2)
    right, wrong = bench(Relu()), bench(Neg())
    candidates = [right.compile([default])[0][0], wrong.compile([other])[0][0]]
    measured = right.measure(candidates, rounds=1, budget=1.0)
    assert [t.candidate.schedule for t in measured.timings] == [default]
    assert "other numbers" in measured.faults[other]


def test_a_candidate_that_leaves_output_unwritten_is_a_fault():
    default, other = sorted(schedules(50), key=lambda s: s["rows"])[:2]
    subject = bench(Relu())
    first, second = subject.compile([default, other])[0]
    assert second.code.slices > 1
    lazy = Candidate(other, replace(second.code, slices=1))
    assert other in subject.measure([first, lazy], rounds=1, budget=1.0).faults


def test_a_candidate_that_does_not_compile_leaves_the_others():
    (good,) = schedules(1)
    bad = Schedule("conv_direct", tuple((name, 0 if name == "vectors" else value) for name, value in good.params))
    candidates, faults = bench(Relu()).compile([bad, good])
    assert [c.schedule for c in candidates] == [good]
    assert "does not compile" in faults[bad]


def test_activations_and_weights_differ_from_seed_to_seed():
    one, other = (KernelBench(kernel(Relu()), TARGET, Setting((1,), (0,), 0), seed=seed) for seed in (1, 2))
    assert not np.array_equal(one._arrays[0], other._arrays[0])
    assert not np.array_equal(one._arrays[1], other._arrays[1])
