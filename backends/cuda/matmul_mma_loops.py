"""The products of `matmul_mma` and `matmul_ffma`: where the chunks of a tile are, and where its sums go."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.bodies import body_around
from cnnc.backends.cuda.ffma_params import FfmaParams
from cnnc.backends.cuda.launches import address, position
from cnnc.backends.cuda.matrices import Matrix, MatrixProduct
from cnnc.backends.cuda.mma_launch import Product, product_func
from cnnc.backends.cuda.mma_params import BlockTile
from cnnc.backends.cuda.mma_ring import Operand, Order
from cnnc.ops.dense import Dense
from cnnc.ops.fused import Fused


def matmul_mma_func(kernel: Fused, found: MatrixProduct, tile: BlockTile | FfmaParams) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output."""
    body = body_around(kernel, found.node).bind(found.node.types[0].physical_shape)
    buffers = dict(zip(kernel.body.inputs, body.inputs, strict=True))
    leading = found.node.types[0].static_shape[:-1]
    has_rows, has_columns = (value.type.rank > 1 for value in found.node.inputs[:2])

    def index(row: Any, batch: Any, column: Any) -> tuple[Any, ...]:
        if isinstance(found.node.op, Dense):
            return (*position(leading, row), column)
        return (*position(found.batch, batch), *([row] if has_rows else []), *([column] if has_columns else []))

    def operand(matrix: Matrix, batch: Any) -> Operand:
        return _operand(matrix, buffers[matrix.stored], position(found.batch, batch))

    product = Product(
        body,
        found.shape,
        lambda batch: operand(found.left, batch),
        lambda batch: operand(found.right, batch),
        found.right.rows,
        index,
    )
    return product_func(product, tile)


def _operand(matrix: Matrix, x: Any, batch: list[Any]) -> Operand:
    """Find the pieces of a matrix: of those of its batch, which broadcasts to that of the product."""
    own = batch[len(batch) - len(matrix.batch) :]
    start: Any = 0
    for axis, extent in enumerate(matrix.batch):
        if extent != 1:
            start = start + own[axis] * (math.prod(matrix.batch[axis + 1 :]) * matrix.rows * matrix.depth)
    front = (0,) * (len(x.shape) - 1)

    def along(row: Any, piece: Any) -> tuple[Any, Any]:
        place = start + row * matrix.depth + piece * matrix.piece
        return address(x, *front, place), tirx.all(row < matrix.rows, piece * matrix.piece < matrix.depth)

    def across(piece: Any, depth: Any) -> tuple[Any, Any]:
        place = start + depth * matrix.rows + piece * matrix.piece
        return address(x, *front, place), tirx.all(piece * matrix.piece < matrix.rows, depth < matrix.depth)

    order = Order.ACROSS if matrix.across else Order.DEPTH
    return Operand(across if matrix.across else along, order, matrix.chunk, matrix.chunk // matrix.piece)
