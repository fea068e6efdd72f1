"""Products of matrices on tensor cores: fully connected layers, and products of activations.

    y[..., m, n] = epilogue(sum over k of a[..., m, k] * b[..., k, n])        a layer's b is its weight, transposed

One copy takes 16 bytes of what lies side by side in memory: numbers in depth (k), or, of matrices that lie the other
way round, numbers of neighbouring rows or columns, which are transposed on their way into registers.  Products of f16,
bf16 or of what was rounded to tf32, added up in f32 (see `conv_mma`, also for what blocks share where there are few).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from cnnc.backends.cuda.machine import CHUNK_BYTES
from cnnc.backends.cuda.mma_operands import stored_for_mma
from cnnc.backends.cuda.mma_params import TILES, BlockTile, MmaParams, MmaShape, seconds
from cnnc.backends.cuda.operands import follows_in_registers
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.graph import Node, Value
from cnnc.ops.dense import Dense, MatMul
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target


@dataclass(frozen=True)
class MatMulMma:
    """Products of matrices whose lines are whole chunks, with an elementwise epilogue."""

    name: str = "matmul_mma"
    tiles: ClassVar[tuple[BlockTile, ...]] = TILES
    params: ClassVar[type[BlockTile]] = MmaParams

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take products whose operands are narrow, or rounded to tf32."""
        return target.is_gpu and matched(kernel) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give every tile that fits, with the parts that keep multiprocessors busy."""
        return [schedule_of(self.name, tile) for tile in _matched(kernel).shape.candidates(self.tiles, target)]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds."""
        return seconds(_matched(kernel).shape, params_of(self.params, schedule), target)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.matmul_mma_loops import matmul_mma_func

        return matmul_mma_func(kernel, _matched(kernel), params_of(self.params, schedule))


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
    def is_whole(self) -> bool:
        """Whether each line begins at a multiple of 16 bytes; only numbers of 16 bits can be transposed."""
        if self.across:
            return self.stored.dtype.itemsize == 2 and self.rows % self.chunk == 0
        return self.depth % self.chunk == 0


@dataclass(frozen=True)
class MmaMatMul:
    """A kernel's product: its node, its operands, and the axes that one product is done for each index of."""

    node: Node
    left: Matrix
    right: Matrix
    batch: tuple[int, ...]

    @property
    def shape(self) -> MmaShape:
        """The products as the cost model sees them."""
        chunks = math.ceil(self.left.depth / self.left.chunk)
        return MmaShape(self.left.rows, self.right.rows, chunks, self.left.stored.dtype, math.prod(self.batch))


@lru_cache(256)
def matched(kernel: Fused) -> MmaMatMul | None:
    """Find a kernel's product; None where it is not for tensor cores, or has an odd number of columns."""
    node = follows_in_registers(kernel, Dense) or follows_in_registers(kernel, MatMul)
    if node is None:
        return None
    left, right = (stored_for_mma(value, kernel.body) for value in node.inputs[:2])
    if left is None or right is None or left.dtype is not right.dtype:
        return None
    if left.type.layout is not None or right.type.layout is not None:
        return None
    found = _layer(node, left, right) if isinstance(node.op, Dense) else _product(node, left, right)
    fits = found is not None and found.left.is_whole and found.right.is_whole and found.right.rows % 2 == 0
    return found if fits else None


def _layer(node: Node, x: Value, weight: Value) -> MmaMatMul:
    """Take all axes of x but the last as rows."""
    outputs, features = weight.type.static_shape
    rows = math.prod(x.type.static_shape[:-1])
    return MmaMatMul(
        node, Matrix(x, (), rows, features, across=False), Matrix(weight, (), outputs, features, across=False), ()
    )


def _product(node: Node, a: Value, b: Value) -> MmaMatMul | None:
    """Take the last two axes of each; vectors are left to others."""
    assert isinstance(node.op, MatMul)
    if min(a.type.rank, b.type.rank) < 2:
        return None
    left = _matrix(a, transposed=node.op.transpose_a)
    right = _matrix(b, transposed=not node.op.transpose_b)
    return MmaMatMul(node, left, right, node.types[0].static_shape[:-2])


def _matrix(value: Value, *, transposed: bool) -> Matrix:
    """Tell the last two axes, which are rows and depth, or the other way round."""
    *batch, rows, depth = value.type.static_shape
    if transposed:
        rows, depth = depth, rows
    return Matrix(value, tuple(batch), rows, depth, across=transposed)


def _matched(kernel: Fused) -> MmaMatMul:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found
