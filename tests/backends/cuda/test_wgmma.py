"""Products of groups of four warps: every tile on odd shapes, either way round, in parts; faults; machine code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.codegen import CudaSource
from cnnc.backends.cuda.conv_wgmma import ConvWgmma
from cnnc.backends.cuda.machine import GPUS
from cnnc.backends.cuda.matmul_wgmma import MatMulWgmma
from cnnc.backends.cuda.mma_params import WGMMA_TILES, WgmmaParams, resident
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.backends.cuda.templates import TEMPLATES
from cnnc.backends.lower.template import params_of
from cnnc.ir.types import DType
from cnnc.ops import MatMul
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target
from tests.backends.cuda import test_matmul_mma as matmuls
from tests.backends.cuda.disassembler import instructions, needs_disassembler
from tests.backends.cuda.emulator import Emulator, needs_gxx
from tests.backends.cuda.test_conv_gemm import Case
from tests.backends.cuda.test_conv_mma import CASES, check, kernel, nothing, residual, slow
from tests.backends.cuda.test_nvcc import needs_nvcc, parts_of
from tests.backends.cuda.warp_groups import TARGET, check_convolutions, check_products, source_of

CONV, MATMUL = ConvWgmma(), MatMulWgmma()

types = pytest.mark.parametrize("dtype", [DType.F16, pytest.param(DType.BF16, marks=slow)], ids=str)


@needs_gxx
@types
def test_convolutions(dtype: DType, tmp_path: Path) -> None:
    check_convolutions(CONV, WGMMA_TILES, CASES, dtype, tmp_path)


@needs_gxx
@types
def test_products(dtype: DType, tmp_path: Path) -> None:
    check_products(MATMUL, WGMMA_TILES, dtype, tmp_path)


FAULTS = {
    "no wait for copies": (r"cnnc_tc_wait<\d>\(\);", ""),
    "a wait for copies that is too short": (r"cnnc_tc_wait<1>\(\);", "cnnc_tc_wait<2>();"),
    "copies that products cannot see": (r"cnnc_wgmma_publish\(\);", ""),
    "no barrier": (r"__syncthreads\(\);", ""),
    "no fence": (r"cnnc_wgmma_fence<\d+>\(.*\);", ""),
    "products of no group": (r"cnnc_wgmma_commit\(\);", ""),
    "sums used before they are there": (r"cnnc_wgmma_wait<0, \d+>\(.*\);", ""),
    "a stage overwritten while it is multiplied": (r"cnnc_wgmma_wait<1,", "cnnc_wgmma_wait<2,"),
    "a swizzle over 64 bytes": (r", 16, 1024\)", ", 16, 1024) ^ 3ull << 62"),
    "no swizzle": (r", 16, 1024\)", ", 16, 1024) ^ 1ull << 62"),
    "another stride": (r", 16, 1024\)", ", 16, 512)"),
    "a stage that begins elsewhere": (r"__align__\(1024\)", "__align__(64)"),
    "one group's rows for both": (r"\(\(int\)threadIdx\.x\) >> 7", "0"),
    "a warp that does not take part": (r"(cnnc_wgmma_f16<)", r"if (threadIdx.x >= 32) \1"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fused, dict[str, CudaSource], Emulator]:
    """A kernel with each fault; as it is, it is right."""
    fused = kernel(Case((1, 192, 6, 6), (64, 192, 3, 3), pad=(1, 1, 1, 1)), nothing, DType.F16)
    whole = source_of(CONV, fused, WgmmaParams(128, 64, 2, 4), "whole")
    sources = {"": whole}
    for number, (fault, change) in enumerate(FAULTS.items()):
        text = re.sub(*change, whole.text)
        assert text != whole.text, fault
        function = f"fault{number}_kernel"
        launches = tuple(replace(launch, function=function) for launch in whole.launches)
        sources[fault] = CudaSource(fault, text.replace("whole_kernel", function), launches)
    emulator = Emulator(list(sources.values()), tmp_path_factory.mktemp("faults"))
    check(emulator, whole, fused, np.random.default_rng(1))
    return fused, sources, emulator


@needs_gxx
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_show(fault: str, faulty: tuple[Fused, dict[str, CudaSource], Emulator]) -> None:
    fused, sources, emulator = faulty
    with pytest.raises(AssertionError):
        check(emulator, sources[fault], fused, np.random.default_rng(1))


def test_takes_what_has_16_bits_on_the_one_architecture() -> None:
    for dtype, taken in ((DType.F16, True), (DType.BF16, True), (DType.F32, False)):
        conv, layer = kernel(CASES[1][0], nothing, dtype), matmuls.kernel(matmuls.CASES[1], dtype)
        for arch in ("sm_80", "sm_90"):
            assert not CONV.matches(conv, Target.parse(f"cuda:{arch}"))
            assert not MATMUL.matches(layer, Target.parse(f"cuda:{arch}"))
        assert CONV.matches(conv, TARGET) == MATMUL.matches(layer, TARGET) == taken
    odd = matmuls.kernel(((7, 16), (5, 16), True, matmuls.nothing), DType.F16)
    assert not MATMUL.matches(odd, TARGET), "columns that are no pairs"


def best(fused: Fused, target: Target = TARGET, without: Sequence[str] = ()) -> Schedule:
    """Choose as the tile pass does, where some templates are not there."""
    templates = [t for t in TEMPLATES if t.name not in without and t.matches(fused, target)]
    found = [(t, s) for t in templates for s in t.space(fused, target)]
    return min(found, key=lambda pair: pair[0].cost(fused, pair[1], target))[1]


def test_large_products_are_for_groups_and_small_ones_are_not() -> None:
    large = kernel(Case((32, 512, 28, 28), (1024, 512, 1, 1)), nothing, DType.F16)
    small = kernel(Case((1, 512, 7, 7), (512, 512, 3, 3), pad=(1, 1, 1, 1)), nothing, DType.F16)
    assert (best(large, without=("conv_tma",)).template, best(small).template) == ("conv_wgmma", "conv_mma")
    assert best(large, Target.parse("cuda:sm_90")).template == "conv_mma"
    tile = params_of(WgmmaParams, best(large, without=("conv_tma",)))
    assert tile.rows * tile.columns >= 128 * 192
    layer = matmuls.kernel(((4096, 1024), (4096, 1024), True, matmuls.relu), DType.F16)
    row = matmuls.kernel(((16, 1024), (1024, 1024), True, matmuls.relu), DType.F16)
    assert (best(layer, without=("matmul_tma",)).template, best(row).template) == ("matmul_wgmma", "matmul_mma")


def test_candidates_fit() -> None:
    for case, follow in CASES:
        fused = kernel(case, follow, DType.F16)
        found = [params_of(WgmmaParams, schedule) for schedule in CONV.space(fused, TARGET)]
        assert {replace(tile, splits=1) for tile in found} == set(WGMMA_TILES)
        assert all(tile.shared_bytes <= GPUS[TARGET.arch].most_shared_bytes for tile in found)


def hot(number: int, dtype: DType = DType.F16) -> CudaSource:
    fused = kernel(Case((8, 64, 28, 28), (256, 64, 3, 3), pad=(1, 1, 1, 1), bias=True), residual, dtype)
    return source_of(CONV, fused, WGMMA_TILES[number], "hot")


@needs_nvcc
@pytest.mark.parametrize(
    "number", [0, 1, 3, pytest.param(2, marks=slow), *(pytest.param(n, marks=slow) for n in range(4, 8))]
)
def test_tiles_stay_in_registers(number: int) -> None:
    """In machine code of the one architecture, without PTX, and as many as let the blocks be resident."""
    tile, fatbin = WGMMA_TILES[number], compile_fatbin(hot(number), TARGET)
    (usage,) = fatbin.usage
    assert (usage.stack_bytes, usage.spill_bytes) == (0, 0)
    assert resident(tile, TARGET) * tile.threads * usage.registers <= 1 << 16
    assert parts_of(fatbin.code) == [("elf", 90)]


@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize(
    ("dtype", "name"), [(DType.F16, "F32"), pytest.param(DType.BF16, "F32.BF16", marks=slow)], ids=str
)
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=slow)])
def test_instructions(number: int, dtype: DType, name: str, tmp_path: Path) -> None:
    """Products from shared memory, two waits for them in all, asynchronous copies, and nothing else there."""
    tile = WGMMA_TILES[number]
    count = instructions(hot(number, dtype), TARGET, tmp_path)
    products = tile.group_rows // 64 * tile.depth // 2
    copies = tile.depth * (tile.rows + tile.columns) // tile.threads
    assert count(rf"HGMMA\.64x{tile.columns}x16\.{re.escape(name)}\b") == count("HGMMA") == products
    assert count(r"WARPGROUP\.DEPBAR") == 2, "more would mean that products wait for each other"
    assert count(r"LDGSTS\.E(\.BYPASS)?(\.LTC128B)?\.128") == count("LDGSTS") == copies * (tile.stages - 1)
    assert count("STS") == count("LDS(?! RZ)") == count("LDSM") == count("LDL") == count("STL") == count("HMMA") == 0


@needs_nvcc
@needs_disassembler
def test_transposing_is_done_by_the_product(tmp_path: Path) -> None:
    fused = matmuls.product(((8, 128, 64), (8, 64, 256), MatMul(transpose_a=False)), DType.F16)
    count = instructions(source_of(MATMUL, fused, WGMMA_TILES[3], "hot"), TARGET, tmp_path)
    assert count(r"HGMMA\.64x128x16\.F32\b.*tnspB") == count("HGMMA") > 0
    assert count("STS") == count("LDSM") == count("PRMT") == count("LDL") == count("STL") == 0
