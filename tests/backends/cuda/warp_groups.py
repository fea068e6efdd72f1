"""What the tests of products by groups of four warps share: every tile meets every kind of case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from cnnc.backends.cuda import conv_mma, matmul_mma
from cnnc.backends.cuda.codegen import CudaSource, cuda_source
from cnnc.backends.cuda.conv_wgmma import ConvWgmma
from cnnc.backends.cuda.matmul_wgmma import MatMulWgmma
from cnnc.backends.cuda.mma_params import WgmmaParams
from cnnc.backends.lower.template import schedule_of
from cnnc.ir.types import DType
from cnnc.ops.fused import Fused
from cnnc.target import Target
from tests.backends.cuda import test_matmul_mma as matmuls
from tests.backends.cuda.emulator import Emulator
from tests.backends.cuda.test_conv_mma import TYPES, Case, Follow, check, kernel

TARGET = Target.parse("cuda:sm_90a")


def source_of(template: ConvWgmma | MatMulWgmma, fused: Fused, tile: WgmmaParams, symbol: str) -> CudaSource:
    assert template.matches(fused, TARGET)
    return cuda_source(template.build(fused, schedule_of(template.name, tile), TARGET), symbol, TARGET)


Tiles: TypeAlias = Sequence[WgmmaParams]


def check_convolutions(
    template: ConvWgmma, tiles: Tiles, cases: Sequence[tuple[Case, Follow]], dtype: DType, folder: Path
) -> None:
    """Have tiles and parts take turns, so that each tile meets a case or two."""
    jobs = []
    for number, (case, follow) in enumerate(cases):
        fused = kernel(case, follow, dtype)
        found = conv_mma.matched(fused)
        assert found is not None
        tile = tiles[(number + 5 * TYPES.index(dtype)) % len(tiles)]
        parts = min(1 + number % 4, -(-conv_mma.shape_of(found).chunks // tile.depth))
        jobs.append((fused, source_of(template, fused, replace(tile, splits=parts), f"conv{number}")))
    _check_all(jobs, folder)


def check_products(template: MatMulWgmma, tiles: Tiles, dtype: DType, folder: Path) -> None:
    """Do the same with layers, and matrices of activations either way round, whose batches broadcast."""
    layers = [matmuls.kernel(case, dtype) for case in matmuls.CASES]
    products = [matmuls.product(case, dtype, matmuls.residual) for case in matmuls.PRODUCTS]
    jobs = []
    for number, fused in enumerate([*layers, *products]):
        found = matmul_mma.matched(fused)
        assert found is not None
        tile = tiles[(number * 3 + number // 8) % len(tiles)]
        parts = min(1 + number % 3, -(-found.shape.chunks // tile.depth))
        jobs.append((fused, source_of(template, fused, replace(tile, splits=parts), f"product{number}")))
    _check_all(jobs, folder)


def _check_all(jobs: list[tuple[Fused, CudaSource]], folder: Path) -> None:
    emulator = Emulator([source for _, source in jobs], folder)
    rng = np.random.default_rng(len(jobs))
    for fused, source in jobs:
        check(emulator, source, fused, rng)
