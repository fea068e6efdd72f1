"""The product of matrices of `dense_mma`: where the chunks of a tile are, and where its sums go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.dense_mma import MmaDense
from cnnc.backends.cuda.launches import address
from cnnc.backends.cuda.mma_body import body_around
from cnnc.backends.cuda.mma_launch import Product, product_func
from cnnc.backends.cuda.mma_params import MmaParams
from cnnc.backends.cuda.mma_tile import Operand
from cnnc.ops.fused import Fused


def dense_mma_func(kernel: Fused, found: MmaDense, tile: MmaParams) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output."""
    leading = found.node.types[0].static_shape[:-1]
    body = body_around(kernel, found.node).bind(found.node.types[0].physical_shape)
    buffers = dict(zip(kernel.body.inputs, body.inputs, strict=True))
    shape = found.shape

    def index(row: Any, block: Any, column: Any) -> tuple[Any, ...]:
        position: list[Any] = []
        for extent in reversed(leading):
            position.insert(0, row % extent)
            row = row // extent
        return (*position, column)

    left = _matrix(buffers[found.rows], shape.rows, shape.chunks, found.chunk)
    right = _matrix(buffers[found.weight], shape.columns, shape.chunks, found.chunk)
    operands = Operand(left, along_depth=True), Operand(right, along_depth=True)
    return product_func(Product(body, shape, *operands, shape.columns, index), tile)


def _matrix(x: Any, rows: int, chunks: int, width: int) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Find the chunk of a row, the axes before the last counted as one."""
    front = (0,) * (len(x.shape) - 1)

    def chunk_at(row: Any, chunk: Any) -> tuple[Any, Any]:
        return address(x, *front, (row * chunks + chunk) * width), tirx.all(row < rows, chunk < chunks)

    return chunk_at
