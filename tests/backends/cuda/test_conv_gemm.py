"""The implicit product of matrices: every tile on odd shapes, with epilogues; what it leaves to others."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.codegen import cuda_source
from cnnc.backends.cuda.conv_gemm import TILES, ConvGemm, GemmParams
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Add, Conv, Mul, Relu, Sigmoid
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input, constant
from cnnc.target import Target
from tests.backends.cuda.emulator import Emulator, needs_gxx
from tests.backends.cuda.test_generic import check_orders
from tests.backends.cuda.test_nvcc import needs_nvcc

TARGET = Target.parse("cuda:sm_90")
TEMPLATE = ConvGemm()

Follow = Callable[[Value, list[Value]], Value]
"""Gives what follows the convolution's result; new inputs go to the list."""


@dataclass(frozen=True)
class Case:
    """A convolution by its sizes: pads are (top, left, bottom, right)."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    pad: tuple[int, ...] = (0, 0, 0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    bias: bool = False


def nothing(y: Value, inputs: list[Value]) -> Value:
    return y


def relu(y: Value, inputs: list[Value]) -> Value:
    return call(Relu(), y)


def operand(inputs: list[Value], *shape: int) -> Value:
    inputs.append(call(Input(f"extra{len(inputs)}", TensorType(shape))))
    return inputs[-1]


def scaled_residual(y: Value, inputs: list[Value]) -> Value:
    y = call(Mul(), y, operand(inputs, y.type.static_shape[1], 1, 1))
    return call(Relu(), call(Add(), y, operand(inputs, *y.type.static_shape)))


def gated(y: Value, inputs: list[Value]) -> Value:
    """What every image has for each channel, and a number; the result is used twice."""
    gate = operand(inputs, *y.type.static_shape[:2], 1, 1)
    return call(Mul(), call(Mul(), y, call(Sigmoid(), y)), call(Mul(), gate, constant(0.5)))


def masked(y: Value, inputs: list[Value]) -> Value:
    """An image for all channels."""
    return call(Mul(), y, operand(inputs, 1, 1, *y.type.static_shape[2:]))


CASES: list[tuple[Case, Follow]] = [
    (Case((1, 3, 9, 11), (5, 3, 3, 3)), nothing),
    (Case((2, 3, 9, 11), (5, 3, 3, 3), pad=(1, 1, 1, 1), bias=True), relu),
    (Case((1, 4, 10, 7), (33, 4, 3, 2), stride=(2, 1), pad=(0, 1, 2, 0)), scaled_residual),
    (Case((2, 2, 12, 12), (3, 2, 3, 3), pad=(2, 2, 2, 2), dilation=(2, 2), bias=True), gated),
    (Case((1, 17, 8, 8), (18, 17, 1, 1)), masked),
    (Case((3, 1, 2, 1), (2, 1, 1, 1), bias=True), scaled_residual),
    (Case((1, 3, 23, 23), (16, 3, 7, 7), stride=(2, 2), pad=(3, 3, 3, 3)), relu),
    (Case((1, 130, 4, 33), (129, 130, 1, 1)), nothing),
]


def kernel(case: Case, follow: Follow, dtype: DType = DType.F32) -> Fused:
    inputs = [call(Input("x", TensorType(case.x, dtype))), call(Input("w", TensorType(case.w, dtype)))]
    if case.bias:
        inputs.append(call(Input("b", TensorType(case.w[:1], dtype))))
    conv = call(Conv(case.stride, case.pad, case.dilation, case.groups), *inputs)
    output = follow(conv, inputs)
    return Fused(Graph("kernel", tuple(inputs), (output,)), "conv")


@needs_gxx
def test_every_tile_computes_every_case(tmp_path: Path) -> None:
    """Tiles take turns, so that each case meets two and each tile several cases."""
    jobs = []
    for number, (case, follow) in enumerate(CASES):
        fused = kernel(case, follow)
        assert TEMPLATE.matches(fused, TARGET)
        schedules = list(TEMPLATE.space(fused, TARGET))
        for turn in (number, number + 3):
            schedule = schedules[turn % len(TILES)]
            source = cuda_source(TEMPLATE.build(fused, schedule, TARGET), f"conv{number}_{turn % len(TILES)}", TARGET)
            jobs.append((fused, source))
    emulator = Emulator([source for _, source in jobs], tmp_path)
    rng = np.random.default_rng(8)
    for fused, source in jobs:
        arrays = [rng.standard_normal(v.type.static_shape, np.float32) for v in fused.body.inputs]
        check_orders(emulator, source, fused, arrays, wanted(fused, arrays), tolerance=1e-4)
        assert len(source.launches) == 1
        assert source.scratch_bytes == 0


@needs_gxx
@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_would_show(barrier: int, tmp_path: Path) -> None:
    """The emulation finds what these kernels could get wrong: either of their barriers is needed."""
    fused = kernel(Case((1, 40, 6, 6), (32, 40, 1, 1)), nothing)
    schedule = list(TEMPLATE.space(fused, TARGET))[TILES.index(GemmParams(32, 32, 16, 2, 2))]
    source = cuda_source(TEMPLATE.build(fused, schedule, TARGET), f"unsafe{barrier}", TARGET)
    before, first, middle, second, after = re.split(r"(__syncthreads\(\);)", source.text)
    kept = (first, "") if barrier else ("", second)
    unsafe = replace(source, text=before + kept[0] + middle + kept[1] + after)
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(v.type.static_shape, np.float32) for v in fused.body.inputs]
    with pytest.raises(AssertionError):
        check_orders(Emulator([unsafe], tmp_path), unsafe, fused, arrays, wanted(fused, arrays), tolerance=1e-4)


def wanted(fused: Fused, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    exact = fused.reference(*(array.astype(np.float64) for array in arrays))
    return [result.astype(np.float32) for result in exact]


def by_rows(y: Value, inputs: list[Value]) -> Value:
    """Tell the columns of an image apart: no flat operand does."""
    return call(Mul(), y, operand(inputs, y.type.static_shape[3]))


def by_columns(y: Value, inputs: list[Value]) -> Value:
    return call(Mul(), y, operand(inputs, y.type.static_shape[2], 1))


def itself(y: Value, inputs: list[Value]) -> Value:
    """Need the input with flat pixels and with rows."""
    return call(Add(), y, inputs[0])


@pytest.mark.parametrize(
    ("case", "follow", "dtype"),
    [
        (Case((1, 4, 8, 6), (4, 2, 3, 3), groups=2), nothing, DType.F32),
        (Case((1, 4, 8, 6), (4, 4, 3, 3)), nothing, DType.F16),
        (Case((1, 4, 8), (4, 4, 3), stride=(1,), pad=(0, 0), dilation=(1,)), nothing, DType.F32),
        (Case((1, 4, 8, 6), (5, 4, 3, 3)), by_rows, DType.F32),
        (Case((1, 4, 8, 6), (5, 4, 3, 3)), by_columns, DType.F32),
        (Case((1, 4, 8, 6), (4, 4, 3, 3), pad=(1, 1, 1, 1)), itself, DType.F32),
        (Case((0, 4, 8, 6), (4, 4, 3, 3)), nothing, DType.F32),
        (Case((65536, 1, 2, 1), (2, 1, 1, 1)), nothing, DType.F32),
        (Case((1, 4, 8, 6), (1, 4, 3, 3)), nothing, DType.F32),
        (Case((1, 4, 3, 3), (5, 4, 3, 3)), nothing, DType.F32),
    ],
)
def test_leaves_to_others(case: Case, follow: Follow, dtype: DType) -> None:
    assert not TEMPLATE.matches(kernel(case, follow, dtype), TARGET)


def test_is_for_gpus() -> None:
    fused = kernel(CASES[0][0], nothing)
    assert TEMPLATE.matches(fused, TARGET)
    assert not TEMPLATE.matches(fused, Target.parse("cpu:x86-64-v3"))


def test_large_products_get_large_tiles() -> None:
    def chosen(case: Case) -> int:
        fused = kernel(case, nothing)
        best = min(TEMPLATE.space(fused, TARGET), key=lambda schedule: TEMPLATE.cost(fused, schedule, TARGET))
        return best["rows"] * best["columns"]

    large = chosen(Case((16, 256, 56, 56), (512, 256, 3, 3), pad=(1, 1, 1, 1)))
    small = chosen(Case((1, 512, 7, 7), (512, 512, 3, 3), pad=(1, 1, 1, 1)))
    assert small < large == max(tile.rows * tile.columns for tile in TILES)


@needs_nvcc
@pytest.mark.parametrize("number", range(len(TILES)))
def test_tiles_stay_in_registers(number: int) -> None:
    fused = kernel(Case((1, 64, 28, 28), (128, 64, 3, 3), pad=(1, 1, 1, 1), bias=True), scaled_residual)
    schedule = list(TEMPLATE.space(fused, TARGET))[number]
    (usage,) = compile_fatbin(cuda_source(TEMPLATE.build(fused, schedule, TARGET), "hot", TARGET), TARGET).usage
    tile = TILES[number]
    assert (usage.stack_bytes, usage.spill_bytes) == (0, 0)
    assert usage.registers <= 128
    assert usage.shared_bytes == 4 * tile.depth * (tile.rows + tile.columns)
