"""The products of `matmul_tma`: the boxes of a tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cnnc.backends.cuda import tma
from cnnc.backends.cuda.matmul_mma_loops import matmul_product
from cnnc.backends.cuda.matmul_tma import matrix_map
from cnnc.backends.cuda.matrices import Matrix, MatrixProduct
from cnnc.backends.cuda.mma_launch import product_func
from cnnc.backends.cuda.mma_params import GROUP_ROWS, TmaParams
from cnnc.backends.cuda.tensor_maps import mapped
from cnnc.backends.cuda.tma_tile import BoxCopy, BoxedOperand, Lines
from cnnc.ops.fused import Fused


def matmul_tma_func(kernel: Fused, found: MatrixProduct, tile: TmaParams) -> Any:
    """Give the PrimFunc over the kernel's inputs, its output, and the maps."""

    def operand(matrix: Matrix, x: Any, number: Any) -> BoxedOperand:
        which, rows = (0, tile.rows) if matrix is found.left else (1, tile.columns)
        source = mapped(x, matrix_map(matrix, rows), which)

        def along(row: Any, chunk: Any) -> Sequence[BoxCopy]:
            return [BoxCopy(0, tma.tiled(3), (chunk * matrix.chunk, row, number))]

        def across(row: Any, chunk: Any) -> Sequence[BoxCopy]:
            block = GROUP_ROWS * tile.depth
            return [
                BoxCopy(i * block, tma.tiled(3), (row + i * GROUP_ROWS, chunk * matrix.chunk, number))
                for i in range(rows // GROUP_ROWS)
            ]

        return BoxedOperand(source, *((Lines.ACROSS, across) if matrix.across else (Lines.DEPTH, along)))

    return product_func(matmul_product(kernel, found, operand), tile)
