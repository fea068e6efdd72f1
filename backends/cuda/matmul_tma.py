"""Products of matrices by groups of four warps, whose tiles are copied as boxes (TMA).

    as in `matmul_wgmma`

A map tells of a matrix, with those of its batch: rows of neighbours in depth, or the other way round.  A copy takes
128 bytes of each line, swizzled, and zeros where the matrix ends.  NVIDIA's CUTLASS, `SM90_TMA_LOAD`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from cnnc.backends.cuda.matmul_mma import matched
from cnnc.backends.cuda.matmul_wgmma import MatMulWgmma
from cnnc.backends.cuda.matrices import Matrix, MatrixProduct
from cnnc.backends.cuda.mma_params import SWIZZLED, TMA_TILES, BlockTile, TmaParams, seconds
from cnnc.backends.host.device import MOST_BOX, TensorMap
from cnnc.backends.lower.template import params_of
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target


@dataclass(frozen=True)
class MatMulTma(MatMulWgmma):
    """Products of `matmul_wgmma` whose matrices are within the limits of maps."""

    name: str = "matmul_tma"
    tiles: ClassVar[tuple[BlockTile, ...]] = TMA_TILES
    params: ClassVar[type[BlockTile]] = TmaParams

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take what `matmul_wgmma` takes, if maps can tell of it."""
        if not super().matches(kernel, target):
            return False
        found = _matched(kernel)
        return all(matrix_map(matrix, MOST_BOX).is_possible for matrix in (found.left, found.right))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds: a line for each row of a stage."""
        tile = params_of(TmaParams, schedule)
        return seconds(_matched(kernel).shape, tile, target, tile.rows + tile.columns)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, its output, and the maps."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.matmul_tma_loops import matmul_tma_func

        return matmul_tma_func(kernel, _matched(kernel), params_of(TmaParams, schedule))


def matrix_map(matrix: Matrix, rows: int) -> TensorMap:
    """Tell of the matrices of a batch: a box is 128 bytes of so many rows, or across, of as many places in depth."""
    line = SWIZZLED * matrix.chunk
    lines = (matrix.rows, matrix.depth) if matrix.across else (matrix.depth, matrix.rows)
    nbytes = matrix.stored.dtype.itemsize
    return TensorMap(
        str(matrix.stored.dtype),
        (*lines, math.prod(matrix.batch)),
        (lines[0] * nbytes, lines[0] * lines[1] * nbytes),
        (line, line if matrix.across else rows, 1),
        swizzled=True,
    )


def _matched(kernel: Fused) -> MatrixProduct:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found
