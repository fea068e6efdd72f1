"""Pools of windows and of whole images: layouts and types on odd shapes, with epilogues; what is left to others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.generic import Generic
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.backends.cuda.pool import GlobalPool, Pool
from cnnc.ir.build import call
from cnnc.ir.op import Op
from cnnc.ir.types import DType
from cnnc.ops import AveragePool, MaxPool, MinPool, ReduceMax, ReduceMean, ReduceMin, ReduceSum
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
from tests.backends.cuda.test_conv_mma import check
from tests.backends.cuda.test_nvcc import needs_nvcc

WINDOWS, GLOBAL = Pool(), GlobalPool()
F32, F16, BF16 = DType.F32, DType.F16, DType.BF16

architectures = pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])


def kernel(
    op: Op, shape: tuple[int, ...], follow: Follow = nothing, dtype: DType = F32, block: int = 1, *, raw: bool = False
) -> Fused:
    made = Kernel(dtype, block, raw)
    y = call(op, made.image(*shape))
    return made.fused(follow(made, y), op.name)


def windows(kind: type[Op], taps: int, stride: int, pad: int, **fields: object) -> Op:
    return kind((taps,) * 2, (stride,) * 2, (pad,) * 4, (1, 1), **fields)  # type: ignore[call-arg]


def mean(keepdims: bool = True) -> Op:
    return ReduceMean((2, 3), keepdims)


CASES = [
    kernel(windows(MaxPool, 3, 2, 1), (1, 5, 9, 11)),
    kernel(windows(MaxPool, 3, 2, 1), (2, 20, 10, 8), residual, F16, 8),
    kernel(windows(AveragePool, 3, 1, 1), (1, 3, 8, 12), relu),
    kernel(windows(AveragePool, 2, 2, 0), (2, 4, 7, 8), gated, F32, 4),
    kernel(MinPool((2, 3), (3, 2), (1, 1, 0, 1), (1, 2), True), (2, 1, 8, 9), relu),
    kernel(windows(AveragePool, 3, 2, 1, count_include_pad=True), (1, 16, 8, 8), nothing, BF16, 8),
    kernel(windows(MaxPool, 7, 4, 3), (3, 2, 1, 2)),
    kernel(windows(MaxPool, 5, 1, 2), (1, 3, 6, 8), relu, F16, raw=True),
]

IMAGES = [
    kernel(mean(), (2, 20, 7, 7), relu, F16, 8),
    kernel(mean(), (1, 3, 14, 14), gated),
    kernel(mean(keepdims=False), (3, 5, 7, 7)),
    kernel(ReduceMax((2, 3)), (2, 6, 5, 2), nothing, F32, 4),
    kernel(ReduceMin((2, 3)), (1, 9, 1, 1), relu),
    kernel(ReduceSum((2, 3)), (1, 8, 33, 31), nothing, BF16, 8),
    kernel(windows(AveragePool, 9, 1, 0), (2, 3, 9, 9), relu, F16, raw=True),
    kernel(mean(), (1, 2, 40, 50), residual),
]


@needs_gxx
def test_strips_compute_every_case(tmp_path: Path) -> None:
    check_turns(WINDOWS, CASES, tmp_path)


@needs_gxx
def test_threads_share_images(tmp_path: Path) -> None:
    check_turns(GLOBAL, IMAGES, tmp_path)


@needs_gxx
@pytest.mark.parametrize("dtype", [F32, F16])
def test_nan_is_not_lost(dtype: DType, tmp_path: Path) -> None:
    """Wherever in a window it is; CUDA's own maximum gives the operand that is no NaN."""
    ops = [windows(MaxPool, 2, 2, 0), windows(MinPool, 2, 2, 0), ReduceMax((2, 3)), ReduceMin((2, 3))]
    kernels = [kernel(op, (1, 8, 4, 4), nothing, dtype, 16 // dtype.itemsize) for op in ops]
    templates = (WINDOWS, WINDOWS, GLOBAL, GLOBAL)
    jobs = [
        (t, f, source_of(t, f, best(t, f), f"nan{i}")) for i, (t, f) in enumerate(zip(templates, kernels, strict=True))
    ]
    emulator = Emulator([source for _, _, source in jobs], tmp_path)
    for position in range(16):
        x = np.random.default_rng(position).standard_normal((1, 8, 4, 4)).astype(dtype.numpy)
        x.reshape(8, 16)[3, position] = np.nan
        for _, fused, source in jobs:
            (result,) = emulator.run_fused(source, fused, [x])
            (wanted,) = fused.reference(x)
            assert np.array_equal(np.isnan(result), np.isnan(wanted))
            assert np.isnan(result).sum() == 1


@needs_gxx
@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_would_show(barrier: int, tmp_path: Path) -> None:
    fused = kernel(mean(), (1, 3, 32, 32))
    schedule = next(s for s in GLOBAL.space(fused, TARGET) if s["threads"] == 256)
    source = source_of(GLOBAL, fused, schedule, f"unsafe{barrier}")
    before, first, middle, second, after = re.split(r"(__syncthreads\(\);)", source.text)
    kept = (first, "") if barrier else ("", second)
    unsafe = replace(source, text=before + kept[0] + middle + kept[1] + after)
    with pytest.raises(AssertionError):
        check(Emulator([unsafe], tmp_path), unsafe, fused, np.random.default_rng(1))


def test_leaves_to_others() -> None:
    pool = windows(MaxPool, 3, 2, 1)
    assert WINDOWS.matches(kernel(pool, (1, 4, 9, 9)), TARGET)
    assert GLOBAL.matches(kernel(mean(), (1, 4, 9, 9)), TARGET)
    for template, op in ((WINDOWS, pool), (GLOBAL, mean())):
        assert not template.matches(kernel(op, (1, 4, 9, 9)), Target.parse("cpu:x86-64-v3"))
        assert not template.matches(kernel(op, (0, 4, 9, 9)), TARGET)
        assert not template.matches(kernel(op, (1, 4, 9, 9), dtype=DType.F64, raw=True), TARGET)
        assert not template.matches(kernel(op, (1, 4, 9, 9), pooled_again), TARGET)
    assert not WINDOWS.matches(kernel(windows(MaxPool, 8, 1, 0), (1, 4, 9, 9)), TARGET)
    assert not WINDOWS.matches(kernel(pool, (1, 4, 9, 9), dtype=DType.I8, raw=True), TARGET)
    assert not WINDOWS.matches(kernel(mean(), (1, 4, 9, 9)), TARGET)
    assert not GLOBAL.matches(kernel(pool, (1, 4, 9, 9)), TARGET)
    assert not GLOBAL.matches(kernel(windows(AveragePool, 3, 1, 1), (1, 4, 3, 3)), TARGET)
    assert not GLOBAL.matches(kernel(ReduceMean((1, 3)), (1, 4, 9, 9)), TARGET)


def pooled_again(made: Kernel, y: object) -> object:
    return call(ReduceMean((0, 1)), y)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "block"), [(F32, 1), (F16, 8)])
def test_is_cheaper_than_a_thread_an_element(dtype: DType, block: int) -> None:
    cases = [
        (WINDOWS, kernel(windows(MaxPool, 3, 2, 1), (8, 64, 112, 112), nothing, dtype, block)),
        (GLOBAL, kernel(mean(), (8, 2048, 7, 7), nothing, dtype, block)),
        (GLOBAL, kernel(mean(), (1, 96, 56, 56), nothing, dtype, block)),
    ]
    for template, fused in cases:
        (only,) = Generic().space(fused, TARGET)
        assert template.cost(fused, best(template, fused), TARGET) < Generic().cost(fused, only, TARGET)


def test_large_images_get_more_threads() -> None:
    small, large = (best(GLOBAL, kernel(mean(), (1, 256, size, size), nothing, F16, 8)) for size in (7, 56))
    assert small["threads"] < large["threads"]


@needs_nvcc
@architectures
def test_stays_in_registers(arch: str) -> None:
    target = Target.parse(f"cuda:{arch}")
    check_registers(WINDOWS, kernel(windows(MaxPool, 3, 2, 1), (1, 64, 56, 56), residual, F16, 8), target, 96)
    fused = kernel(mean(), (1, 64, 56, 56), relu)
    for schedule in (best(GLOBAL, fused), list(GLOBAL.space(fused, target))[-1]):
        source = source_of(GLOBAL, fused, schedule, "hot", target)
        (usage,) = compile_fatbin(source, target).usage
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0)


@needs_nvcc
@needs_disassembler
@architectures
def test_loads_vectors(arch: str, tmp_path: Path) -> None:
    target = Target.parse(f"cuda:{arch}")
    fused = kernel(windows(MaxPool, 3, 2, 1), (1, 64, 56, 56), nothing, F16, 8)
    schedule = next(s for s in WINDOWS.space(fused, target) if s["rows"] == 2)
    count = instructions(source_of(WINDOWS, fused, schedule, "hot", target), target, tmp_path)
    assert count(r"LDG\.E\.64") == count("LDG") == 5 * 3
    assert count(r"STG\.E\.64") == count("STG") == 2
    fused = kernel(mean(), (1, 64, 56, 56))
    count = instructions(source_of(GLOBAL, fused, best(GLOBAL, fused), "hot", target), target, tmp_path)
    assert count(r"LDG\.E\.128") == count("LDG") > 0
