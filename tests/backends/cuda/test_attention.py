"""Attention in one kernel, against the interpreter: odd sizes, heads side by side and apart, masks, narrow types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.attention import TILES, AttentionParams, AttentionTemplate, matched
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


def kernel(case: Case) -> Fused:
    """Give the kernel; a residual follows."""
    op, batch, queries, keys, mask, dtype = case
    ends = [start + (op.heads - 1) * step for start, step in zip(op.starts, op.steps, strict=True)]
    if len(set(op.steps)) == 1 and ends[2] > ends[1] > ends[0]:
        inputs = [call(Input("qkv", TensorType((batch, queries, ends[2] + op.value_size), dtype)))]
        operands = [_wide(inputs[0])] * 3
    else:
        features = (ends[0] + op.size + 3, ends[1] + op.size, ends[2] + op.value_size + 1)
        shapes = zip("qkv", (queries, keys, keys), features, strict=True)
        inputs = [call(Input(name, TensorType((batch, *shape), dtype))) for name, *shape in shapes]
        operands = [_wide(value) for value in inputs]
    if mask is not None:
        inputs.append(call(Input("mask", TensorType(mask))))
        operands.append(inputs[-1])
    y = call(op, *operands)
    inputs.append(call(Input("residual", y.type.with_dtype(dtype))))
    y = call(Add(), y, _wide(inputs[-1]))
    return Fused(Graph("kernel", tuple(inputs), (y if dtype is F32 else call(Cast(dtype), y),)), "attention")


def _wide(value: Value) -> Value:
    return value if value.dtype is F32 else call(Cast(F32), value)


def source_of(fused: Fused, tile: AttentionParams, symbol: str, target: Target = TARGET) -> CudaSource:
    assert TEMPLATE.matches(fused, target)
    return cuda_source(TEMPLATE.build(fused, schedule_of(TEMPLATE.name, tile), target), symbol, target)


@needs_gxx
def test_tiles_compute_every_case(tmp_path: Path) -> None:
    """Tiles take turns, so that each case meets two, and every number of each parameter several cases."""
    jobs = []
    for number, case in enumerate(CASES):
        fused = kernel(case)
        for turn in (0, 1):
            tile = TILES[(number * 7 + turn * 10) % len(TILES)]
            jobs.append((fused, source_of(fused, tile, f"attention{number}_{turn}")))
    emulator = Emulator([source for _, source in jobs], tmp_path)
    rng = np.random.default_rng(3)
    for fused, source in jobs:
        check(emulator, source, fused, rng)
        assert len(source.launches) == 1
        assert source.scratch_bytes == 0
