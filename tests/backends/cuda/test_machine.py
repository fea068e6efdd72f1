"""Occupancy and roofline by examples worked out by hand, and by NVIDIA's occupancy calculator."""

from __future__ import annotations

import pytest

from cnnc.backends.cuda.machine import GPUS, MULTIPROCESSORS
from cnnc.target import CUDA_ARCHS


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "share", "limit"),
    [
        ("sm_80", 256, 32, 0, 1.0, "warps"),
        ("sm_80", 256, 33, 0, 0.75, "registers"),
        ("sm_80", 256, 64, 0, 0.5, "registers"),
        ("sm_80", 1024, 64, 0, 0.5, "registers"),
        ("sm_80", 128, 255, 0, 0.125, "registers"),
        ("sm_80", 32, 16, 0, 0.5, "blocks"),
        ("sm_80", 256, 32, 48 << 10, 3 * 8 / 64, "shared memory"),
        ("sm_80", 256, 32, 163 << 10, 8 / 64, "shared memory"),
        ("sm_86", 256, 40, 0, 1.0, "warps"),
        ("sm_86", 1024, 32, 0, 32 / 48, "warps"),
        ("sm_86", 32, 16, 0, 16 / 48, "blocks"),
        ("sm_89", 32, 16, 0, 24 / 48, "blocks"),
        ("sm_90", 128, 168, 64 << 10, 3 * 4 / 64, "registers"),
        ("sm_90", 128, 128, 64 << 10, 3 * 4 / 64, "shared memory"),
        ("sm_90", 100, 32, 0, 1.0, "warps"),
    ],
)
def test_occupancy(arch: str, threads: int, registers: int, shared: int, share: float, limit: str) -> None:
    assert GPUS[arch].occupancy(threads, registers, shared) == (share, limit)


def test_roofline() -> None:
    a100 = GPUS["sm_80"]
    assert a100.roofline(0, 2_040_000_000, None) == (1e-3, "memory")
    assert a100.roofline(19_500_000_000, 1, None) == (1e-3, "arithmetic")
    assert a100.roofline(312_000_000_000, 1, "f16") == (1e-3, "arithmetic")


def test_every_architecture_has_its_gpu() -> None:
    assert set(GPUS) == set(MULTIPROCESSORS) == set(CUDA_ARCHS)
    assert [GPUS[arch].most_shared_bytes >> 10 for arch in CUDA_ARCHS] == [163, 99, 99, 227, 227]
    for gpu in GPUS.values():
        assert set(gpu.tensor_flops) == {"tf32", "f16", "bf16"}
