"""Products of groups of four warps whose tiles are copied as boxes: every tile on odd shapes; faults; machine code."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cache import DiskCache
from cnnc.backends.cuda import conv_mma, matmul_mma
from cnnc.backends.cuda.codegen import CudaSource
from cnnc.backends.cuda.conv_tma import ConvTma, image_map, weight_map
from cnnc.backends.cuda.kernels import KernelJob, compile_kernels
from cnnc.backends.cuda.machine import GPUS
from cnnc.backends.cuda.matmul_tma import MatMulTma, matrix_map
from cnnc.backends.cuda.mma_params import TMA_TILES, TmaParams, resident
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.backends.lower.template import params_of
from cnnc.ir.types import DType
from cnnc.ops import MatMul
from cnnc.ops.fused import Fused
from cnnc.target import Target
from tests.backends.cuda import test_matmul_mma as matmuls
from tests.backends.cuda.disassembler import instructions, needs_disassembler
from tests.backends.cuda.emulator import Emulator, needs_gxx
from tests.backends.cuda.test_conv_gemm import Case
from tests.backends.cuda.test_conv_mma import CASES, check, kernel, nothing, relu, residual, slow
from tests.backends.cuda.test_nvcc import needs_nvcc, parts_of
from tests.backends.cuda.test_wgmma import best
from tests.backends.cuda.warp_groups import TARGET, check_convolutions, check_products, source_of

CONV, MATMUL = ConvTma(), MatMulTma()

types = pytest.mark.parametrize("dtype", [DType.F16, pytest.param(DType.BF16, marks=slow)], ids=str)

WINDOWS = [
    *CASES,
    # Images that begin within a tile, pads that differ, windows of several strides.
    (Case((5, 16, 7, 5), (24, 16, 3, 3), stride=(2, 3), pad=(1, 2, 0, 1)), relu),
    (Case((3, 40, 11, 9), (16, 40, 5, 3), stride=(3, 1), pad=(4, 0, 3, 2), dilation=(2, 3)), nothing),
    (Case((2, 24, 20, 20), (8, 24, 1, 1), stride=(8, 8)), nothing),
]


@needs_gxx
@types
def test_convolutions(dtype: DType, tmp_path: Path) -> None:
    check_convolutions(CONV, TMA_TILES, WINDOWS, dtype, tmp_path)


@needs_gxx
@types
def test_products(dtype: DType, tmp_path: Path) -> None:
    check_products(MATMUL, TMA_TILES, dtype, tmp_path)


@needs_gxx
def test_an_infinite_number_stays_where_it_is(tmp_path: Path) -> None:
    """Beyond the depth both operands are 0: numbers of another image are not multiplied by zeros there."""
    fused = kernel(Case((2, 8, 5, 5), (8, 8, 3, 3), pad=(1, 1, 1, 1)), nothing, DType.F16)
    source = source_of(CONV, fused, TMA_TILES[-1], "conv")
    x, w = (np.ones(v.type.static_shape, np.float16) for v in fused.body.inputs)
    x[1, 3, 2, 2] = np.inf
    (result,) = Emulator([source], tmp_path).run_fused(source, fused, [x, w])
    (wanted,) = fused.reference(x.astype(np.float64), w.astype(np.float64))
    np.testing.assert_array_equal(result, np.asarray(wanted).astype(np.float16))


FAULTS = {
    "no wait for copies": (r"cnnc_tma_wait\(.*\);", ""),
    "a wait for another phase": (r"(cnnc_tma_wait\(.*), .*\);", r"\1, 0);"),
    "bytes that are not expected": (r"(cnnc_tma_expect\(.*), 24576\)", r"\1, 24560)"),
    "no barrier of the block": (r"__syncthreads\(\);\n(?!  sums)", ""),
    "no barrier before the first copies": (r"__syncthreads\(\);\n  sums", "  sums"),
    "no fence for barriers": (r"cnnc_tma_fence\(\);", ""),
    "no fence for sums": (r"cnnc_wgmma_fence<\d+>\(.*\);", ""),
    "products of no group": (r"cnnc_wgmma_commit\(\);", ""),
    "sums used before they are there": (r"cnnc_wgmma_wait<0, \d+>\(.*\);", ""),
    "a stage overwritten while it is multiplied": (r"cnnc_wgmma_wait<1,", "cnnc_wgmma_wait<2,"),
    "another stride": (r", 2048, 128\)", ", 2048, 256)"),
    "chunks that lie elsewhere": (r", 2048, 128\)", ", 1024, 128)"),
    "a swizzle": (r", 2048, 128\)", ", 2048, 128) ^ 1ull << 62"),
    "another tap": (r"(cnnc_tma_im2col_5\(.*), 0\);", r"\1, 1);"),
    "weights of another place": (r"(cnnc_tma_tiled_2\(.*), (\S+)\);", r"\1, \2 + 1);"),
    "every thread copies": (r"if \(\(\(int\)threadIdx\.x\) == 0\)", "if (threadIdx.x < 2)"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fused, dict[str, CudaSource], Emulator]:
    """A kernel with each fault; as it is, it is right."""
    fused = kernel(Case((1, 192, 6, 6), (64, 192, 3, 3), pad=(1, 1, 1, 1)), nothing, DType.F16)
    whole = source_of(CONV, fused, TmaParams(128, 64, 2, 4), "whole")
    sources = {"": whole}
    start = whole.text.index('extern "C" __global__')
    for number, (fault, change) in enumerate(FAULTS.items()):
        text = whole.text[:start] + re.sub(*change, whole.text[start:])
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


@pytest.mark.parametrize(
    ("case", "taken"),
    [
        (Case((1, 8, 40, 40), (8, 8, 3, 3), dilation=(15, 15)), False),  # corners of -30
        (Case((1, 8, 60, 60), (8, 8, 3, 3), pad=(15, 15, 15, 15), dilation=(15, 15)), True),
        (Case((1, 8, 60, 60), (8, 8, 3, 3), pad=(16, 16, 16, 16), dilation=(16, 16)), False),  # a tap 32 away
        (Case((1, 8, 9, 9), (8, 8, 1, 1), pad=(17, 0, 0, 0)), False),
        (Case((1, 8, 9, 9), (8, 8, 1, 1), pad=(0, 0, 0, 16)), False),
        (Case((1, 8, 40, 40), (8, 8, 1, 1), stride=(8, 8)), True),
        (Case((1, 8, 40, 40), (8, 8, 1, 1), stride=(9, 9)), False),
    ],
)
def test_limits_of_maps(case: Case, taken: bool) -> None:
    """What they leave is for copies of chunks."""
    fused = kernel(case, nothing, DType.F16)
    assert CONV.matches(fused, TARGET) == taken
    assert best(fused).template != "conv_tma" or taken


def test_maps() -> None:
    """By hand: two images of three blocks of channels, of 5 by 7; a layer; matrices the other way round."""
    case = Case((2, 24, 5, 7), (40, 24, 3, 2), stride=(2, 1), pad=(1, 0, 2, 1), dilation=(1, 3))
    found = conv_mma.matched(kernel(case, nothing, DType.BF16))
    assert found is not None
    image, weight = image_map(found, 128), weight_map(found, 192)
    assert (image.dtype, image.shape, image.box) == ("bf16", (8, 7, 5, 2, 3), (8, 128))
    assert image.strides == (16, 7 * 16, 3 * 5 * 7 * 16, 5 * 7 * 16)
    assert (image.lower, image.upper, image.steps) == ((0, -1, 0), (1 - 3, 2 - 2, 0), (1, 1, 2, 1, 1))
    assert (weight.shape, weight.strides, weight.box) == ((2 * 40, 3 * 2 * 3), (40 * 16,), (192, 1))
    product = matmul_mma.matched(matmuls.product(((2, 3, 21, 72), (2, 1, 72, 8), MatMul()), DType.F16))
    assert product is not None
    left, right = matrix_map(product.left, 256), matrix_map(product.right, 64)
    assert (left.shape, left.strides, left.box) == ((72, 21, 6), (144, 21 * 144), (64, 256, 1))
    assert (right.shape, right.strides, right.box) == ((8, 72, 2), (16, 72 * 16), (64, 64, 1))
    assert left.swizzled
    assert right.swizzled
    assert not image.swizzled
    assert not weight.swizzled


def test_large_products_are_copied_in_boxes_and_small_ones_are_not() -> None:
    large = kernel(Case((32, 512, 28, 28), (1024, 512, 1, 1)), nothing, DType.F16)
    windows = kernel(Case((32, 256, 28, 28), (256, 256, 3, 3), pad=(1, 1, 1, 1)), nothing, DType.F16)
    small = kernel(Case((1, 512, 7, 7), (512, 512, 3, 3), pad=(1, 1, 1, 1)), nothing, DType.F16)
    layer = matmuls.kernel(((4096, 1024), (4096, 1024), True, matmuls.relu), DType.F16)
    row = matmuls.kernel(((16, 1024), (1024, 1024), True, matmuls.relu), DType.F16)
    chosen = [best(fused).template for fused in (large, windows, small, layer, row)]
    assert chosen == ["conv_tma", "conv_tma", "conv_mma", "matmul_tma", "matmul_mma"]
    tile = params_of(TmaParams, best(windows))
    assert tile.rows < tile.columns, "lines of pixels are short, those of weights are not"


def test_candidates_fit() -> None:
    for case, follow in CASES:
        fused = kernel(case, follow, DType.F16)
        found = [params_of(TmaParams, schedule) for schedule in CONV.space(fused, TARGET)]
        assert {replace(tile, splits=1) for tile in found} == set(TMA_TILES)
        assert all(tile.shared_bytes <= GPUS[TARGET.arch].most_shared_bytes for tile in found)


def hot(number: int, dtype: DType = DType.F16) -> CudaSource:
    fused = kernel(Case((8, 64, 28, 28), (256, 64, 3, 3), pad=(1, 1, 1, 1), bias=True), residual, dtype)
    return source_of(CONV, fused, TMA_TILES[number], "hot")


def hot_layer(number: int) -> CudaSource:
    fused = matmuls.kernel(((512, 768), (3072, 768), True, matmuls.residual), DType.F16)
    return source_of(MATMUL, fused, TMA_TILES[number], "hot")


@needs_nvcc
@pytest.mark.parametrize("make", [hot, hot_layer])
@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=slow) for n in range(1, 8))])
def test_tiles_stay_in_registers(number: int, make: Callable[[int], CudaSource]) -> None:
    """In machine code of the one architecture, without PTX, and as many as let the blocks be resident."""
    source, tile = make(number), TMA_TILES[number]
    fatbin = compile_fatbin(source, TARGET)
    (usage,) = fatbin.usage
    assert (usage.stack_bytes, usage.spill_bytes) == (0, 0)
    assert resident(tile, TARGET) * tile.threads * usage.registers <= 1 << 16
    assert parts_of(fatbin.code) == [("elf", 90)]
    assert source.launches[0].shared_bytes == tile.shared_bytes


@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize(
    ("dtype", "name"), [(DType.F16, "F32"), pytest.param(DType.BF16, "F32.BF16", marks=slow)], ids=str
)
def test_instructions(dtype: DType, name: str, tmp_path: Path) -> None:
    """Products, two waits for them in all, copies of boxes, and nothing else that fills shared memory."""
    tile = TMA_TILES[0]
    count = instructions(hot(0, dtype), TARGET, tmp_path)
    assert count(rf"HGMMA\.64x{tile.columns}x16\.{re.escape(name)}\b") == count("HGMMA") > 0
    assert count(r"WARPGROUP\.DEPBAR") == 2, "more would mean that products wait for each other"
    # Those of two stages ahead, and one in the loop.
    assert count(r"UTMALDG\.5D\.IM2COL") == tile.depth * (tile.stages - 1)
    assert count(r"UTMALDG\.2D") == 2 * tile.depth * (tile.stages - 1)
    assert count("UTMALDG") == 3 * tile.depth * (tile.stages - 1)
    assert count(r"SYNCS\.EXCH") == tile.stages, "barriers made"
    assert count(r"SYNCS\.PHASECHK") > 0
    assert count("LDGSTS") == count("STS") == count("LDS(?! RZ)") == count("LDSM") == count("LDL") == count("STL") == 0


@needs_nvcc
@needs_disassembler
def test_instructions_of_layers(tmp_path: Path) -> None:
    count = instructions(hot_layer(0), TARGET, tmp_path)
    assert count(r"UTMALDG\.3D") == count("UTMALDG") > 0
    assert count(r"HGMMA\.64x256x16\.F32\b") == count("HGMMA") > 0
    assert count("LDGSTS") == count("STS") == count("LDSM") == count("LDL") == count("STL") == 0


@needs_nvcc
@needs_disassembler
@slow
def test_transposing_is_done_by_the_product(tmp_path: Path) -> None:
    fused = matmuls.product(((8, 128, 64), (8, 64, 256), MatMul(transpose_a=False)), DType.F16)
    count = instructions(source_of(MATMUL, fused, TMA_TILES[3], "hot"), TARGET, tmp_path)
    assert count(r"HGMMA\.64x128x16\.F32\b.*tnspB") == count("HGMMA") > 0
    assert count(r"UTMALDG\.3D") == count("UTMALDG") > 0
    assert count("STS") == count("LDSM") == count("PRMT") == count("LDL") == count("STL") == 0


@pytest.mark.usefixtures("emulating_nvcc")
@needs_gxx
def test_maps_are_remembered_with_the_code(tmp_path: Path) -> None:
    jobs = {"hot": KernelJob("hot", lambda: hot(0))}
    first, _ = compile_kernels(jobs, TARGET, DiskCache(tmp_path), lambda *step: None)
    again, compiled = compile_kernels(jobs, TARGET, DiskCache(tmp_path), lambda *step: None)
    assert compiled == 0
    assert again == first
    (launch,), (described,) = first["hot"].launches, first["hot"].describe()
    assert [position for position, _ in launch.maps] == [0, 1]
    assert [described["tensor_cores"], described["shared_bytes"]] == [True, TMA_TILES[0].shared_bytes]
