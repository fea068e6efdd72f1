"""Winograd's algorithm on ordinary cores: odd sizes in every tile against float64, its error, its barriers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda import winograd
from cnnc.backends.cuda.codegen import CudaSource, cuda_source
from cnnc.backends.cuda.ffma_params import FfmaParams
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.backends.cuda.winograd import Winograd, matched
from cnnc.backends.cuda.winograd_params import TILES
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Conv, Greater, Softmax
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input, constant
from cnnc.ops.winograd import WinogradWeight, winograd_rows_layout
from cnnc.target import Target
from tests.backends.cuda.emulator import Emulator, needs_gxx
from tests.backends.cuda.test_conv_gemm import Case as GemmCase
from tests.backends.cuda.test_conv_gemm import by_rows, gated, itself, masked, nothing, relu, scaled_residual
from tests.backends.cuda.test_conv_gemm import kernel as conv_gemm_kernel
from tests.backends.cuda.test_generic import check_orders
from tests.backends.cuda.test_nvcc import needs_nvcc

TARGET = Target.parse("cuda:sm_90")
TEMPLATE = Winograd()

BUDGET = {2: 8.0, 4: 64.0}
"""The largest error allowed, in units of eps * sum |x||w|, as for CPUs."""

Follow = Callable[[Value, list[Value]], Value]


@dataclass(frozen=True)
class Case:
    """A convolution by its sizes: x is (N, C, H, W), pads are (top, left, bottom, right)."""

    x: tuple[int, ...]
    outputs: int
    tile: int
    pad: tuple[int, int, int, int] = (1, 1, 1, 1)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    bias: bool = False

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.outputs, self.x[1], *self.kernel)

    @property
    def direct(self) -> Conv:
        return Conv(self.stride, self.pad, (1, 1))

    @property
    def transform(self) -> WinogradWeight:
        return WinogradWeight(self.tile, self.stride)


CASES: list[tuple[Case, Follow]] = [
    (Case((1, 3, 9, 7), 5, 4), by_rows),
    (Case((2, 9, 8, 12), 8, 4, bias=True), relu),
    (Case((3, 8, 5, 6), 33, 2, pad=(0, 2, 1, 0), bias=True), scaled_residual),
    (Case((2, 17, 13, 15), 66, 4, pad=(1, 0, 0, 1)), masked),
    (Case((1, 8, 10, 16), 4, 2), gated),
    (Case((1, 5, 7, 8), 5, 4), itself),
    (Case((2, 5, 3, 3), 3, 4, pad=(2, 2, 2, 2), bias=True), scaled_residual),
    (Case((1, 3, 11, 9), 6, 4, stride=(2, 2), bias=True), relu),
    (Case((2, 4, 9, 9), 5, 4, pad=(2, 2, 2, 2), kernel=(5, 5)), nothing),
    (Case((1, 4, 6, 13), 7, 2, pad=(0, 3, 0, 3), kernel=(1, 7)), relu),
    (Case((1, 3, 9, 35), 66, 2), nothing),
]


ROWS = winograd_rows_layout()


def kernel(case: Case, follow: Follow, dtype: DType = DType.F32, layout: Layout | None = ROWS) -> Fused:
    weight = case.transform.infer(TensorType(case.weight, dtype)).with_layout(layout)
    inputs = [call(Input("x", TensorType(case.x, dtype))), call(Input("u", weight))]
    if case.bias:
        inputs.append(call(Input("b", TensorType((case.outputs,), dtype))))
    conv = call(replace(case.direct, algorithm=f"winograd{case.tile}"), *inputs)
    output = follow(conv, inputs)
    return Fused(Graph("kernel", tuple(inputs), (output,)), "conv")


def source_of(fused: Fused, tile: FfmaParams, symbol: str) -> CudaSource:
    schedules = list(TEMPLATE.space(fused, TARGET))
    return cuda_source(TEMPLATE.build(fused, schedules[TILES.index(tile)], TARGET), symbol, TARGET)


def draw(case: Case, fused: Fused, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Give a weight, and the kernel's inputs with it transformed."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(case.weight, np.float32)
    arrays = [rng.standard_normal(v.type.static_shape, np.float32) for v in fused.body.inputs]
    arrays[1] = case.transform.reference(weight)
    return weight, arrays


def wanted(fused: Fused, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    exact = fused.reference(*(array.astype(np.float64) for array in arrays))
    return [result.astype(np.float32) for result in exact]


@needs_gxx
def test_every_tile_computes_every_case(tmp_path: Path) -> None:
    """Tiles take turns, each meets two cases; in several orders of threads, which must agree bit for bit."""
    jobs = []
    for number, (case, follow) in enumerate(CASES):
        fused = kernel(case, follow)
        assert TEMPLATE.matches(fused, TARGET)
        jobs.append((case, fused, source_of(fused, TILES[number % len(TILES)], f"winograd{number}")))
    emulator = Emulator([source for *_, source in jobs], tmp_path)
    for seed, (case, fused, source) in enumerate(jobs):
        _, arrays = draw(case, fused, seed)
        check_orders(emulator, source, fused, arrays, wanted(fused, arrays), tolerance=1e-4)
        assert len(source.launches) == 3
        assert source.scratch_bytes >= matched(fused).scratch_bytes


@needs_gxx
def test_the_error_is_within_the_budget(tmp_path: Path) -> None:
    """Of the convolution in float64, that of the weights' transform included."""
    cases = [Case((2, 40, 14, 13), 36, tile, pad=(1, 1, 0, 1)) for tile in (2, 4)]
    kernels = [kernel(case, nothing) for case in cases]
    sources = [source_of(fused, TILES[-1], f"error{case.tile}") for case, fused in zip(cases, kernels, strict=True)]
    emulator = Emulator(sources, tmp_path)
    for case, fused, source in zip(cases, kernels, sources, strict=True):
        for seed in range(3):
            weight, arrays = draw(case, fused, seed)
            (result,) = emulator.run_fused(source, fused, arrays)
            exact = case.direct.reference(arrays[0].astype(np.float64), weight.astype(np.float64))
            scale = case.direct.reference(abs(arrays[0]).astype(np.float64), abs(weight).astype(np.float64))
            error = float((abs(result - exact) / scale).max() / np.finfo(np.float32).eps)
            assert 0.1 < error < BUDGET[case.tile]


@needs_gxx
def test_results_of_other_types(tmp_path: Path) -> None:
    case = Case((1, 3, 8, 8), 4, 4)
    fused = kernel(case, lambda y, inputs: call(Greater(), y, constant(0.5)))
    source = source_of(fused, TILES[-1], "truth")
    _, arrays = draw(case, fused, 4)
    (result,) = Emulator([source], tmp_path).run_fused(source, fused, arrays)
    (exact,) = fused.reference(*(array.astype(np.float64) for array in arrays))
    assert result.dtype == exact.dtype == np.bool_
    assert 0 < result.sum() < result.size
    np.testing.assert_array_equal(result, exact)


@needs_gxx
def test_many_tiles_go_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three of them, the last with fewer tiles; the same numbers as at once."""
    case = Case((1, 2, 34, 39), 3, 2, bias=True)
    fused = kernel(case, scaled_residual)
    _, arrays = draw(case, fused, 1)
    at_once = source_of(fused, TILES[3], "at_once")
    matched.cache_clear()
    monkeypatch.setattr(winograd, "MOST_SCRATCH", at_once.scratch_bytes // 5 * 2)
    parted = source_of(fused, TILES[3], "parted")
    matched.cache_clear()
    assert (len(at_once.launches), len(parted.launches)) == (3, 9)
    assert parted.scratch_bytes < at_once.scratch_bytes / 2
    assert parted.launches[-1].grid < parted.launches[-4].grid
    emulator = Emulator([at_once, parted], tmp_path)
    (whole,) = emulator.run_fused(at_once, fused, arrays)
    check_orders(emulator, parted, fused, arrays, [whole], tolerance=0)


@needs_gxx
def test_a_missing_barrier_would_show(tmp_path: Path) -> None:
    """The emulation finds what the product could get wrong: a stage is filled again while others read it."""
    fused = kernel(Case((1, 72, 8, 60), 32, 2), nothing)
    source = source_of(fused, TILES[3], "unsafe")
    before, after = source.text.split("__syncthreads();")
    unsafe = replace(source, text=before + after)
    _, arrays = draw(Case((1, 72, 8, 60), 32, 2), fused, 2)
    emulator = Emulator([unsafe], tmp_path)
    with pytest.raises(AssertionError):
        check_orders(emulator, unsafe, fused, arrays, wanted(fused, arrays), tolerance=1e-4)


def normalized(y: Value, inputs: list[Value]) -> Value:
    """Need whole rows, of which a tile has a part."""
    return call(Softmax(-1), y)


@pytest.mark.parametrize(
    "refused",
    [
        conv_gemm_kernel(GemmCase((1, 4, 8, 6), (5, 4, 3, 3)), nothing),
        kernel(Case((1, 4, 8, 6), 5, 4), nothing, layout=None),
        kernel(Case((1, 4, 8, 6), 5, 4), nothing, DType.F16),
        kernel(Case((0, 4, 8, 6), 5, 4), nothing),
        kernel(Case((1, 4, 8, 6), 5, 4), normalized),
        kernel(Case((16, 512, 512, 512), 512, 4), nothing),
    ],
    ids=["direct", "weights not in rows", "narrow", "empty", "not elementwise", "more parts than there may be"],
)
def test_leaves_to_others(refused: Fused) -> None:
    assert not TEMPLATE.matches(refused, TARGET)


def test_is_for_gpus() -> None:
    fused = kernel(CASES[0][0], nothing)
    assert TEMPLATE.matches(fused, TARGET)
    assert not TEMPLATE.matches(fused, Target.parse("cpu:x86-64-v3"))


def test_large_products_get_large_tiles() -> None:
    def chosen(case: Case) -> int:
        fused = kernel(case, nothing)
        best = min(TEMPLATE.space(fused, TARGET), key=lambda schedule: TEMPLATE.cost(fused, schedule, TARGET))
        return best["rows"] * best["columns"]

    assert chosen(Case((4, 32, 28, 28), 32, 4)) < chosen(Case((16, 256, 64, 64), 512, 4)) == 128 * 128


@needs_nvcc
@pytest.mark.parametrize("number", range(len(TILES)))
def test_everything_stays_in_registers(number: int) -> None:
    fused = kernel(Case((8, 64, 28, 30), 128, 2 if number == 1 else 4, bias=True), scaled_residual)
    usage = compile_fatbin(source_of(fused, TILES[number], "hot"), TARGET).usage
    assert len(usage) == 3
    for function in usage:
        assert (function.stack_bytes, function.spill_bytes, function.shared_bytes) == (0, 0, 0)
        assert function.registers <= 128
