"""Products of matrices on tensor cores: fully connected layers, and products of activations.

    y[..., m, n] = epilogue(sum over k of a[..., m, k] * b[..., k, n])        a layer's b is its weight, transposed

One copy takes 16 bytes of what lies side by side in memory: numbers in depth (k), or, of matrices that lie the other
way round, numbers of neighbouring rows or columns, which are transposed on their way into registers.  Products of f16,
bf16 or of what was rounded to tf32, added up in f32 (see `conv_mma`, also for what blocks share where there are few).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from cnnc.backends.cuda.matrices import Matrix, MatrixProduct, matrix_product
from cnnc.backends.cuda.mma_operands import stored_for_mma
from cnnc.backends.cuda.mma_params import TILES, BlockTile, MmaParams, seconds
from cnnc.backends.cuda.operands import follows_in_registers
from cnnc.backends.lower.template import params_of, schedule_of
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


@lru_cache(256)
def matched(kernel: Fused) -> MatrixProduct | None:
    """Find a kernel's product; None where it is not for tensor cores, or has an odd number of columns.

    Products with vectors are left to others.
    """
    node = follows_in_registers(kernel, Dense) or follows_in_registers(kernel, MatMul)
    if node is None:
        return None
    left, right = (stored_for_mma(value, kernel.body) for value in node.inputs[:2])
    if left is None or right is None or left.dtype is not right.dtype:
        return None
    if left.type.layout is not None or right.type.layout is not None:
        return None
    if min(value.type.rank for value in node.inputs[:2]) < 2 and isinstance(node.op, MatMul):
        return None
    found = matrix_product(node, left, right)
    return found if _is_whole(found.left) and _is_whole(found.right) and found.right.rows % 2 == 0 else None


def _is_whole(matrix: Matrix) -> bool:
    """Whether each line begins at a multiple of 16 bytes; only numbers of 16 bits can be transposed."""
    return matrix.piece == matrix.chunk and not (matrix.across and matrix.stored.dtype.itemsize != 2)


def _matched(kernel: Fused) -> MatrixProduct:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found
