"""Softmax and norms in one kernel: lengths around the tiles, several axes, narrow types, what is left to others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.codegen import CudaSource, cuda_source
from cnnc.backends.cuda.generic import Generic
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.backends.cuda.rows import TILES, RowParams, Rows
from cnnc.backends.cuda.templates import TEMPLATES
from cnnc.backends.lower.template import schedule_of
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.op import Op
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Cast, LayerNorm, Mul, RmsNorm, Sigmoid, Softmax
from cnnc.ops.fused import Fused
from cnnc.ops.softmax import LogSoftmax
from cnnc.ops.source import Input, constant
from cnnc.target import CUDA_ARCHS, Target
from tests.backends.cuda.direct_kernels import check_turns
from tests.backends.cuda.disassembler import instructions, needs_disassembler
from tests.backends.cuda.emulator import Emulator, needs_gxx
from tests.backends.cuda.test_conv_mma import check
from tests.backends.cuda.test_generic import ORDERS
from tests.backends.cuda.test_matvec import cheapest
from tests.backends.cuda.test_nvcc import needs_nvcc

TARGET = Target.parse("cuda:sm_90")
TEMPLATE = Rows()
F32, F16, BF16 = DType.F32, DType.F16, DType.BF16

Case = tuple[Op, tuple[int, ...], int, DType]
"""The operator, x's shape, how many vectors of its last axes it takes beside x, and the type all is stored in."""

CASES: list[Case] = [
    (Softmax(1), (3, 1000), 0, F32),
    (Softmax(-1), (2, 3, 1), 0, F32),
    (Softmax(2), (5, 1, 77), 0, F32),
    (Softmax(1), (2, 2600), 0, F16),
    (LogSoftmax(1), (3, 130), 0, F32),
    (LayerNorm(2), (2, 5, 192), 2, F32),
    (LayerNorm(-1), (7, 33), 1, F32),
    (LayerNorm(1), (2, 4, 3, 50), 2, F16),
    (LayerNorm(1, 1e-3), (3, 768), 2, BF16),
    (LayerNorm(0), (300,), 2, F32),
    (RmsNorm(1), (5, 516), 1, F32),
    (RmsNorm(2), (2, 2, 12), 1, F16),
]


def kernel(case: Case) -> Fused:
    """Give the kernel; a sigmoid and a factor follow."""
    op, shape, vectors, dtype = case
    axis = getattr(op, "axis", 0) % len(shape)
    shapes = [shape, *[shape[axis:]] * vectors]
    inputs = [call(Input(f"x{i}", TensorType(s, dtype if i != 1 else F32))) for i, s in enumerate(shapes)]
    y = call(op, *(value if value.dtype is F32 else call(Cast(F32), value) for value in inputs))
    y = call(Mul(), call(Sigmoid(), y), constant(3.0))
    return Fused(Graph("kernel", tuple(inputs), (y if dtype is F32 else call(Cast(dtype), y),)), op.name)


def source_of(fused: Fused, tile: RowParams, symbol: str, target: Target = TARGET) -> CudaSource:
    assert TEMPLATE.matches(fused, target)
    return cuda_source(TEMPLATE.build(fused, schedule_of(TEMPLATE.name, tile), target), symbol, target)


@needs_gxx
def test_schedules_compute_every_case(tmp_path: Path) -> None:
    check_turns(TEMPLATE, [kernel(case) for case in CASES], tmp_path)


@needs_gxx
def test_infinite_and_missing_numbers(tmp_path: Path) -> None:
    for number, op in enumerate((Softmax(1), LogSoftmax(1))):
        fused = kernel((op, (4, 70), 0, F32))
        source = source_of(fused, TILES[number], f"infinite{number}")
        x = np.random.default_rng(5).standard_normal((4, 70), np.float32)
        x[0] = -np.inf
        x[1, 1:] = -np.inf
        x[2, 69] = np.nan
        x[3] *= 1e4
        with np.errstate(invalid="ignore"):
            (wanted,) = fused.reference(x.astype(np.float64))
        assert np.isnan(wanted).all(axis=1).tolist() == [True, False, True, False]
        emulator = Emulator([source], tmp_path)
        for order in ORDERS:
            (result,) = emulator.run_fused(source, fused, [x], order)
            np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)


@needs_gxx
def test_missing_barriers_would_show(tmp_path: Path) -> None:
    """Before each of two sums is read, and before the second overwrites the first; there are no others."""
    fused = kernel((Softmax(1), (2, 700), 0, F32))
    source = source_of(fused, RowParams(128, 1), "unsafe")
    parts = source.text.split("__syncthreads();")
    assert len(parts) == 4
    for gone in range(3):
        pieces = [piece + ("" if i in (gone, 3) else "__syncthreads();") for i, piece in enumerate(parts)]
        unsafe = replace(source, text="".join(pieces))
        emulator = Emulator([unsafe], tmp_path)
        with pytest.raises(AssertionError):
            check(emulator, unsafe, fused, np.random.default_rng(gone))


def test_generic_reads_a_row_three_times() -> None:
    """What the template is for: a launch for each reduction and one for the result, with scratch memory between."""
    for case in (CASES[0], CASES[5]):
        fused = kernel(case)
        source = cuda_source(Generic().build(fused, next(iter(Generic().space(fused, TARGET))), TARGET), "g", TARGET)
        assert len(source.launches) == 3
        assert source.scratch_bytes > 0
        assert all(0 in launch.arguments for launch in source.launches)


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_rows_are_its_own(arch: str) -> None:
    """A warp has a short row, more of them a long one."""
    target = Target.parse(f"cuda:{arch}")
    for case in CASES:
        assert cheapest(kernel(case), TEMPLATES, target).template == TEMPLATE.name
    short, long = (
        cheapest(kernel((LayerNorm(1), (rows, length), 2, F32)), TEMPLATES, target)["threads"]
        for rows, length in ((6304, 192), (197, 8192))
    )
    assert short == 32 < long


def test_leaves_to_others() -> None:
    """Another axis than the last, rows that registers do not hold, types that are not computed in f32, CPUs."""
    for case in ((Softmax(0), (3, 10), 0, F32), (Softmax(1), (2, 1024 * 32 + 4), 0, F32)):
        assert not TEMPLATE.matches(kernel(case), TARGET)
    x = call(Input("x", TensorType((2, 8), DType.F64)))
    assert not TEMPLATE.matches(Fused(Graph("kernel", (x,), (call(Softmax(1), x),)), "softmax"), TARGET)
    assert not TEMPLATE.matches(kernel(CASES[0]), Target.parse("cpu:x86-64-v3"))


@needs_nvcc
@needs_disassembler
def test_instructions(tmp_path: Path) -> None:
    """A vector is read once, a sum is five shuffles, and nothing is spilled."""
    fused = kernel((LayerNorm(1), (6304, 256), 2, F32))
    source = source_of(fused, RowParams(32, 4), "hot")
    (usage,) = compile_fatbin(source, TARGET).usage
    assert (usage.stack_bytes, usage.spill_bytes) == (0, 0)
    count = instructions(source, TARGET, tmp_path)
    assert count("LDG") == count(r"LDG\.E\.128") == 2 + 2 * 2
    assert count("STG") == count(r"STG\.E\.128") == 2
    assert count("SHFL") == 2 * 5
    assert count("BAR") == 0
