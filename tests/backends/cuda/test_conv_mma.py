"""Convolutions on tensor cores: every tile and type on odd shapes, with epilogues and parts; what is left to others."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.codegen import CudaSource, cuda_source
from cnnc.backends.cuda.conv_mma import ConvMma, matched, shape_of
from cnnc.backends.cuda.machine import GPUS
from cnnc.backends.cuda.mma_params import SPLITS, TILES, MmaParams, resident
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Add, Cast, Conv, Mul, ReduceMean, Relu, RoundTf32, Sigmoid
from cnnc.ops.blocked import channel_layout, tile_layout
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input
from cnnc.target import Target
from tests.backends.cuda.disassembler import instructions, needs_disassembler
from tests.backends.cuda.emulator import Emulator, needs_gxx
from tests.backends.cuda.test_conv_gemm import Case
from tests.backends.cuda.test_generic import ORDERS
from tests.backends.cuda.test_nvcc import needs_nvcc

TARGET = Target.parse("cuda:sm_80")
TEMPLATE = ConvMma()
TYPES = (DType.F16, DType.F32, DType.BF16)
"""Of what is stored; products of f32 are tf32's."""

slow = pytest.mark.slow
types = pytest.mark.parametrize("dtype", [DType.F16, DType.F32, pytest.param(DType.BF16, marks=slow)], ids=str)
"""Those of 16 bits differ in one instruction, which a quick test of each sees in the machine code."""

architectures = pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=slow)])

Follow = Callable[["Kernel", Value], Value]


class Kernel:
    """A kernel in the making: its inputs, in the layouts that tensor cores read."""

    def __init__(self, dtype: DType) -> None:
        self.dtype = dtype
        self.block = 16 // dtype.itemsize
        self.inputs: list[Value] = []

    def input(self, shape: Sequence[int], dtype: DType | None = None, image: bool = True) -> Value:
        layout = channel_layout(len(shape), self.block) if image else None
        type_ = TensorType(tuple(shape), dtype or self.dtype, layout)
        self.inputs.append(call(Input(f"x{len(self.inputs)}", type_)))
        return self.inputs[-1]

    def operand(self, value: Value) -> Value:
        return call(RoundTf32() if self.dtype is DType.F32 else Cast(DType.F32), value)

    def wide(self, value: Value) -> Value:
        return value if value.dtype is DType.F32 else call(Cast(DType.F32), value)


def kernel(case: Case, follow: Follow, dtype: DType, narrow: bool = True) -> Fused:
    made = Kernel(dtype)
    x = made.input(case.x)
    weight = TensorType(case.w, dtype, tile_layout(4, made.block))
    w = call(Input("w", weight))
    made.inputs.append(w)
    bias = [made.input(case.w[:1], DType.F32, image=False)] if case.bias else []
    conv = Conv(case.stride, case.pad, case.dilation, case.groups)
    y = follow(made, call(conv, made.operand(x), made.operand(w), *bias))
    y = call(Cast(dtype), y) if narrow and dtype is not DType.F32 else y
    return Fused(Graph("kernel", tuple(made.inputs), (y,)), "conv")


def nothing(made: Kernel, y: Value) -> Value:
    return y


def relu(made: Kernel, y: Value) -> Value:
    return call(Relu(), y)


def residual(made: Kernel, y: Value) -> Value:
    """A scale for each channel, and an image of the same shape."""
    y = call(Mul(), y, made.wide(made.input((1, y.type.static_shape[1], 1, 1))))
    return call(Relu(), call(Add(), y, made.wide(made.input(y.type.static_shape))))


def gated(made: Kernel, y: Value) -> Value:
    """What every image has for each channel; the result is used twice."""
    gate = made.wide(made.input((*y.type.static_shape[:2], 1, 1)))
    return call(Mul(), call(Mul(), y, call(Sigmoid(), y)), gate)


CASES: list[tuple[Case, Follow]] = [
    (Case((1, 3, 9, 11), (5, 3, 3, 3)), nothing),
    (Case((2, 12, 9, 11), (20, 12, 3, 3), pad=(1, 1, 1, 1), bias=True), relu),
    (Case((1, 24, 10, 7), (33, 24, 3, 2), stride=(2, 1), pad=(0, 1, 2, 0)), residual),
    (Case((2, 8, 12, 12), (9, 8, 3, 3), pad=(2, 2, 2, 2), dilation=(2, 2), bias=True), gated),
    (Case((1, 72, 8, 8), (40, 72, 1, 1), bias=True), residual),
    (Case((3, 1, 2, 1), (1, 1, 1, 1), bias=True), relu),
    (Case((1, 3, 23, 23), (16, 3, 7, 7), stride=(2, 2), pad=(3, 3, 3, 3), bias=True), relu),
    (Case((2, 48, 7, 6), (72, 16, 3, 3), stride=(1, 2), pad=(1, 1, 1, 1), groups=3, bias=True), residual),
    (Case((1, 160, 3, 3), (70, 160, 3, 3), pad=(1, 1, 1, 1)), gated),
]


def source_of(fused: Fused, tile: MmaParams, symbol: str, target: Target = TARGET) -> CudaSource:
    assert TEMPLATE.matches(fused, target)
    return cuda_source(TEMPLATE.build(fused, schedule_of(TEMPLATE.name, tile), target), symbol, target)


def drawn(fused: Fused, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.standard_normal(v.type.static_shape).astype(v.dtype.numpy) for v in fused.body.inputs]


def check(emulator: Emulator, source: CudaSource, fused: Fused, rng: np.random.Generator) -> None:
    """Hold a kernel against the interpreter, which rounds where the kernel does, in all orders of threads.

    Products are exact, so that only the order of f32's sums differs, and after it a number may be stored as the next
    one of its type.
    """
    arrays = drawn(fused, rng)
    (wanted,) = (np.asarray(result, np.float64) for result in fused.reference(*(a.astype(np.float64) for a in arrays)))
    (output,) = fused.body.outputs
    last_place = {DType.F32: 2e-7, DType.F16: 2**-10, DType.BF16: 2**-7}[output.dtype]
    first = b""
    for order in ORDERS:
        (result,) = emulator.run_fused(source, fused, arrays, order)
        error = np.abs(result.astype(np.float64) - wanted)
        assert (error <= last_place * np.abs(wanted) + 2e-5 * np.abs(wanted).max()).all(), (source.symbol, error.max())
        first = first or result.tobytes()
        assert result.tobytes() == first, f"{source.symbol} in order {order}"


def turns(number: int) -> list[MmaParams]:
    """Let tiles and parts take turns, so that each case meets two and each tile several cases."""
    one, other = TILES[number % len(TILES)], TILES[(number + 5) % len(TILES)]
    return [one, replace(other, splits=2 + number % 3)]


@needs_gxx
@types
def test_every_tile_computes_every_case(dtype: DType, tmp_path: Path) -> None:
    jobs = []
    shift = TYPES.index(dtype) * 3
    for number, (case, follow) in enumerate(CASES):
        fused = kernel(case, follow, dtype)
        for turn, tile in enumerate(turns(number + shift)):
            tile = replace(tile, splits=min(tile.splits, fewest_steps(fused, tile)))
            jobs.append((fused, source_of(fused, tile, f"conv{number}_{turn}")))
    emulator = Emulator([source for _, source in jobs], tmp_path)
    rng = np.random.default_rng(TYPES.index(dtype))
    for fused, source in jobs:
        check(emulator, source, fused, rng)


def fewest_steps(fused: Fused, tile: MmaParams) -> int:
    found = matched(fused)
    assert found is not None
    return -(-shape_of(found).chunks // tile.depth)


FAULTS = {
    "no wait": (r"cnnc_tc_wait<\d>\(\);", ""),
    "a wait that is too short": (r"cnnc_tc_wait<2>\(\);", "cnnc_tc_wait<3>();"),
    "no barrier": (r"__syncthreads\(\);", ""),
    "copies that are never valid": (r"(cnnc_tc_copy\(.*), [^,]*\);", r"\1, false);"),
    "half of a tile from elsewhere": (r"cnnc_tc_load\(\(&\(b_ptr\[0\]\)\)", "cnnc_tc_load((&(b_ptr[4]))"),
}


@needs_gxx
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_show(fault: str, tmp_path: Path) -> None:
    """The emulation finds what these kernels could get wrong: each change of the source gives wrong numbers."""
    fused = kernel(Case((1, 96, 6, 6), (32, 96, 3, 3), pad=(1, 1, 1, 1)), nothing, DType.F16)
    source = source_of(fused, MmaParams(64, 32, 32, 16, 8, 4), "hot")
    check(Emulator([source], tmp_path), source, fused, np.random.default_rng(1))
    start = source.text.index('extern "C" __global__')
    text = source.text[:start] + re.sub(*FAULTS[fault], source.text[start:])
    assert text != source.text
    faulty = replace(source, text=text)
    with pytest.raises(AssertionError):
        check(Emulator([faulty], tmp_path), faulty, fused, np.random.default_rng(1))


def plain(made: Kernel, y: Value) -> Value:
    """An operand that tells rows of an image from its channels in another layout."""
    return call(Add(), y, made.input((), DType.F32, image=False))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_takes_what_follows(dtype: DType) -> None:
    for case, follow in [*CASES, (CASES[1][0], plain)]:
        assert TEMPLATE.matches(kernel(case, follow, dtype), TARGET)
        assert TEMPLATE.matches(kernel(case, follow, dtype, narrow=False), TARGET)


def pooled(made: Kernel, y: Value) -> Value:
    return call(ReduceMean((2, 3), True), y)


def test_leaves_to_others() -> None:
    case = CASES[1][0]
    assert not TEMPLATE.matches(kernel(case, nothing, DType.F16), Target.parse("cpu:x86-64-v3"))
    assert not TEMPLATE.matches(kernel(case, pooled, DType.F16, narrow=False), TARGET)
    assert not TEMPLATE.matches(kernel(replace(case, x=(0, 12, 9, 11)), nothing, DType.F16), TARGET)
    halves, bias = kernel(case, nothing, DType.F16), kernel(case, nothing, DType.F32)
    assert not TEMPLATE.matches(without_conversions(halves), TARGET), "sums of f16 round differently"
    assert not TEMPLATE.matches(without_conversions(bias), TARGET), "f32 that nothing rounds is not tf32"


def without_conversions(fused: Fused) -> Fused:
    """Make a kernel whose convolution reads its inputs as they are."""
    x, w, b = fused.body.inputs
    b = call(Input("b", b.type.with_dtype(x.dtype)))
    conv = next(node.op for node in fused.body.nodes if isinstance(node.op, Conv))
    return Fused(Graph("kernel", (x, w, b), (call(conv, x, w, b),)), "conv")


def test_plain_layouts_are_left_to_others() -> None:
    x, w = call(Input("x", TensorType((1, 8, 5, 5), DType.F16))), call(Input("w", TensorType((8, 8, 1, 1), DType.F16)))
    wide = [call(Cast(DType.F32), value) for value in (x, w)]
    y = call(Conv((1, 1), (0,) * 4, (1, 1)), *wide)
    assert not TEMPLATE.matches(Fused(Graph("kernel", (x, w), (y,)), "conv"), TARGET)


def best(case: Case, target: Target = TARGET, dtype: DType = DType.F16) -> MmaParams:
    fused = kernel(case, nothing, dtype)
    schedule = min(TEMPLATE.space(fused, target), key=lambda schedule: TEMPLATE.cost(fused, schedule, target))
    return params_of(MmaParams, schedule)


def test_large_products_get_large_tiles_and_small_ones_parts() -> None:
    large = best(Case((32, 512, 28, 28), (1024, 512, 1, 1)))
    small = best(Case((1, 512, 7, 7), (512, 512, 3, 3), pad=(1, 1, 1, 1)))
    assert large.rows * large.columns >= 128 * 128
    assert large.splits == 1
    assert small.rows * small.columns < large.rows * large.columns
    assert small.splits > 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
def test_candidates_fit(arch: str) -> None:
    target = Target.parse(f"cuda:{arch}")
    for case, follow in CASES:
        found = [params_of(MmaParams, s) for s in TEMPLATE.space(kernel(case, follow, DType.F16), target)]
        assert found
        assert all(tile.shared_bytes <= GPUS[arch].most_shared_bytes and tile.splits in SPLITS for tile in found)
        assert len({replace(tile, splits=1) for tile in found}) >= len(TILES) - 2


@needs_nvcc
@types
@architectures
def test_tiles_stay_in_registers(arch: str, dtype: DType) -> None:
    target = Target.parse(f"cuda:{arch}")
    fused = kernel(Case((8, 64, 28, 28), (256, 64, 3, 3), pad=(1, 1, 1, 1), bias=True), residual, dtype)
    for number in (0, 2, 6, 8):
        source = source_of(fused, TILES[number], "hot", target)
        cubin = compile_fatbin(source, target)
        (usage,) = cubin.usage
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0), TILES[number]
        # As many as let the blocks be resident that the cost model counts on.
        assert resident(TILES[number], target) * TILES[number].threads * usage.registers <= 1 << 16


@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize(
    ("dtype", "product"),
    [
        (DType.F16, "HMMA.16816.F32"),
        (DType.BF16, "HMMA.16816.F32.BF16"),
        (DType.F32, "HMMA.1688.F32.TF32"),
    ],
    ids=str,
)
@architectures
def test_instructions(arch: str, dtype: DType, product: str, tmp_path: Path) -> None:
    """Tensor cores, asynchronous copies past the registers, matrices from shared memory: and nothing else there."""
    target = Target.parse(f"cuda:{arch}")
    fused = kernel(Case((8, 64, 28, 28), (256, 64, 3, 3), pad=(1, 1, 1, 1), bias=True), residual, dtype)
    tile = TILES[2]
    count = instructions(source_of(fused, tile, "hot", target), target, tmp_path)
    each = tile.warp_rows // 16 * (tile.warp_columns // 8) * (tile.depth // 2)
    copies = tile.depth * (tile.rows + tile.columns) // tile.threads
    assert count(rf"{re.escape(product)}\b") == count("HMMA") >= each
    assert count(r"LDGSTS\.E(\.BYPASS)?(\.LTC128B)?\.128") == count("LDGSTS") == copies * tile.stages
    assert (
        count(r"LDSM\.16\.M88\.4")
        == count("LDSM")
        >= (tile.warp_rows // 16 + tile.warp_columns // 16) * tile.depth // 2
    )
    assert count("STS") == count("LDS\\b") == count("LDL") == count("STL") == 0
