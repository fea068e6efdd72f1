"""Products of matrices as kernels have them: which operand lies how in memory, and what of it is copied at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cnnc.backends.cuda.machine import CHUNK_BYTES
from cnnc.backends.cuda.mma_params import MmaShape
from cnnc.backends.cuda.operands import vector_of
from cnnc.ir.graph import Node, Value
from cnnc.ops.dense import Dense, MatMul


@dataclass(frozen=True)
class Matrix:
    """An operand: where it is stored, its batch axes, its rows (columns of a right one) and depth.

    `across` says that neighbours in memory are of neighbouring rows, not neighbours in depth.
    """

    stored: Value
    batch: tuple[int, ...]
    rows: int
    depth: int
    across: bool

    @property
    def chunk(self) -> int:
        """The numbers in 16 bytes."""
        return CHUNK_BYTES // self.stored.dtype.itemsize

    @property
    def piece(self) -> int:
        """The numbers copied at once: less than a chunk where lines do not begin at multiples of 16 bytes."""
        return vector_of(self.rows if self.across else self.depth, self.stored.dtype)


@dataclass(frozen=True)
class MatrixProduct:
    """A kernel's product: its node, its operands, and the axes that one product is done for each index of."""

    node: Node
    left: Matrix
    right: Matrix
    batch: tuple[int, ...]

    @property
    def shape(self) -> MmaShape:
        """The products as cost models see them."""
        chunks = math.ceil(self.left.depth / self.left.chunk)
        return MmaShape(self.left.rows, self.right.rows, chunks, self.left.stored.dtype, math.prod(self.batch))


def matrix_product(node: Node, left: Value, right: Value) -> MatrixProduct:
    """Describe a node's product of what is stored."""
    return _product(node, left, right) if isinstance(node.op, MatMul) else _layer(node, left, right)


def _layer(node: Node, x: Value, weight: Value) -> MatrixProduct:
    """Take all axes of x but the last as rows."""
    assert isinstance(node.op, Dense)
    outputs, features = weight.type.static_shape
    rows = math.prod(x.type.static_shape[:-1])
    return MatrixProduct(
        node, Matrix(x, (), rows, features, across=False), Matrix(weight, (), outputs, features, across=False), ()
    )


def _product(node: Node, a: Value, b: Value) -> MatrixProduct:
    """Take the last two axes of each; a vector is one row, or one column."""
    assert isinstance(node.op, MatMul)
    left = _matrix(a, transposed=node.op.transpose_a)
    right = _matrix(b, transposed=not node.op.transpose_b)
    matrices = sum(value.type.rank > 1 for value in (a, b))
    result = node.types[0].static_shape
    return MatrixProduct(node, left, right, result[: len(result) - matrices])


def _matrix(value: Value, *, transposed: bool) -> Matrix:
    """Tell the last two axes, which are rows and depth, or the other way round."""
    if value.type.rank == 1:
        return Matrix(value, (), 1, value.type.static_shape[0], across=False)
    *batch, rows, depth = value.type.static_shape
    if transposed:
        rows, depth = depth, rows
    return Matrix(value, tuple(batch), rows, depth, across=transposed)
