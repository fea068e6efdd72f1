"""Kernels compiled and remembered, with a stand-in for nvcc: what no GPU could launch is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cnnc.backends.cache import DiskCache
from cnnc.backends.cuda.generic import Generic
from cnnc.backends.cuda.index_check import index_check
from cnnc.backends.cuda.kernels import CudaKernel, compile_kernels, compiled, kernel_job
from cnnc.backends.cuda.machine import GPUS
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.errors import VerifyError
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Relu, Softmax
from cnnc.ops.fused import Fused
from cnnc.target import CUDA_ARCHS, Target
from tests.backends.cuda.emulator import needs_gxx
from tests.backends.running import fused_op

pytestmark = [needs_gxx, pytest.mark.usefixtures("emulating_nvcc")]

SM_90 = Target.parse("cuda:sm_90")


def scheduled(fused: Fused) -> Fused:
    return replace(fused, schedule=next(iter(Generic().space(fused, SM_90))))


def test_kernels_are_remembered(tmp_path: Path) -> None:
    fused = scheduled(fused_op(Softmax(1), (TensorType((3, 80)),)))
    jobs = {"rows": kernel_job("rows", fused, SM_90)}
    steps: list[tuple[int, int]] = []
    first, compiled_first = compile_kernels(jobs, SM_90, DiskCache(tmp_path), lambda *step: steps.append(step))
    again, compiled_again = compile_kernels(jobs, SM_90, DiskCache(tmp_path), lambda *step: steps.append(step))
    other, compiled_other = compile_kernels(
        {"rows": kernel_job("rows", fused, Target.parse("cuda:sm_80"))},
        Target.parse("cuda:sm_80"),
        DiskCache(tmp_path),
        lambda *step: None,
    )
    assert (compiled_first, compiled_again, compiled_other) == (1, 0, 1)
    assert first == again
    assert first["rows"].launches == other["rows"].launches
    assert len(first["rows"].launches) > 1
    assert steps == [(0, 1), (1, 1), (1, 1)]


def test_a_launch_without_its_function_is_refused() -> None:
    source = index_check(TensorType((3,), DType.I64), (5,))
    gone = replace(source, launches=(replace(source.launches[0], function="gone"),))
    with pytest.raises(VerifyError, match="nvcc made no gone, only"):
        compile_fatbin(gone, SM_90)


def test_more_shared_memory_than_there_is_is_refused() -> None:
    source = index_check(TensorType((3,), DType.I64), (5,))
    greedy = replace(source, launches=(replace(source.launches[0], shared_bytes=GPUS["sm_86"].most_shared_bytes + 1),))
    with pytest.raises(VerifyError, match="101377 bytes of shared memory are more than cuda:sm_86 has"):
        compile_fatbin(greedy, Target.parse("cuda:sm_86"))
    assert set(GPUS) == set(CUDA_ARCHS)


def test_a_kernel_without_elements_has_no_code() -> None:
    fused = scheduled(fused_op(Relu(), (TensorType((0, 4)),)))
    assert compiled(kernel_job("empty", fused, SM_90).make(), SM_90) == CudaKernel("empty", b"", (), 0, ())
