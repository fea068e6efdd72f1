"""Products of matrices by groups of four warps: Hopper's own tensor cores.

    as in `matmul_mma`, with numbers of 16 bits, where both operands stay in shared memory, whichever way round they lie

See `conv_wgmma` for which products are better off so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cnnc.backends.cuda.matmul_mma import MatMulMma, matched
from cnnc.backends.cuda.mma_params import WGMMA_TILES, BlockTile, WgmmaParams
from cnnc.backends.cuda.wgmma import DTYPES
from cnnc.ops.fused import Fused
from cnnc.target import Target


@dataclass(frozen=True)
class MatMulWgmma(MatMulMma):
    """Products of `matmul_mma` whose operands have 16 bits, on the one architecture that has the instructions."""

    name: str = "matmul_wgmma"
    tiles: ClassVar[tuple[BlockTile, ...]] = WGMMA_TILES
    params: ClassVar[type[BlockTile]] = WgmmaParams

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take what `matmul_mma` takes but tf32."""
        found = matched(kernel) if target.multiplies_in_groups else None
        return found is not None and found.left.stored.dtype in DTYPES
