"""Products of f32 matrices on ordinary cores: every tile on odd shapes, in parts; what is left to others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.codegen import CudaSource, cuda_source
from cnnc.backends.cuda.ffma_params import TILES, FfmaParams
from cnnc.backends.cuda.kernels import compiled
from cnnc.backends.cuda.machine import GPUS
from cnnc.backends.cuda.matmul_ffma import MatMulFfma, matched
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.backends.cuda.templates import TEMPLATES
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Dense, MatMul
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input
from cnnc.target import CUDA_ARCHS, Target
from tests.backends.cuda import test_matmul_mma as matmul_mma
from tests.backends.cuda.disassembler import instructions, needs_disassembler
from tests.backends.cuda.emulator import Emulator, needs_gxx
from tests.backends.cuda.test_conv_mma import architectures, check
from tests.backends.cuda.test_matmul_mma import Case, nothing, relu, residual
from tests.backends.cuda.test_matvec import cheapest, kernel
from tests.backends.cuda.test_nvcc import needs_nvcc

TARGET = Target.parse("cuda:sm_80")
TEMPLATE = MatMulFfma()
F32, F16 = DType.F32, DType.F16


def layer(case: Case) -> Fused:
    return kernel(case, F32, F32)


def product(
    left: tuple[int, ...],
    right: tuple[int, ...],
    op: MatMul,
    follow: Callable[[Value, list[Value]], Value] = nothing,
) -> Fused:
    inputs = [call(Input("a", TensorType(left))), call(Input("b", TensorType(right)))]
    y = follow(call(op, *inputs), inputs)
    return Fused(Graph("kernel", tuple(inputs), (y,)), "mat_mul")


LAYERS = [
    layer(((9, 64), (10, 64), True, nothing)),
    layer(((197, 40), (36, 40), False, relu)),
    layer(((2, 3, 5, 73), (67, 73), True, residual)),
    layer(((70, 6), (2, 6), True, relu)),
    layer(((33, 203), (131, 203), False, residual)),
    layer(((150, 1), (1, 1), True, relu)),
    layer(((17, 130), (66, 130), True, residual)),
]
"""Lines that begin at multiples of 16 bytes, of 8, and of 4; sums stored by fours, twos and ones."""

T, F = True, False
PRODUCTS = [
    product((3, 20, 40), (3, 40, 24), MatMul(), residual),
    product((2, 1, 33, 17), (3, 17, 71), MatMul(), relu),
    product((24, 40), (2, 34, 40), MatMul(F, T)),
    product((2, 3, 21, 70), (2, 1, 70, 6), MatMul(), residual),
    product((2, 51, 18), (2, 51, 40), MatMul(T, F)),
    product((2, 9, 71), (2, 66, 9), MatMul(T, T), residual),
    product((2, 37, 132), (4, 1, 132, 68), MatMul(), relu),
    product((5,), (3, 5, 6), MatMul(), residual),
    product((2, 35, 12), (12,), MatMul(), residual),
    product((7,), (7,), MatMul()),
]


def source_of(fused: Fused, tile: FfmaParams, symbol: str, target: Target = TARGET) -> CudaSource:
    assert TEMPLATE.matches(fused, target)
    return cuda_source(TEMPLATE.build(fused, schedule_of(TEMPLATE.name, tile), target), symbol, target)


def chunks(fused: Fused) -> int:
    found = matched(fused)
    assert found is not None
    return found.shape.chunks


def check_all(kernels: list[Fused], name: str, folder: Path, seed: int) -> None:
    """Tiles and parts take turns, so that each kernel meets two of them."""
    jobs = []
    for number, fused in enumerate(kernels):
        for turn in (0, 1):
            tile = TILES[(number + turn * (len(TILES) // 2 + seed)) % len(TILES)]
            parts = min(1 + 2 * turn, -(-chunks(fused) // tile.depth))
            jobs.append((fused, source_of(fused, replace(tile, splits=parts), f"{name}{number}_{turn}")))
    emulator = Emulator([source for _, source in jobs], folder)
    rng = np.random.default_rng(seed)
    for fused, source in jobs:
        check(emulator, source, fused, rng)


@needs_gxx
def test_layers(tmp_path: Path) -> None:
    check_all(LAYERS, "dense", tmp_path, 1)


@needs_gxx
def test_products_of_activations(tmp_path: Path) -> None:
    """Matrices either way round, batches that broadcast, vectors."""
    check_all(PRODUCTS, "product", tmp_path, 2)


FAULTS = {
    "no wait": (r"cnnc_tc_wait<\d>\(\);", "", 0),
    "a wait that is too short": (r"cnnc_tc_wait<1>\(\);", "cnnc_tc_wait<2>();", 0),
    "no barrier between stages": (r"__syncthreads\(\);", "", 1),
    "no barrier before slices add up": (r"(?s)(.*)__syncthreads\(\);", r"\1", 1),
    "copies that are never valid": (r"(cnnc_tc_copy(_piece<\d+>)?\(.*), [^,\n]*\);", r"\1, false);", 0),
    "copies that are always valid": (r"(cnnc_tc_copy(_piece<\d+>)?\(.*), [^,\n]*\);", r"\1, true);", 0),
    "the other piece of a chunk": (
        r"cnnc_tc_copy_piece<8>\((.*?), \((.*?) & 1\)",
        r"cnnc_tc_copy_piece<8>(\1, (~\2 & 1)",
        0,
    ),
}


@needs_gxx
def test_faults_would_show(tmp_path: Path) -> None:
    """The emulation finds what these kernels could get wrong: each change of the source gives wrong numbers."""
    fused = product((2, 40, 130), (2, 130, 36), MatMul())
    source = source_of(fused, FfmaParams(32, 32, 4, 4, 4, 8, 3), "hot")
    start = source.text.index('extern "C" __global__')
    faulty = []
    for number, (pattern, by, count) in enumerate(FAULTS.values()):
        text = re.sub(pattern, by, source.text[start:], count=count)
        assert text != source.text[start:], pattern
        (launch,) = source.launches
        launch = replace(launch, function=f"fault{number}_kernel")
        text = source.text[:start] + text.replace("hot_kernel", launch.function)
        faulty.append(CudaSource(f"fault{number}", text, (launch,)))
    emulator = Emulator([source, *faulty], tmp_path)
    check(emulator, source, fused, np.random.default_rng(1))
    for wrong in faulty:
        with pytest.raises(AssertionError):
            check(emulator, wrong, fused, np.random.default_rng(1))


def test_takes_f32_of_any_size() -> None:
    for fused in (*LAYERS, *PRODUCTS):
        assert TEMPLATE.matches(fused, TARGET)
        assert list(TEMPLATE.space(fused, TARGET))
        assert not TEMPLATE.matches(fused, Target.parse("cpu:x86-64-v3"))


def test_leaves_to_others() -> None:
    """Few rows, no rows, no depth, what is stored in 16 bits, weights in blocks, more products than a grid."""
    assert not TEMPLATE.matches(layer(((8, 16), (4, 16), True, nothing)), TARGET)
    assert not TEMPLATE.matches(layer(((0, 16), (4, 16), True, nothing)), TARGET)
    assert not TEMPLATE.matches(layer(((9, 0), (4, 0), True, nothing)), TARGET)
    assert not TEMPLATE.matches(kernel(((9, 16), (4, 16), True, nothing), F16, F16), TARGET)
    x, packed = call(Input("x", TensorType((9, 8)))), call(Input("w", TensorType((16, 8), layout=Layout("OI8o"))))
    assert not TEMPLATE.matches(Fused(Graph("kernel", (x, packed), (call(Dense(), x, packed),)), "dense"), TARGET)
    assert TEMPLATE.matches(product((65535, 2, 2), (2, 2), MatMul()), TARGET)
    assert not TEMPLATE.matches(product((65536, 2, 2), (2, 2), MatMul()), TARGET)


def best(fused: Fused, target: Target = TARGET) -> FfmaParams:
    schedule = cheapest(fused, TEMPLATES, target)
    assert schedule.template == TEMPLATE.name
    return params_of(FfmaParams, schedule)


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_layers_of_transformers_are_its_own(arch: str) -> None:
    """Large products get large tiles, small ones small tiles whose depth several warps share."""
    target = Target.parse(f"cuda:{arch}")
    large = best(layer(((4096, 4096), (4096, 4096), True, relu)), target)
    assert large.rows * large.columns >= 64 * 128
    assert large.splits == large.slices == 1
    for outputs, depth in ((576, 192), (192, 192), (768, 192), (192, 768)):
        small = best(layer(((197, depth), (outputs, depth), True, residual)), target)
        assert small.rows * small.columns <= 32 * 64
        assert small.slices > 1
    assert best(layer(((16, 4096), (512, 4096), True, relu)), target).splits > 1
    assert best(product((12, 197, 64), (12, 197, 64), MatMul(F, T)), target)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_costs_are_no_less_than_arithmetic_or_memory_takes(arch: str) -> None:
    target, gpu = Target.parse(f"cuda:{arch}"), GPUS[arch]
    for rows, outputs, depth in ((4096, 4096, 4096), (9, 8192, 8192)):
        fused = layer(((rows, depth), (outputs, depth), False, nothing))
        nbytes = 4 * (rows * depth + outputs * depth + rows * outputs)
        least, _ = gpu.roofline(2 * rows * outputs * depth, nbytes, None)
        cost = min(TEMPLATE.cost(fused, schedule, target) for schedule in TEMPLATE.space(fused, target))
        assert least < cost < 2 * least


@needs_nvcc
@architectures
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_tiles_stay_in_registers(every: int, arch: str) -> None:
    """Lines of all alignments, either way round, that take turns."""
    target = Target.parse(f"cuda:{arch}")
    hot = [
        layer(((512, 768), (3072, 768), True, residual)),
        product((8, 199, 65), (8, 65, 199), MatMul()),
        product((8, 64, 198), (8, 70, 64), MatMul(T, T), residual),
    ]
    for number, tile in list(enumerate(TILES))[::every]:
        source = source_of(hot[number % len(hot)], tile, "hot", target)
        (usage,) = compile_fatbin(source, target).usage
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0), tile
        assert usage.shared_bytes == tile.slice_bytes
        # As many as let the blocks be resident that the cost model counts on.
        resident = GPUS[arch].resident(tile.threads, tile.registers, tile.shared_bytes)
        assert GPUS[arch].resident(tile.threads, usage.registers, tile.shared_bytes) >= resident, tile


@needs_nvcc
@needs_disassembler
@architectures
def test_instructions(arch: str, tmp_path: Path) -> None:
    """Multiply-additions from registers, loads of 16 bytes, and copies past the registers: and nothing else there."""
    target = Target.parse(f"cuda:{arch}")
    tile = TILES[0]
    count = instructions(source_of(layer(((512, 768), (3072, 768), True, relu)), tile, "hot", target), target, tmp_path)
    copies = tile.depth * (tile.rows + tile.columns) // tile.threads
    assert count(r"LDGSTS\.E(\.BYPASS)?(\.LTC128B)?\.128") == count("LDGSTS") == copies * tile.stages
    loads = count(r"LDS\.128")
    assert loads == count("LDS") >= tile.thread_rows + tile.thread_columns
    assert count("FFMA") == loads // (tile.thread_rows + tile.thread_columns) * tile.sums * 4
    assert count(r"STG\.E\.128") == count("STG") == tile.sums // 4
    assert count("STS") == count("LDL") == count("STL") == 0


@needs_nvcc
@needs_disassembler
def test_instructions_of_lines_that_are_not_aligned(tmp_path: Path) -> None:
    """Copies are smaller, and nothing else."""
    tile = FfmaParams(32, 32, 4, 4, 4, 8, 4)
    for inner, size in ((65, ""), (66, r"\.64")):
        fused = product((4, 40, inner), (4, inner, 40), MatMul())
        count = instructions(source_of(fused, tile, "hot"), TARGET, tmp_path)
        assert count(rf"LDGSTS\.E{size}\b") > 0
        assert count(r"LDS\.128") == count("LDS") > 0
        assert count(r"STS\.128") == count("STS") == tile.sums // 4
        assert count("LDL") == count("STL") == 0


@needs_nvcc
def test_asynchronous_copies_are_no_tensor_cores() -> None:
    """A kernel's roofline is that of what multiplies; both have copies."""
    plain = source_of(LAYERS[0], TILES[-1], "plain")
    assert not compiled(plain, TARGET).tensor_cores
    rounded = matmul_mma.source_of(matmul_mma.kernel(matmul_mma.CASES[0], F16), matmul_mma.TILES[-1], "rounded")
    assert compiled(rounded, TARGET).tensor_cores
