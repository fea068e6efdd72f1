"""The products of `matmul_mma`: where the chunks of a tile are, and where its sums go."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.bodies import body_around
from cnnc.backends.cuda.launches import address, position
from cnnc.backends.cuda.matmul_mma import Matrix, MmaMatMul
from cnnc.backends.cuda.mma_launch import Product, product_func
from cnnc.backends.cuda.mma_params import BlockTile
from cnnc.backends.cuda.mma_ring import Operand, Order
from cnnc.ops.dense import Dense
from cnnc.ops.fused import Fused


def matmul_mma_func(kernel: Fused, found: MmaMatMul, tile: BlockTile) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output."""
    body = body_around(kernel, found.node).bind(found.node.types[0].physical_shape)
    buffers = dict(zip(kernel.body.inputs, body.inputs, strict=True))
    *leading, _ = found.node.types[0].static_shape

    def index(row: Any, batch: Any, column: Any) -> tuple[Any, ...]:
        if isinstance(found.node.op, Dense):
            return (*position(leading, row), column)
        return (*position(found.batch, batch), row, column)

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
    """Find the chunks of a matrix: of those of its batch, which broadcasts to that of the product."""
    own = batch[len(batch) - len(matrix.batch) :]
    start: Any = 0
    for axis, extent in enumerate(matrix.batch):
        if extent != 1:
            start = start + own[axis] * (math.prod(matrix.batch[axis + 1 :]) * matrix.rows * matrix.depth)
    front = (0,) * (len(x.shape) - 1)

    def chunk_at(row: Any, chunk: Any) -> tuple[Any, Any]:
        place = start + row * matrix.depth + chunk * matrix.chunk
        return address(x, *front, place), tirx.all(row < matrix.rows, chunk * matrix.chunk < matrix.depth)

    def across(rows: Any, depth: Any) -> tuple[Any, Any]:
        place = start + depth * matrix.rows + rows * matrix.chunk
        return address(x, *front, place), tirx.all(rows * matrix.chunk < matrix.rows, depth < matrix.depth)

    return Operand(across, Order.ACROSS) if matrix.across else Operand(chunk_at, Order.DEPTH)
