"""Depthwise convolutions in strips: layouts and types on odd shapes, with epilogues; what is left to others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cnnc.backends.cuda.conv_gemm import ConvGemm
from cnnc.backends.cuda.depthwise import Depthwise
from cnnc.backends.cuda.generic import Generic
from cnnc.ir.build import call
from cnnc.ir.types import DType
from cnnc.ops import Conv
from cnnc.ops.blocked import tile_layout, weight_layout
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
from tests.backends.cuda.emulator import needs_gxx
from tests.backends.cuda.test_conv_gemm import Case
from tests.backends.cuda.test_nvcc import needs_nvcc

TEMPLATE = Depthwise()
F32, F16, BF16 = DType.F32, DType.F16, DType.BF16

architectures = pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])


def kernel(case: Case, follow: Follow, dtype: DType = F32, block: int = 1, *, raw: bool = False) -> Fused:
    """Make a kernel; `groups` of the case are its channels where it does not say."""
    made = Kernel(dtype, block, raw)
    groups = case.x[1] if case.groups == 1 else case.groups
    w = made.input(case.w, dtype, weight_layout(4, 1, block) if block > 1 else None)
    x = made.image(*case.x)
    bias = [made.input(case.w[:1])] if case.bias else []
    y = call(Conv(case.stride, case.pad, case.dilation, groups), x, w, *bias)
    return made.fused(follow(made, y), "conv")


def square(channels: int, size: int, taps: int, images: int = 1, stride: int = 1) -> Case:
    shape = (images, channels, size, size), (channels, 1, taps, taps)
    return Case(*shape, stride=(stride,) * 2, pad=(taps // 2,) * 4, bias=True)


CASES = [
    kernel(Case((1, 5, 9, 11), (5, 1, 3, 3), pad=(1, 1, 1, 1), bias=True), relu),
    kernel(Case((2, 12, 10, 8), (12, 1, 3, 3), stride=(2, 2), pad=(0, 1, 2, 0)), residual, F16, 8),
    kernel(Case((2, 4, 12, 12), (4, 1, 5, 5), pad=(4, 4, 4, 4), dilation=(2, 2), bias=True), gated, BF16, 8),
    kernel(Case((1, 3, 23, 20), (3, 1, 7, 7), stride=(2, 2), pad=(3, 3, 3, 3)), residual),
    kernel(Case((3, 1, 2, 1), (1, 1, 1, 1), bias=True), nothing),
    kernel(Case((1, 8, 16, 16), (8, 1, 3, 3), pad=(1, 1, 1, 1), bias=True), gated, F32, 4),
    kernel(Case((2, 3, 9, 17), (3, 1, 2, 3), stride=(3, 4), pad=(1, 0, 0, 3)), relu),
    kernel(Case((1, 6, 12, 8), (6, 1, 3, 3), pad=(1, 1, 1, 1), bias=True), relu, F16, raw=True),
    kernel(Case((2, 16, 7, 7), (16, 1, 7, 7), pad=(3, 3, 3, 3), bias=True), residual, F16, 8),
    kernel(Case((1, 2, 5, 12), (2, 1, 1, 5), pad=(0, 4, 0, 4), dilation=(1, 2), bias=True), gated),
    kernel(Case((1, 10, 3, 3), (10, 1, 3, 3), pad=(3, 3, 3, 3)), nothing, F16, 8),
    kernel(Case((1, 3, 16, 16), (3, 1, 5, 5), stride=(2, 2), pad=(2, 2, 2, 2), bias=True), relu, BF16),
]


@needs_gxx
def test_strips_compute_every_case(tmp_path: Path) -> None:
    check_turns(TEMPLATE, CASES, tmp_path)


def test_leaves_to_others() -> None:
    case = Case((1, 16, 9, 9), (16, 1, 3, 3))
    assert TEMPLATE.matches(kernel(case, nothing), TARGET)
    assert not TEMPLATE.matches(kernel(case, nothing), Target.parse("cpu:x86-64-v3"))
    assert not TEMPLATE.matches(kernel(case, nothing, DType.F64, raw=True), TARGET)
    assert not TEMPLATE.matches(kernel(replace(case, x=(0, 16, 9, 9)), nothing), TARGET)
    assert not TEMPLATE.matches(kernel(replace(case, w=(16, 1, 8, 3)), nothing), TARGET)
    assert not TEMPLATE.matches(kernel(replace(case, w=(32, 1, 3, 3)), nothing), TARGET), "two of each channel"
    assert not TEMPLATE.matches(kernel(replace(case, w=(16, 2, 3, 3), groups=8), nothing), TARGET)
    made = Kernel(F16, 8)
    w = made.input((16, 16, 1, 1), F16, tile_layout(4, 8))
    dense = made.fused(call(Conv((1, 1), (0,) * 4, (1, 1)), made.image(1, 16, 9, 9), w), "conv")
    assert not TEMPLATE.matches(dense, TARGET)


@pytest.mark.parametrize(("dtype", "block"), [(F32, 1), (F32, 4), (F16, 8), (BF16, 8)])
def test_is_cheaper_than_a_thread_an_element(dtype: DType, block: int) -> None:
    for case in (square(96, 112, 3, stride=2), square(240, 28, 5, images=8), square(960, 7, 3)):
        fused = kernel(case, relu, dtype, block)
        (only,) = Generic().space(fused, TARGET)
        cost = TEMPLATE.cost(fused, best(TEMPLATE, fused), TARGET)
        assert cost < Generic().cost(fused, only, TARGET)
        assert not ConvGemm().matches(fused, TARGET)


def test_large_images_get_higher_strips() -> None:
    small = best(TEMPLATE, kernel(square(64, 7, 3), nothing, F16, 8))
    large = best(TEMPLATE, kernel(square(64, 112, 3, images=16), nothing, F16, 8))
    assert small["rows"] < large["rows"]
    assert best(TEMPLATE, kernel(square(64, 112, 3, images=16), nothing))["columns"] == 4


@needs_nvcc
@architectures
@pytest.mark.parametrize(("dtype", "block"), [(F32, 1), (F16, 8)])
def test_strips_stay_in_registers(arch: str, dtype: DType, block: int) -> None:
    target = Target.parse(f"cuda:{arch}")
    check_registers(TEMPLATE, kernel(square(48, 28, 7), residual, dtype, block), target, 128)


@needs_nvcc
@needs_disassembler
@architectures
def test_loads_vectors(arch: str, tmp_path: Path) -> None:
    """Four numbers at a time, each once for all rows that need it: also what is stored."""
    target = Target.parse(f"cuda:{arch}")
    schedule = next(s for s in TEMPLATE.space(CASES[1], target) if s["rows"] == 4)
    halves = kernel(square(96, 56, 3), relu, F16, 8)
    count = instructions(source_of(TEMPLATE, halves, schedule, "hot", target), target, tmp_path)
    assert count(r"LDG\.E\.64") == 6 * 3 + 9
    assert count("LDG") == count(r"LDG\.E\.64") + count(r"LDG\.E\.128") == 6 * 3 + 9 + 1
    assert count(r"STG\.E\.64") == count("STG") == 4
    floats = kernel(square(96, 56, 3), relu, F32, 4)
    count = instructions(source_of(TEMPLATE, floats, schedule, "hot", target), target, tmp_path)
    assert count(r"LDG\.E\.128") == count("LDG") == 6 * 3 + 9 + 1
    assert count(r"STG\.E\.128") == count("STG") == 4
    assert count("LDL") == count("STL") == 0
