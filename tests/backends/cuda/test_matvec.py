"""Layers of a few rows: every kind of tile on odd shapes, in the types of weights; what is left to others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.codegen import CudaSource, cuda_source
from cnnc.backends.cuda.matvec import MatVec, MatVecParams, matched
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.backends.cuda.templates import TEMPLATES
from cnnc.backends.lower.template import Template, schedule_of
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Cast, Dense
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.source import Input
from cnnc.target import CUDA_ARCHS, Target
from tests.backends.cuda.direct_kernels import check_turns
from tests.backends.cuda.disassembler import instructions, needs_disassembler
from tests.backends.cuda.emulator import Emulator, needs_gxx
from tests.backends.cuda.test_conv_mma import check
from tests.backends.cuda.test_matmul_mma import Case, nothing, relu, residual
from tests.backends.cuda.test_nvcc import needs_nvcc

TARGET = Target.parse("cuda:sm_90")
TEMPLATE = MatVec()
F32, F16, BF16 = DType.F32, DType.F16, DType.BF16

CASES: list[tuple[Case, DType, DType]] = [
    (((1, 2100), (5, 2100), True, relu), F32, F32),
    (((8, 40), (34, 40), False, nothing), F32, F32),
    (((2, 3, 33), (66, 33), True, residual), F32, F32),
    (((6,), (1, 6), True, relu), F32, F32),
    (((3, 1), (9, 1), False, residual), F32, F32),
    (((1, 4400), (3, 4400), True, residual), F16, F16),
    (((5, 12), (21, 12), True, relu), F16, F16),
    (((2, 1, 97), (17, 97), False, nothing), F16, F16),
    (((2, 1600), (40, 1600), True, residual), F32, F16),
    (((1, 520), (33, 520), True, relu), F32, BF16),
    (((4, 264), (7, 264), True, residual), BF16, BF16),
]
"""With the types of x and the weight."""


def kernel(case: Case, x_type: DType, weight_type: DType) -> Fused:
    shape, weight, with_bias, follow = case
    inputs = [call(Input("x", TensorType(shape, x_type))), call(Input("w", TensorType(weight, weight_type)))]
    operands = [value if value.dtype is F32 else call(Cast(F32), value) for value in inputs]
    if with_bias:
        inputs.append(call(Input("b", TensorType(weight[:1]))))
    y = follow(call(Dense(), *operands, *inputs[2:]), inputs)
    return Fused(Graph("kernel", tuple(inputs), (y if x_type is F32 else call(Cast(x_type), y),)), "dense")


def source_of(fused: Fused, tile: MatVecParams, symbol: str, target: Target = TARGET) -> CudaSource:
    assert TEMPLATE.matches(fused, target)
    return cuda_source(TEMPLATE.build(fused, schedule_of(TEMPLATE.name, tile), target), symbol, target)


@needs_gxx
def test_schedules_compute_every_case(tmp_path: Path) -> None:
    check_turns(TEMPLATE, [kernel(*case) for case in CASES], tmp_path)


@needs_gxx
def test_a_missing_barrier_would_show(tmp_path: Path) -> None:
    fused = kernel(*CASES[0])
    source = source_of(fused, MatVecParams(2, 2, 4, 8), "unsafe")
    before, after = source.text.split("__syncthreads();")
    unsafe = replace(source, text=before + after)
    with pytest.raises(AssertionError):
        check(Emulator([unsafe], tmp_path), unsafe, fused, np.random.default_rng(1))


def test_every_case_is_taken() -> None:
    for case in CASES:
        fused = kernel(*case)
        assert TEMPLATE.matches(fused, TARGET)
        assert not TEMPLATE.matches(fused, Target.parse("cpu:x86-64-v3"))
        assert list(TEMPLATE.space(fused, TARGET))


def test_leaves_to_others() -> None:
    """More rows than are read for free, no rows, weights in blocks, sums that are not f32."""
    assert not TEMPLATE.matches(kernel(((9, 16), (4, 16), True, nothing), F32, F32), TARGET)
    assert not TEMPLATE.matches(kernel(((0, 16), (4, 16), True, nothing), F32, F32), TARGET)
    x = call(Input("x", TensorType((1, 8))))
    packed = call(Input("w", TensorType((16, 8), layout=Layout("OI8o"))))
    narrow = [call(Input(name, TensorType(shape, F16))) for name, shape in (("x", (1, 8)), ("w", (16, 8)))]
    for inputs in ([x, packed], narrow):
        fused = Fused(Graph("kernel", tuple(inputs), (call(Dense(), *inputs),)), "dense")
        assert not TEMPLATE.matches(fused, TARGET)


def cheapest(fused: Fused, templates: Sequence[Template], target: Target) -> Schedule:
    """Give what the tile pass would choose."""
    matching = [template for template in templates if template.matches(fused, target)]
    candidates = [(t.cost(fused, s, target), s) for t in matching for s in t.space(fused, target)]
    return min(candidates, key=lambda candidate: candidate[0])[1]


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_large_layers_of_one_row_are_its_own(arch: str) -> None:
    """Few outputs are shared by more warps; with 16 bits, tensor cores read weights as fast, and do more rows."""
    target = Target.parse(f"cuda:{arch}")
    sizes = ((4096, 25088), (4096, 4096), (1000, 4096), (10, 512))
    for dtype in (F32, F16):
        kernels = [kernel(((1, depth), (outputs, depth), True, relu), dtype, dtype) for outputs, depth in sizes]
        schedules = [cheapest(fused, TEMPLATES, target) for fused in kernels]
        names = {TEMPLATE.name} if dtype is F32 else {TEMPLATE.name, "matmul_mma"}
        assert {schedule.template for schedule in schedules} <= names
        own = [cheapest(fused, [TEMPLATE], target) for fused in kernels]
        assert own[0]["splits"] <= own[2]["splits"]
    many = kernel(((8, 25088), (4096, 25088), True, relu), F16, F16)
    assert cheapest(many, TEMPLATES, Target.parse("cuda:sm_80")).template == "matmul_mma"


def test_costs_are_no_less_than_memory_takes() -> None:
    fused = kernel(((1, 25088), (4096, 25088), True, relu), F32, F32)
    found = matched(fused)
    assert found is not None
    assert found.shape.nbytes == 4 * (4096 * 25088 + 25088 + 4096)
    costs = [TEMPLATE.cost(fused, schedule, TARGET) for schedule in TEMPLATE.space(fused, TARGET)]
    assert found.shape.nbytes / 3.35e12 < min(costs) < 1.2 * found.shape.nbytes / 3.35e12


HOT = [
    (((1, 25088), (4096, 25088), True, relu), F32, MatVecParams(4, 2, 2, 8)),
    (((8, 9216), (4096, 9216), True, residual), F16, MatVecParams(4, 1, 8, 8)),
]


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("case", "dtype", "tile"), HOT, ids=["f32", "f16"])
def test_tiles_stay_in_registers(case: Case, dtype: DType, tile: MatVecParams, arch: str) -> None:
    target = Target.parse(f"cuda:{arch}")
    fused = kernel(case, dtype, dtype)
    found = matched(fused)
    assert found is not None
    (usage,) = compile_fatbin(source_of(fused, tile, "hot", target), target).usage
    assert (usage.stack_bytes, usage.spill_bytes) == (0, 0)
    assert usage.registers <= found.shape.registers(tile)


@needs_nvcc
@needs_disassembler
def test_instructions(tmp_path: Path) -> None:
    """All loads are of 16 bytes but that of the bias; sums by shuffles."""
    case, dtype, tile = HOT[0]
    count = instructions(source_of(kernel(case, dtype, dtype), tile, "hot"), TARGET, tmp_path)
    assert count("LDG") == count(r"LDG\.E\.128") + 1 >= 2 * (tile.outputs * tile.unroll + tile.unroll)
    assert count("SHFL") == 5 * tile.outputs
    assert count("LDL") == count("STL") == 0
