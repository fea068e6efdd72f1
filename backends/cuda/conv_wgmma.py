"""Convolution as a product of matrices that is never laid out, by groups of four warps: Hopper's own tensor cores.

    as in `conv_mma`, with numbers of 16 bits, where both operands stay in shared memory

`wgmma` multiplies half as much again as `mma` does on the same multiprocessor, in tiles of 64 rows and more; small
products are better off with the smaller ones of `conv_mma`.

NVIDIA's PTX ISA, "Asynchronous warpgroup level matrix instructions"; CUTLASS, "Implicit GEMM convolution".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cnnc.backends.cuda.conv_mma import ConvMma, matched
from cnnc.backends.cuda.mma_params import WGMMA_TILES, BlockTile, WgmmaParams
from cnnc.backends.cuda.wgmma import DTYPES
from cnnc.ops.fused import Fused
from cnnc.target import Target


@dataclass(frozen=True)
class ConvWgmma(ConvMma):
    """Convolutions of `conv_mma` whose operands have 16 bits, on the one architecture that has the instructions."""

    name: str = "conv_wgmma"
    tiles: ClassVar[tuple[BlockTile, ...]] = WGMMA_TILES
    params: ClassVar[type[BlockTile]] = WgmmaParams

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take what `conv_mma` takes but tf32."""
        found = matched(kernel) if target.multiplies_in_groups else None
        return found is not None and found.image.dtype in DTYPES
