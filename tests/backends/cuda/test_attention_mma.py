"""Attention on tensor cores: odd sizes, one query, few keys, masks, large scores; what is left to others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.attention_mma import TILES, AttentionMma, AttentionMmaParams, matched
from cnnc.backends.cuda.codegen import CudaSource, cuda_source
from cnnc.backends.cuda.machine import GPUS
from cnnc.backends.cuda.nvcc import compile_fatbin
from cnnc.backends.cuda.templates import TEMPLATES
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Cast
from cnnc.ops.attention import Attention
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input
from cnnc.target import CUDA_ARCHS, Target
from tests.backends.cuda.disassembler import instructions, needs_disassembler
from tests.backends.cuda.emulator import Emulator, needs_gxx
from tests.backends.cuda.test_attention import BF16, F16, F32, Case, apart, joined, without_each
from tests.backends.cuda.test_attention import kernel as any_kernel
from tests.backends.cuda.test_conv_mma import architectures, drawn
from tests.backends.cuda.test_generic import ORDERS
from tests.backends.cuda.test_matvec import cheapest
from tests.backends.cuda.test_nvcc import needs_nvcc

TARGET = Target.parse("cuda:sm_80")
TEMPLATE = AttentionMma()

slow = pytest.mark.slow

CASES: list[Case] = [
    (joined(3, 64), 1, 83, 83, None, F16),
    (apart(2, 16, 32), 2, 5, 77, None, F16),
    (apart(1, 24, 40), 2, 1, 200, (200,), F16),
    (apart(2, 128, 64), 2, 70, 33, (2, 1, 1, 33), F16),
    (joined(2, 8), 1, 50, 50, (50, 50), F16),
    (Attention(2, 24, 8, -0.7, (0, 8, 8), (24, 32, 8)), 1, 3, 1, None, F16),
    (Attention(3, 16, 128, 1.0, (0, 16, 32), (160, 160, 160)), 2, 33, 33, (2, 1, 1, 33), F16),
    (apart(1, 64, 104), 3, 40, 128, (3, 1, 40, 1), F16),
]

VIT: Case = (joined(3, 64), 1, 197, 197, None, F16)


def kernel(case: Case, narrow: bool = True) -> Fused:
    """Give the kernel; features of no head are whole chunks."""
    return any_kernel(case, (8, 0, 16), narrow)


def source_of(fused: Fused, tile: AttentionMmaParams, symbol: str, target: Target = TARGET) -> CudaSource:
    assert TEMPLATE.matches(fused, target)
    return cuda_source(TEMPLATE.build(fused, schedule_of(TEMPLATE.name, tile), target), symbol, target)


def with_rounded_shares(fused: Fused, tile: AttentionMmaParams, arrays: list[np.ndarray]) -> np.ndarray:
    """Compute in f64 what the kernel does: of each tile, shares are rounded before values are multiplied by them."""
    found = matched(fused)
    assert found is not None
    op, given = found.op, dict(zip(fused.body.inputs, (array.astype(np.float64) for array in arrays), strict=True))
    stored = [given[value] for value in found.stored]

    def head(which: int) -> np.ndarray:
        size = op.value_size if which == 2 else op.size
        starts = op.starts[which] + op.steps[which] * np.arange(op.heads)
        return np.stack([stored[which][:, :, start : start + size] for start in starts], axis=1)

    scores = head(0) @ head(1).swapaxes(2, 3) * op.scale + (stored[3] if len(stored) > 3 else 0)
    warp = np.arange(found.shape.keys) % tile.keys // tile.warp_keys
    largest, total, sums = [], [], []
    for part in range(tile.across):
        so_far = np.full((*scores.shape[:3], 1), -np.inf)
        sums.append(np.zeros((*scores.shape[:3], op.value_size)))
        total.append(np.zeros_like(so_far))
        for first in range(0, found.shape.keys, tile.keys):
            keys = np.arange(first, min(first + tile.keys, found.shape.keys))
            keys = keys[warp[keys] == part]
            if keys.size:
                new = np.maximum(so_far, scores[..., keys].max(3, keepdims=True))
                shares = np.exp(scores[..., keys] - new)
                total[part] = total[part] * np.exp(so_far - new) + shares.sum(3, keepdims=True)
                rounded = shares.astype(np.float32).astype(found.stored[2].dtype.numpy).astype(np.float64)
                sums[part] = sums[part] * np.exp(so_far - new) + rounded @ head(2)[:, :, keys]
                so_far = new
        largest.append(so_far)
    scale = [np.exp(one - np.max(largest, axis=0)) for one in largest]
    y = sum(a * b for a, b in zip(sums, scale, strict=True)) / sum(a * b for a, b in zip(total, scale, strict=True))
    batch, heads, queries, _ = y.shape
    return np.asarray(y.transpose(0, 2, 1, 3).reshape(batch, queries, heads * op.value_size) + [*given.values()][-1])


def check(emulator: Emulator, source: CudaSource, fused: Fused, rng: np.random.Generator) -> np.ndarray:
    """Hold a kernel against the interpreter, in all orders of threads.

    Rounding changes a share by at most half a step, and so a mean of values by that of the largest; what is stored is
    rounded once more.
    """
    arrays = drawn(fused, rng)
    (wanted,) = fused.reference(*(array.astype(np.float64) for array in arrays))
    found = matched(fused)
    assert found is not None
    values = dict(zip(fused.body.inputs, arrays, strict=True))[found.stored[2]]
    half_step = {F16: 2.0**-11, BF16: 2.0**-8}[found.stored[2].dtype]
    last_place = 0 if fused.body.outputs[0].dtype is F32 else half_step
    results = [emulator.run_fused(source, fused, arrays, order)[0] for order in ORDERS]
    for result in results:
        error = np.abs(result.astype(np.float64) - wanted)
        bound = half_step * np.abs(values.astype(np.float64)).max() + last_place * np.abs(wanted) + 1e-5
        assert (error <= bound).all(), (source.symbol, error.max())
        assert result.tobytes() == results[0].tobytes(), source.symbol
    return results[0]


@needs_gxx
@pytest.mark.parametrize("dtype", [F16, pytest.param(BF16, marks=slow)], ids=str)
def test_every_tile_computes_every_case(dtype: DType, tmp_path: Path) -> None:
    """Tiles take turns, so that each case meets several, and each tile a case."""
    jobs = []
    for number, (*sizes, _) in enumerate(CASES):
        fused = kernel((*sizes, dtype))
        tiles = [params_of(AttentionMmaParams, schedule) for schedule in TEMPLATE.space(fused, TARGET)]
        for tile in tiles[number :: len(CASES)]:
            source = source_of(fused, tile, f"attention{number}_{tiles.index(tile)}")
            jobs.append((fused, tile, source))
            found = matched(fused)
            assert found is not None
            (launch,) = source.launches
            assert launch.shared_bytes == tile.shared_bytes(found.shape)
    emulator = Emulator([source for *_, source in jobs], tmp_path)
    rng = np.random.default_rng(4)
    for fused, _, source in jobs:
        check(emulator, source, fused, rng)


@needs_gxx
@pytest.mark.parametrize(
    ("tile", "dtype"), [(AttentionMmaParams(2, 1, 2, 64, 2), BF16), (AttentionMmaParams(1, 2, 1, 32, 3), F16)]
)
def test_only_shares_are_rounded(tile: AttentionMmaParams, dtype: DType, tmp_path: Path) -> None:
    """With shares rounded as they are, hardly an error is left: one in some thousand falls to the other side."""
    for case in ((joined(2, 24), 1, 83, 83, None, dtype), (apart(1, 64, 16), 2, 9, 150, (9, 150), dtype)):
        fused = kernel(case, narrow=False)
        source = source_of(fused, tile, "rounded")
        arrays = drawn(fused, np.random.default_rng(8))
        (result,) = Emulator([source], tmp_path).run_fused(source, fused, arrays)
        (exact,) = fused.reference(*(array.astype(np.float64) for array in arrays))
        error = np.abs(result - with_rounded_shares(fused, tile, arrays)).mean()
        assert error < 0.02 * np.abs(result - exact).mean()
        assert error < 2e-6 if dtype is F16 else error < 2e-5


@needs_gxx
def test_infinite_and_missing_numbers(tmp_path: Path) -> None:
    """Rows that a mask leaves nothing of are NaN, as are those with NaN; large scores and masks overflow nowhere."""
    fused = kernel((apart(1, 16, 8), 1, 7, 70, (7, 70), F16), narrow=False)
    tiles = AttentionMmaParams(1, 1, 1, 32, 2), AttentionMmaParams(1, 1, 2, 32, 2)
    sources = [source_of(fused, tile, f"infinite{tile.across}") for tile in tiles]
    rng = np.random.default_rng(5)
    arrays = drawn(fused, rng)
    q, k, _, mask, _ = arrays
    mask[0] = -np.inf
    mask[1, :65] = -np.inf
    mask[2, 3] = np.inf
    mask[3, 69] = np.nan
    mask[4] = np.finfo(np.float32).min
    q[0, 5] *= np.float16(1e4)
    k[0, 66] *= np.float16(1e4)
    mask[6] = -1e30
    with np.errstate(invalid="ignore"):
        (wanted,) = fused.reference(*(array.astype(np.float64) for array in arrays))
    assert np.isnan(wanted).all(axis=(0, 2)).tolist() == [True, False, True, True, False, False, False]
    emulator = Emulator(sources, tmp_path)
    for source in sources:
        for order in ORDERS:
            (result,) = emulator.run_fused(source, fused, arrays, order)
            np.testing.assert_allclose(result, wanted, rtol=1e-3, atol=2e-3)


@needs_gxx
def test_large_scores(tmp_path: Path) -> None:
    """Of thousands, without a mask: the first key is the largest, then the last; each is a tile of its own."""
    fused = kernel((apart(1, 32, 16), 1, 20, 97, None, F16), narrow=False)
    source = source_of(fused, AttentionMmaParams(1, 2, 1, 32, 3), "large")
    arrays = drawn(fused, np.random.default_rng(6))
    q, k, v, _ = arrays
    q *= np.float16(100)
    k *= np.float16(100)
    k[0, 0], k[0, 96] = q[0, 0, :32], q[0, 1, :32]
    (wanted,) = fused.reference(*(array.astype(np.float64) for array in arrays))
    emulator = Emulator([source], tmp_path)
    for order in ORDERS:
        (result,) = emulator.run_fused(source, fused, arrays, order)
        np.testing.assert_allclose(result, wanted, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(wanted[0, 0] - arrays[-1][0, 0], v[0, 0, :16], rtol=1e-3)


@needs_gxx
def test_what_is_missing_would_show(tmp_path: Path) -> None:
    """Each barrier, and each wait: for queries and the first keys, for the next tile, for parts of other warps."""
    fused = kernel((joined(1, 16), 1, 110, 110, None, F16))
    source = source_of(fused, AttentionMmaParams(1, 2, 2, 32, 3), "unsafe")
    barriers, waits = (without_each(source, text) for text in ("__syncthreads();", "cnnc_tc_wait<1>();"))
    assert (len(barriers), len(waits)) == (3, 2)
    start = source.text.index('extern "C" __global__')
    short = source.text[:start] + source.text[start:].replace("cnnc_tc_wait<1>", "cnnc_tc_wait<2>")
    short = re.sub(r"\bunsafe_kernel", "short_kernel", short)
    launches = (replace(source.launches[0], function="short_kernel"),)
    unsafe = [*barriers, *waits, replace(source, symbol="short", text=short, launches=launches)]
    emulator = Emulator([source, *unsafe], tmp_path)
    check(emulator, source, fused, np.random.default_rng(1))
    for one in unsafe:
        with pytest.raises(AssertionError):
            check(emulator, one, fused, np.random.default_rng(1))


@pytest.mark.parametrize(
    "op",
    [
        apart(1, 12, 16),
        apart(1, 16, 20),
        apart(1, 136, 16),
        apart(1, 16, 256),
        Attention(1, 16, 16, 1.0, (4, 0, 0), (16, 16, 16)),
        Attention(2, 16, 16, 1.0, (0, 0, 0), (16, 20, 16)),
    ],
    ids=str,
)
def test_leaves_odd_heads_to_others(op: Attention) -> None:
    """Heads that are no whole chunks, or begin within one, or are large."""
    fused = kernel((op, 1, 20, 20, None, F16))
    assert not TEMPLATE.matches(fused, TARGET)
    assert cheapest(fused, TEMPLATES, TARGET).template != TEMPLATE.name


def test_leaves_other_types_to_others() -> None:
    """f32, two types at once, tensors whose tokens begin within a chunk; CPUs."""
    case: Case = (apart(1, 16, 16), 1, 20, 20, None, F16)
    assert TEMPLATE.matches(kernel(case), TARGET)
    assert not TEMPLATE.matches(kernel(case), Target.parse("cpu:x86-64-v3"))
    assert not TEMPLATE.matches(kernel((*case[:5], F32)), TARGET)
    assert not TEMPLATE.matches(any_kernel(case, (3, 0, 1)), TARGET)
    q, k = (call(Input(name, TensorType((1, 20, 16), dtype))) for name, dtype in (("q", F16), ("k", BF16)))
    wide = [call(Cast(F32), value) for value in (q, k, k)]
    mixed = Fused(Graph("kernel", (q, k), (call(case[0], *wide),)), "attention")
    assert not TEMPLATE.matches(mixed, TARGET)


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_narrow_attention_is_on_tensor_cores(arch: str) -> None:
    """Of ViT-tiny and CLIP, of one image and many; where there are few queries, warps share the keys."""
    target = Target.parse(f"cuda:{arch}")
    sizes = [(joined(3, 64), 1, 197, 197), (apart(32, 64, 64), 1, 1, 50), (joined(12, 64), 64, 197, 197)]
    sizes += [(joined(8, 40), 2, 4096, 4096)]
    kernels = [kernel((*size, None, dtype)) for size in sizes for dtype in (F16, BF16)]
    chosen = [cheapest(fused, TEMPLATES, target) for fused in kernels]
    assert {schedule.template for schedule in chosen} == {TEMPLATE.name}
    tiles = [params_of(AttentionMmaParams, schedule) for schedule in chosen]
    assert min(tile.across for tile in tiles[:4]) > 1
    assert max(tile.rows for tile in tiles[:2]) < min(tile.rows for tile in tiles[4:6])


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_costs_are_no_less_than_tensor_cores_take(arch: str) -> None:
    target = Target.parse(f"cuda:{arch}")
    fused = kernel((joined(16, 64), 16, 1024, 1024, None, F16))
    least = 4 * 16 * 16 * 1024 * 1024 * 64 / GPUS[arch].tensor_flops["f16"]
    costs = [TEMPLATE.cost(fused, schedule, target) for schedule in TEMPLATE.space(fused, target)]
    assert least < min(costs) < 5 * least


@needs_nvcc
@architectures
@pytest.mark.parametrize(
    ("case", "tile"),
    [
        (VIT, TILES[0]),
        (VIT, TILES[21]),
        pytest.param((joined(3, 128), 1, 197, 197, (197, 197), BF16), TILES[9], marks=slow),
        pytest.param((joined(3, 40), 1, 197, 197, None, BF16), TILES[3], marks=slow),
    ],
)
def test_tiles_stay_in_registers(case: Case, tile: AttentionMmaParams, arch: str) -> None:
    target, fused = Target.parse(f"cuda:{arch}"), kernel(case)
    found = matched(fused)
    assert found is not None
    (usage,) = compile_fatbin(source_of(fused, tile, "hot", target), target).usage
    assert (usage.stack_bytes, usage.spill_bytes) == (0, 0)
    assert tile.resident(found.shape, target) * tile.threads * usage.registers <= 1 << 16


@needs_nvcc
@needs_disassembler
@architectures
def test_instructions(arch: str, tmp_path: Path) -> None:
    """Nothing goes through shared memory but what is copied there; values are transposed by the load."""
    target, tile = Target.parse(f"cuda:{arch}"), AttentionMmaParams(1, 4, 1, 64, 2)
    fused = kernel((joined(3, 64), 1, 192, 192, None, F16))
    count = instructions(source_of(fused, tile, "hot", target), target, tmp_path)
    products = tile.fragments * tile.keys * (64 + 64) // 128
    assert count(r"HMMA\.16816\.F32\b") == count("HMMA") == products
    assert count(r"LDSM\.16\.M88\.4") == 4 + tile.keys * 64 // 256
    assert count(r"LDSM\.16\.MT88\.4") == tile.keys * 64 // 256
    assert count("LDGSTS") == count(r"LDGSTS\.E(\.BYPASS)?(\.LTC128B)?\.128") == 4 + 2 * 8
    assert count("MUFU.EX2") == tile.warp_rows * tile.keys // 32 + 2
    assert count(r"F2FP(\.F16)?(\.F32)?") >= tile.warp_rows * tile.keys // 64
    assert count("STS") == count("LDS\\b") == count("LDL") == count("STL") == 0
