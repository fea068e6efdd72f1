"""Products of matrices on tensor cores: every tile and type on odd shapes, in parts; what is left to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.codegen import CudaSource, cuda_source
from cnnc.backends.cuda.matmul_mma import MatMulMma, matched
from cnnc.backends.cuda.mma_params import TILES, MmaParams, resident
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.backends.lower.template import schedule_of
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Add, Cast, Dense, Gelu, MatMul, Mul, Relu, RoundTf32
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input
from cnnc.target import Target
from tests.backends.cuda.disassembler import instructions, needs_disassembler
from tests.backends.cuda.emulator import Emulator, needs_gxx
from tests.backends.cuda.test_conv_mma import TYPES, check, types
from tests.backends.cuda.test_nvcc import needs_nvcc

TARGET = Target.parse("cuda:sm_80")
TEMPLATE = MatMulMma()

Follow = Callable[[Value, list[Value]], Value]


def nothing(y: Value, inputs: list[Value]) -> Value:
    return y


def relu(y: Value, inputs: list[Value]) -> Value:
    return call(Relu(), y)


def residual(y: Value, inputs: list[Value]) -> Value:
    """A scale for each output, and a sum with what has the same shape."""
    scale, other = (call(Input(n, TensorType(s))) for n, s in (("scale", y.type.shape[-1:]), ("other", y.type.shape)))
    inputs += [scale, other]
    return call(Add(), call(Gelu(), call(Mul(), y, scale)), other)


Case = tuple[tuple[int, ...], tuple[int, int], bool, Follow]

CASES: list[Case] = [
    ((1, 64), (10, 64), True, nothing),
    ((7, 40), (34, 40), False, relu),
    ((2, 3, 5, 72), (66, 72), True, residual),
    ((70, 8), (2, 8), True, relu),
    ((33, 200), (130, 200), False, residual),
    ((16,), (6, 16), True, relu),
]


def kernel(case: Case, dtype: DType, narrow: bool = True) -> Fused:
    shape, weight, with_bias, follow = case
    inputs = [call(Input("x", TensorType(shape, dtype))), call(Input("w", TensorType(weight, dtype)))]
    operands = [call(RoundTf32() if dtype is DType.F32 else Cast(DType.F32), value) for value in inputs]
    if with_bias:
        inputs.append(call(Input("b", TensorType(weight[:1]))))
    y = follow(call(Dense(), *operands, *inputs[2:]), inputs)
    y = call(Cast(dtype), y) if narrow and dtype is not DType.F32 else y
    return Fused(Graph("kernel", tuple(inputs), (y,)), "dense")


Product = tuple[tuple[int, ...], tuple[int, ...], MatMul]

PRODUCTS: list[Product] = [
    ((3, 20, 40), (3, 40, 24), MatMul()),
    ((2, 1, 33, 16), (3, 16, 72), MatMul()),
    ((24, 40), (2, 34, 40), MatMul(transpose_b=True)),
    ((2, 3, 21, 72), (2, 1, 72, 8), MatMul(transpose_a=False)),
    ((4, 50, 16), (4, 50, 40), MatMul(transpose_a=True)),
    ((2, 8, 72), (2, 66, 8), MatMul(transpose_a=True, transpose_b=True)),
]


def product(case: Product, dtype: DType, follow: Follow = nothing) -> Fused:
    left, right, op = case
    inputs = [call(Input("a", TensorType(left, dtype))), call(Input("b", TensorType(right, dtype)))]
    operands = [call(RoundTf32() if dtype is DType.F32 else Cast(DType.F32), value) for value in inputs]
    y = follow(call(op, *operands), inputs)
    return Fused(Graph("kernel", tuple(inputs), (y,)), "mat_mul")


def source_of(fused: Fused, tile: MmaParams, symbol: str, target: Target = TARGET) -> CudaSource:
    assert TEMPLATE.matches(fused, target)
    return cuda_source(TEMPLATE.build(fused, schedule_of(TEMPLATE.name, tile), target), symbol, target)


@needs_gxx
@types
def test_every_tile_computes_every_case(dtype: DType, tmp_path: Path) -> None:
    """Tiles and parts take turns, so that each case meets two and each tile at least one."""
    jobs = []
    for number, case in enumerate(CASES):
        fused = kernel(case, dtype)
        found = matched(fused)
        assert found is not None
        for turn, index in enumerate((number, number + len(CASES) // 2 + 2 + TYPES.index(dtype))):
            tile = TILES[index % len(TILES)]
            parts = min(1 + 2 * turn, -(-found.shape.chunks // tile.depth))
            jobs.append((fused, source_of(fused, replace(tile, splits=parts), f"dense{number}_{turn}")))
    emulator = Emulator([source for _, source in jobs], tmp_path)
    rng = np.random.default_rng(TYPES.index(dtype))
    for fused, source in jobs:
        check(emulator, source, fused, rng)


@needs_gxx
@pytest.mark.parametrize("dtype", [DType.F16, pytest.param(DType.BF16, marks=pytest.mark.slow)], ids=str)
def test_products_of_activations(dtype: DType, tmp_path: Path) -> None:
    """Matrices either way round, batches that broadcast, all tiles in turn, in parts."""
    jobs = []
    for number, case in enumerate(PRODUCTS):
        fused = product(case, dtype, residual if number % 2 else nothing)
        for turn in (0, 1):
            tile = TILES[(2 * number + 5 * turn) % len(TILES)]
            found = matched(fused)
            assert found is not None
            parts = min(1 + turn, -(-found.shape.chunks // tile.depth))
            jobs.append((fused, source_of(fused, replace(tile, splits=parts), f"product{number}_{turn}")))
    emulator = Emulator([source for _, source in jobs], tmp_path)
    rng = np.random.default_rng(9)
    for fused, source in jobs:
        check(emulator, source, fused, rng)


@needs_gxx
def test_products_in_tf32(tmp_path: Path) -> None:
    """Where both operands have neighbours in depth: numbers of 32 bits are not transposed."""
    fused = product(((2, 20, 12), (2, 34, 12), MatMul(transpose_b=True)), DType.F32)
    source = source_of(fused, TILES[9], "product")
    check(Emulator([source], tmp_path), source, fused, np.random.default_rng(2))
    assert not TEMPLATE.matches(product(PRODUCTS[0], DType.F32), TARGET)


def test_takes_what_is_narrow() -> None:
    for case in CASES:
        for dtype in TYPES:
            assert TEMPLATE.matches(kernel(case, dtype), TARGET)
            assert TEMPLATE.matches(kernel(case, dtype, narrow=False), TARGET)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (((7, 12), (4, 12), True, nothing), DType.F16),
        (((7, 6), (4, 6), True, nothing), DType.F32),
        (((7, 16), (5, 16), True, nothing), DType.F16),
        (((0, 16), (4, 16), True, nothing), DType.F16),
    ],
)
def test_leaves_to_others(case: Case, dtype: DType) -> None:
    """Rows that do not begin at multiples of 16 bytes, outputs that are no pairs, nothing at all."""
    assert not TEMPLATE.matches(kernel(case, dtype), TARGET)
    assert not TEMPLATE.matches(kernel(CASES[0], dtype), Target.parse("cpu:x86-64-v3"))


@pytest.mark.parametrize(
    ("left", "right", "op"),
    [
        ((2, 8, 12), (2, 12, 8), MatMul()),
        ((2, 8, 16), (2, 16, 12), MatMul()),
        ((2, 16, 12), (2, 16, 8), MatMul(transpose_a=True)),
        ((8, 16), (16,), MatMul()),
        ((16,), (16, 8), MatMul()),
    ],
)
def test_leaves_other_products(left: tuple[int, ...], right: tuple[int, ...], op: MatMul) -> None:
    assert not TEMPLATE.matches(product((left, right, op), DType.F16), TARGET)


def test_plain_f32_is_left_to_others() -> None:
    x, w = call(Input("x", TensorType((4, 16)))), call(Input("w", TensorType((4, 16))))
    assert not TEMPLATE.matches(Fused(Graph("kernel", (x, w), (call(Dense(), x, w),)), "dense"), TARGET)


@needs_nvcc
@types
def test_tiles_stay_in_registers(dtype: DType) -> None:
    target = Target.parse("cuda:sm_90")
    fused = kernel(((512, 768), (3072, 768), True, residual), dtype)
    for number in (0, 2, 8):
        (usage,) = compile_fatbin(source_of(fused, TILES[number], "hot", target), target).usage
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0), TILES[number]
        assert resident(TILES[number], target) * TILES[number].threads * usage.registers <= 1 << 16


@needs_nvcc
@needs_disassembler
def test_instructions(tmp_path: Path) -> None:
    fused = kernel(((512, 768), (3072, 768), True, residual), DType.F16)
    count = instructions(source_of(fused, TILES[2], "hot"), TARGET, tmp_path)
    assert count(r"HMMA\.16816\.F32\b") >= 32
    assert count(r"LDGSTS\.E(\.BYPASS)?(\.LTC128B)?\.128") == count("LDGSTS") == 16
    assert count("LDSM") == count(r"LDSM\.16\.M88\.4") > 0
    assert count("STS") == count("LDS\\b") == count("LDL") == count("STL") == 0


@needs_nvcc
@needs_disassembler
def test_transposing_is_done_by_the_load(tmp_path: Path) -> None:
    fused = product(((8, 128, 64), (8, 64, 256), MatMul()), DType.F16)
    count = instructions(source_of(fused, TILES[2], "hot"), TARGET, tmp_path)
    assert count("LDSM") == count(r"LDSM\.16\.M88\.4") + count(r"LDSM\.16\.MT88\.4")
    assert count(r"LDSM\.16\.MT88\.4") > 0
    assert count("STS") == count("LDS\\b") == count("LDL") == count("STL") == count("PRMT") == 0
