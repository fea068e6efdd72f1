"""Convolutions of few channels: every layout and type on odd shapes, with epilogues; what is left to others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.conv_first import ConvFirst, FirstParams, matched, shared_numbers
from cnnc.backends.cuda.conv_gemm import ConvGemm
from cnnc.backends.cuda.generic import Generic
from cnnc.backends.cuda.machine import GPUS
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.build import call
from cnnc.ir.types import DType
from cnnc.ops import Conv, RoundTf32
from cnnc.ops.blocked import channel_layout, weight_layout
from cnnc.ops.fused import Fused
from cnnc.target import Target
from tests.backends.cuda.direct_kernels import (
    TARGET,
    Follow,
    Kernel,
    best,
    check_registers,
    check_turns,
    gated,
    nothing,
    relu,
    residual,
    source_of,
)
from tests.backends.cuda.disassembler import instructions, needs_disassembler
from tests.backends.cuda.emulator import Emulator, needs_gxx
from tests.backends.cuda.test_conv_gemm import Case
from tests.backends.cuda.test_conv_mma import check
from tests.backends.cuda.test_nvcc import needs_nvcc

TEMPLATE = ConvFirst()
F32, F16, BF16 = DType.F32, DType.F16, DType.BF16

architectures = pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])


def kernel(
    case: Case, follow: Follow, dtype: DType = F32, block: int = 1, *, image: DType = F32, tf32: bool = False
) -> Fused:
    """Make a kernel of a plain image, stored as `image`; weight and result are stored as `dtype`, in blocks."""
    made = Kernel(dtype, block)
    x = made.input(case.x, image)
    w = made.input(case.w, dtype, weight_layout(4, 1, block) if block > 1 else None)
    x, w = (call(RoundTf32(), value) if tf32 else value for value in (x, w))
    bias = [made.input(case.w[:1])] if case.bias else []
    y = call(Conv(case.stride, case.pad, case.dilation, case.groups), x, w, *bias)
    return made.fused(follow(made, y), "conv")


def square(size: int, outputs: int, taps: int, stride: int, images: int = 1) -> Case:
    pad = 0 if taps == stride else taps // 2
    return Case((images, 3, size, size), (outputs, 3, taps, taps), (stride,) * 2, (pad,) * 4, bias=True)


CASES = [
    kernel(square(23, 16, 7, 2), relu),
    kernel(square(23, 20, 3, 2, images=2), residual, F16, 8),
    kernel(Case((1, 1, 9, 40), (5, 1, 3, 3), pad=(1, 1, 1, 1), bias=True), gated),
    kernel(square(32, 24, 16, 16), relu, BF16, 8),
    kernel(Case((2, 4, 12, 12), (9, 4, 3, 3), pad=(2, 2, 2, 2), dilation=(2, 2)), residual, F32, 4, tf32=True),
    kernel(Case((1, 2, 11, 9), (3, 2, 2, 3), stride=(3, 4), pad=(1, 0, 0, 3), bias=True), relu, F16, image=F16),
    kernel(Case((3, 1, 2, 1), (1, 1, 1, 1), bias=True), nothing),
    kernel(square(30, 33, 5, 3), residual, BF16, 8, image=BF16),
    kernel(Case((1, 3, 20, 18), (40, 3, 3, 3), stride=(1, 1), pad=(1, 1, 1, 1)), gated, F16, 8),
    kernel(Case((2, 3, 19, 17), (12, 3, 11, 11), stride=(4, 4), pad=(2, 2, 2, 2)), relu, F32, 4),
    kernel(Case((1, 2, 8, 8), (8, 2, 3, 2), stride=(1, 2), pad=(3, 0, 3, 1), dilation=(3, 1)), nothing),
]


@needs_gxx
def test_tiles_compute_every_case(tmp_path: Path) -> None:
    check_turns(TEMPLATE, CASES, tmp_path, turns=3)


@needs_gxx
@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_would_show(barrier: int, tmp_path: Path) -> None:
    """The emulation finds what these kernels could get wrong: either of their barriers is needed."""
    fused = kernel(square(32, 16, 4, 2), nothing)
    tile = FirstParams(channels=8, rows=1, width=8, warps=2, taps=1)
    source = source_of(TEMPLATE, fused, schedule_of(TEMPLATE.name, tile), f"unsafe{barrier}")
    before, first, middle, second, after = re.split(r"(__syncthreads\(\);)", source.text)
    kept = (first, "") if barrier else ("", second)
    unsafe = replace(source, text=before + kept[0] + middle + kept[1] + after)
    with pytest.raises(AssertionError):
        check(Emulator([unsafe], tmp_path), unsafe, fused, np.random.default_rng(1))


def test_leaves_to_others() -> None:
    case = square(32, 16, 3, 2)
    assert TEMPLATE.matches(kernel(case, nothing), TARGET)
    assert not TEMPLATE.matches(kernel(case, nothing), Target.parse("cpu:x86-64-v3"))
    assert not TEMPLATE.matches(kernel(case, nothing, DType.F64, image=DType.F64), TARGET)
    assert not TEMPLATE.matches(kernel(replace(case, x=(0, 3, 32, 32)), nothing), TARGET)
    assert not TEMPLATE.matches(kernel(replace(case, x=(40000, 3, 4, 4)), nothing), TARGET), "no such grid"
    assert not TEMPLATE.matches(kernel(replace(case, x=(1, 5, 32, 32), w=(16, 5, 3, 3)), nothing), TARGET)
    assert not TEMPLATE.matches(kernel(replace(case, w=(16, 3, 3, 17), pad=(0, 1, 0, 1)), nothing), TARGET)
    assert not TEMPLATE.matches(kernel(replace(case, x=(1, 4, 32, 32), w=(16, 2, 3, 3), groups=2), nothing), TARGET)
    made = Kernel(F16, 8)
    x = made.input((1, 8, 32, 32), F16, channel_layout(4, 8))
    w = made.input((16, 8, 1, 1), F16, weight_layout(4, 8, 8))
    assert not TEMPLATE.matches(made.fused(call(Conv((1, 1), (0,) * 4, (1, 1)), x, w), "conv"), TARGET)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
def test_candidates_fit_and_the_best_is_cheaper_than_others(arch: str) -> None:
    target = Target.parse(f"cuda:{arch}")
    for case in (square(224, 32, 3, 2), square(224, 64, 7, 2), square(224, 64, 7, 2, images=16)):
        fused = kernel(case, relu)
        cost = TEMPLATE.cost(fused, best(TEMPLATE, fused, target), target)
        for other in (ConvGemm(), Generic()):
            assert cost < other.cost(fused, best(other, fused, target), target)
    for fused in (*CASES, kernel(square(224, 96, 11, 4), relu)):
        found = matched(fused)
        assert found is not None
        tiles = [params_of(FirstParams, schedule) for schedule in TEMPLATE.space(fused, target)]
        assert tiles
        assert max(4 * shared_numbers(found, tile) for tile in tiles) <= GPUS[arch].most_shared_bytes


@needs_nvcc
@architectures
def test_tiles_stay_in_registers(arch: str) -> None:
    target = Target.parse(f"cuda:{arch}")
    check_registers(Widest(), kernel(square(224, 64, 7, 2), residual), target, 128)


class Widest(ConvFirst):
    """The template, of whose tiles those with the most sums are looked at."""

    def space(self, kernel: Fused, target: Target) -> list:
        found = [s for s in super().space(kernel, target) if (s["warps"], s["width"]) == (4, 16)]
        return [s for s in found if s["channels"] * s["rows"] == 32]


@needs_nvcc
@needs_disassembler
@architectures
def test_loads_vectors(arch: str, tmp_path: Path) -> None:
    """Weights come four at a time for all lanes, a pixel serves all channels of a thread, and vectors are stored."""
    target = Target.parse(f"cuda:{arch}")
    tile = FirstParams(channels=8, rows=4, width=16, warps=4, taps=3)
    fused = kernel(square(224, 32, 3, 2), relu, F16, 8)
    source = source_of(TEMPLATE, fused, schedule_of(TEMPLATE.name, tile), "hot", target)
    found = matched(fused)
    assert found is not None
    assert source.launches[0].shared_bytes == 4 * shared_numbers(found, tile)
    count = instructions(source, target, tmp_path)
    products = count("FFMA")
    assert products % (8 * 4 * 3) == 0
    assert count(r"LDS\.128") == products // 32 * 2
    assert count(r"LDS") - count(r"LDS\.128") == products // 32 * 4
    assert count(r"STG\.E\.64") == count("STG") == 8
    assert count("LDL") == count("STL") == 0
