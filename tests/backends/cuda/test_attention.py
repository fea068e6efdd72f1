"""Attention in one kernel, against the interpreter: odd sizes, heads side by side and apart, masks, narrow types."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.attention import AttentionParams, AttentionTemplate, matched
from cnnc.backends.cuda.codegen import CudaSource, cuda_source
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.backends.cuda.templates import TEMPLATES
from cnnc.backends.lower.template import schedule_of
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Add, Cast
from cnnc.ops.attention import Attention
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input
from cnnc.target import CUDA_ARCHS, Target
from tests.backends.cuda.direct_kernels import check_turns
from tests.backends.cuda.disassembler import instructions, needs_disassembler
from tests.backends.cuda.emulator import Emulator, needs_gxx
from tests.backends.cuda.test_conv_mma import check
from tests.backends.cuda.test_generic import ORDERS
from tests.backends.cuda.test_matvec import cheapest
from tests.backends.cuda.test_nvcc import needs_nvcc

TARGET = Target.parse("cuda:sm_90")
TEMPLATE = AttentionTemplate()
F32, F16, BF16 = DType.F32, DType.F16, DType.BF16

Case = tuple[Attention, int, int, int, tuple[int, ...] | None, DType]
"""The operator, batch, queries, keys, shape of a mask, and the type that everything is stored in."""


def apart(heads: int, size: int, value_size: int) -> Attention:
    return Attention(heads, size, value_size, size**-0.5, (0, 0, 0), (size, size, value_size))


def joined(heads: int, size: int) -> Attention:
    """One tensor is queries, keys and values."""
    return Attention(heads, size, size, size**-0.5, (0, heads * size, 2 * heads * size), (size,) * 3)


CASES: list[Case] = [
    (joined(3, 64), 1, 19, 19, None, F32),
    (apart(2, 17, 19), 2, 5, 7, None, F32),
    (apart(1, 12, 80), 3, 8, 40, (8, 40), F32),
    (apart(2, 3, 1), 1, 9, 1, None, F32),
    (Attention(2, 1, 5, 2.0, (3, 1, 0), (1, 2, 5)), 1, 1, 50, (1, 2, 1, 1), F32),
    (Attention(3, 4, 32, 1.0, (0, 4, 8), (40, 40, 40)), 2, 33, 33, (2, 1, 1, 33), F32),
    (joined(2, 32), 1, 50, 50, (50,), F16),
    (apart(2, 20, 6), 2, 11, 66, (1, 11, 66), F16),
    (apart(1, 7, 9), 1, 3, 5, None, BF16),
]


def kernel(case: Case, spare: tuple[int, int, int] = (3, 0, 1), narrow: bool = True) -> Fused:
    """Give the kernel; a residual follows.  Tensors apart have some features that are of no head."""
    op, batch, queries, keys, mask, dtype = case
    ends = [start + (op.heads - 1) * step for start, step in zip(op.starts, op.steps, strict=True)]
    if len(set(op.steps)) == 1 and ends[2] > ends[1] > ends[0]:
        inputs = [call(Input("qkv", TensorType((batch, queries, ends[2] + op.value_size), dtype)))]
        operands = [_wide(inputs[0])] * 3
    else:
        sizes = (op.size, op.size, op.value_size)
        features = [sum(parts) for parts in zip(ends, sizes, spare, strict=True)]
        shapes = zip("qkv", (queries, keys, keys), features, strict=True)
        inputs = [call(Input(name, TensorType((batch, *shape), dtype))) for name, *shape in shapes]
        operands = [_wide(value) for value in inputs]
    if mask is not None:
        inputs.append(call(Input("mask", TensorType(mask))))
        operands.append(inputs[-1])
    y = call(op, *operands)
    inputs.append(call(Input("residual", y.type.with_dtype(dtype))))
    y = call(Add(), y, _wide(inputs[-1]))
    y = call(Cast(dtype), y) if narrow and dtype is not F32 else y
    return Fused(Graph("kernel", tuple(inputs), (y,)), "attention")


def _wide(value: Value) -> Value:
    return value if value.dtype is F32 else call(Cast(F32), value)


def source_of(fused: Fused, tile: AttentionParams, symbol: str, target: Target = TARGET) -> CudaSource:
    assert TEMPLATE.matches(fused, target)
    return cuda_source(TEMPLATE.build(fused, schedule_of(TEMPLATE.name, tile), target), symbol, target)


@needs_gxx
def test_schedules_compute_every_case(tmp_path: Path) -> None:
    check_turns(TEMPLATE, [kernel(case) for case in CASES], tmp_path)


@needs_gxx
def test_infinite_and_missing_numbers(tmp_path: Path) -> None:
    """Rows that a mask leaves nothing of are NaN, as are those with NaN; what is left out in a tile adds nothing."""
    case: Case = (apart(1, 4, 3), 1, 6, 70, (6, 70), F32)
    fused = kernel(case)
    source = source_of(fused, AttentionParams(2, 2, 4), "infinite")
    rng = np.random.default_rng(5)
    arrays = [rng.standard_normal(v.type.static_shape, np.float32) for v in fused.body.inputs]
    q, k, _, mask, _ = arrays
    mask[0] = -np.inf
    mask[1, :65] = -np.inf
    mask[2, 3] = np.inf
    mask[3, 69] = np.nan
    mask[4] = -1e30
    q[0, 5] *= 1e4
    k[0, 66] *= 1e4
    with np.errstate(invalid="ignore"):
        (wanted,) = fused.reference(*(array.astype(np.float64) for array in arrays))
    assert np.isnan(wanted).all(axis=(0, 2)).tolist() == [True, False, True, True, False, False]
    emulator = Emulator([source], tmp_path)
    for order in ORDERS:
        (result,) = emulator.run_fused(source, fused, arrays, order)
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-4)


def without_each(source: CudaSource, statement: str) -> list[CudaSource]:
    """Give the source without a statement, once for each place it is at."""
    start = source.text.index('extern "C" __global__')
    *before, last = source.text[start:].split(statement)
    changed = []
    for gone in range(len(before)):
        name = f"{source.symbol}_{len(statement)}_{gone}"
        text = source.text[:start] + "".join(
            piece + ("" if number == gone else statement) for number, piece in enumerate(before)
        )
        text = (text + last).replace(f"{source.symbol}_kernel", f"{name}_kernel")
        launches = tuple(replace(launch, function=f"{name}_kernel") for launch in source.launches)
        changed.append(replace(source, symbol=name, text=text, launches=launches))
    return changed


@needs_gxx
def test_missing_barriers_would_show(tmp_path: Path) -> None:
    """Before a tile is overwritten, before it is read, and before shares are; there are no others."""
    fused = kernel((joined(1, 8), 1, 70, 70, None, F32))
    source = source_of(fused, AttentionParams(1, 2, 8), "unsafe")
    unsafe = without_each(source, "__syncthreads();")
    assert len(unsafe) == 3
    emulator = Emulator([source, *unsafe], tmp_path)
    check(emulator, source, fused, np.random.default_rng(1))
    for one in unsafe:
        with pytest.raises(AssertionError):
            check(emulator, one, fused, np.random.default_rng(1))


def test_leaves_to_others() -> None:
    """Types that are not computed in f32, heads too large for shared memory, CPUs."""
    assert not TEMPLATE.matches(kernel(CASES[0]), Target.parse("cpu:x86-64-v3"))
    for dtype in (DType.F64, F16):
        q = call(Input("q", TensorType((1, 3, 8), dtype)))
        narrow = Fused(Graph("kernel", (q,), (call(apart(1, 8, 8), q, q, q),)), "attention")
        assert not TEMPLATE.matches(narrow, TARGET)
    large = kernel((apart(1, 1024, 1024), 1, 4, 4, None, F32))
    assert not TEMPLATE.matches(large, TARGET)
    assert cheapest(large, TEMPLATES, TARGET).template == "generic"


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_few_queries_are_spread_over_many_blocks(arch: str) -> None:
    target = Target.parse(f"cuda:{arch}")
    sizes = [(joined(3, 64), 1, 197), (joined(12, 64), 1, 50), (joined(12, 64), 32, 197), (joined(8, 40), 2, 4096)]
    kernels = [kernel((op, batch, tokens, tokens, None, F32)) for op, batch, tokens in sizes]
    chosen = [cheapest(fused, TEMPLATES, target) for fused in kernels]
    assert {schedule.template for schedule in chosen} == {TEMPLATE.name}
    rows = [schedule["rows"] * schedule["high"] for schedule in chosen]
    assert max(rows[:2]) < rows[3]


def test_costs_are_no_less_than_arithmetic_takes() -> None:
    """Two multiply-adds for each feature of a score; tiles of odd sizes compute more."""
    fused = kernel((joined(16, 64), 16, 1024, 1024, None, F32))
    least = 4 * 16 * 16 * 1024 * 1024 * 64 / 66.9e12
    costs = [TEMPLATE.cost(fused, schedule, TARGET) for schedule in TEMPLATE.space(fused, TARGET)]
    assert least < min(costs) < 4 * least


@needs_nvcc
@pytest.mark.parametrize(
    ("tile", "arch"),
    [
        (AttentionParams(2, 4, 4), "sm_90"),
        (AttentionParams(4, 4, 8), "sm_80"),
        pytest.param(AttentionParams(8, 4, 8), "sm_90", marks=pytest.mark.slow),
        pytest.param(AttentionParams(1, 2, 16), "sm_80", marks=pytest.mark.slow),
    ],
)
def test_tiles_stay_in_registers(tile: AttentionParams, arch: str) -> None:
    target = Target.parse(f"cuda:{arch}")
    fused = kernel((joined(3, 64), 1, 197, 197, None, F16 if arch == "sm_80" else F32))
    found = matched(fused)
    assert found is not None
    (usage,) = compile_fatbin(source_of(fused, tile, "hot", target), target).usage
    assert (usage.stack_bytes, usage.spill_bytes) == (0, 0)
    assert found.shape.resident(tile, target) * tile.threads * usage.registers <= 1 << 16


@needs_nvcc
@needs_disassembler
def test_instructions(tmp_path: Path) -> None:
    """Vectors of 16 bytes from memory, and to and from shared memory, but for shares and the residual."""
    tile = AttentionParams(4, 4, 8)
    fused = kernel((joined(3, 64), 1, 192, 192, None, F32))
    count = instructions(source_of(fused, tile, "hot"), TARGET, tmp_path)
    assert count("LDS") == count(r"LDS\.128") > 0
    assert count(r"LDG\.E\.128") == count(r"STS\.128") == 20
    assert count("STS") - count(r"STS\.128") == tile.rows * tile.keys
    assert count("SHFL") == tile.rows * 4 * 2
    assert count("MUFU.EX2") == tile.rows * (tile.keys + 1)
    assert count("LDL") == count("STL") == 0
