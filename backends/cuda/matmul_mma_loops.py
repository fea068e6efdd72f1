"""The products of `matmul_mma` and `matmul_ffma`: where the chunks of a tile are, and where its sums go."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.bodies import body_around
from cnnc.backends.cuda.ffma_params import FfmaParams
from cnnc.backends.cuda.launches import address, position
from cnnc.backends.cuda.matrices import Matrix, MatrixProduct
from cnnc.backends.cuda.mma_launch import Product, product_func
from cnnc.backends.cuda.mma_params import BlockTile
from cnnc.backends.cuda.mma_ring import Operand, Order
from cnnc.backends.cuda.tma_tile import BoxedOperand
from cnnc.ops.dense import Dense
from cnnc.ops.fused import Fused


def matmul_mma_func(kernel: Fused, found: MatrixProduct, tile: BlockTile | FfmaParams) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output."""
    return product_func(matmul_product(kernel, found, _operand), tile)


def matmul_product(
    kernel: Fused, found: MatrixProduct, operand: Callable[[Matrix, Any, Any], Operand | BoxedOperand]
) -> Product:
    """Tell a kernel's product, of operands by matrix, buffer, and the number of the one of its batch."""
    body = body_around(kernel, found.node).bind(found.node.types[0].physical_shape)
    buffers = dict(zip(kernel.body.inputs, body.inputs, strict=True))
    leading = found.node.types[0].static_shape[:-1]
    has_rows, has_columns = (value.type.rank > 1 for value in found.node.inputs[:2])

    def index(row: Any, batch: Any, column: Any) -> tuple[Any, ...]:
        if isinstance(found.node.op, Dense):
            return (*position(leading, row), column)
        return (*position(found.batch, batch), *([row] if has_rows else []), *([column] if has_columns else []))

    def of(matrix: Matrix, batch: Any) -> Operand | BoxedOperand:
        return operand(matrix, buffers[matrix.stored], _number(matrix, position(found.batch, batch)))

    return Product(
        body,
        found.shape,
        lambda batch: of(found.left, batch),
        lambda batch: of(found.right, batch),
        found.right.rows,
        index,
    )


def _number(matrix: Matrix, batch: list[Any]) -> Any:
    """Count through the matrices of a batch, which broadcasts to that of the product."""
    own = batch[len(batch) - len(matrix.batch) :]
    number: Any = 0
    for axis, extent in enumerate(matrix.batch):
        if extent != 1:
            number = number + own[axis] * math.prod(matrix.batch[axis + 1 :])
    return number


def _operand(matrix: Matrix, x: Any, number: Any) -> Operand:
    """Find the pieces of a matrix: of those of its batch, the one of this number."""
    start = number * (matrix.rows * matrix.depth)
    front = (0,) * (len(x.shape) - 1)

    def along(row: Any, piece: Any) -> tuple[Any, Any]:
        place = start + row * matrix.depth + piece * matrix.piece
        return address(x, *front, place), tirx.all(row < matrix.rows, piece * matrix.piece < matrix.depth)

    def across(piece: Any, depth: Any) -> tuple[Any, Any]:
        place = start + depth * matrix.rows + piece * matrix.piece
        return address(x, *front, place), tirx.all(piece * matrix.piece < matrix.rows, depth < matrix.depth)

    order = Order.ACROSS if matrix.across else Order.DEPTH
    return Operand(across if matrix.across else along, order, matrix.chunk, matrix.chunk // matrix.piece)
