"""Products of matrices that are both computed: panels of the right one are packed inside the kernel.

    y[..., m, n] = sum over k of a[..., m, k] * b[..., k, n]

A slice takes a panel of two vectors of columns, copies it so that it lies in the order it is used (transposed on the
way if need be), and runs a share of the rows of a past it.  The copy costs as much as two rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import anchor_of, body_of, machine_of
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.register_tile import step_cycles
from cnnc.backends.cpu.segments import even_split
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.dense import MatMul
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["MatMulParams", "MatMulShape", "MatMulTemplate", "build", "cost", "space"]


VECTORS = 2
"""Vectors in a panel: products of attention heads have few columns."""


@dataclass(frozen=True)
class MatMulShape:
    """`rows` x `depth` times `depth` x `columns` for each index of `batch`.

    `a` and `b` are the operands' own shapes, whose axes before the last two broadcast to `batch`.
    """

    batch: tuple[int, ...]
    rows: int
    depth: int
    columns: int
    a: tuple[int, ...]
    b: tuple[int, ...]
    transpose_a: bool = False
    transpose_b: bool = False
    lanes: int = 8

    @property
    def panels(self) -> int:
        """Panels of two vectors of columns, the last one perhaps not full."""
        return -(-self.columns // (VECTORS * self.lanes))


@dataclass(frozen=True)
class MatMulParams:
    """Register tiles of at most `rows` rows; a slice is one panel and `tiles` tiles of rows."""

    rows: int
    tiles: int


def space(shape: MatMulShape, machine: Machine) -> Iterator[MatMulParams]:
    """Give the tile sizes worth considering."""
    fitting = [rows for rows in range(1, machine.registers) if machine.fits(rows, VECTORS)]
    for rows in sorted({even_split(shape.rows, most)[0][0] for most in fitting[-2:]}):
        row_tiles = sum(count for _, count in even_split(shape.rows, rows))
        for tiles in sorted({-(-row_tiles // parts) for parts in (1, 2, 4, 8)}):
            yield MatMulParams(rows, tiles)


def cost(shape: MatMulShape, params: MatMulParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    split = even_split(shape.rows, params.rows)
    row_slices = -(-sum(count for _, count in split) // params.tiles)
    products = math.prod(shape.batch) * shape.panels
    steps = sum(count * (step_cycles(machine, rows, VECTORS) * shape.depth + 40.0) for rows, count in split)
    pack = (4.0 if shape.transpose_b else 3.0) * shape.depth * row_slices
    slices = products * row_slices
    waves = machine.turns(slices) / slices
    return (
        (products * (steps + pack) * waves + 60.0 * slices / machine.threads) * machine.sharing(slices) / machine.hertz
    )


def build(shape: MatMulShape, params: MatMulParams, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands are a and b."""
    from cnnc.backends.cpu.matmul_loops import MatMulLoops

    return MatMulLoops(shape, params, body).function()


@dataclass(frozen=True)
class MatMulTemplate:
    """The template: products of plain matrices, in batches, of several rows."""

    name: str = "mat_mul"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a `mat_mul` of matrices with FEWEST_ROWS rows or more."""
        return _find(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tile sizes worth considering."""
        return (schedule_of(self.name, params) for params in space(_known(kernel, target)[1], machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        return cost(_known(kernel, target)[1], params_of(MatMulParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        anchor, shape = _known(kernel, target)
        return build(shape, params_of(MatMulParams, schedule), body_of(kernel, anchor))


FEWEST_ROWS = 4
"""With fewer, packing costs as much as it saves."""


def _known(kernel: Fused, target: Target) -> tuple[Node, MatMulShape]:
    found = _find(kernel, target)
    if found is None:
        raise VerifyError(f"mat_mul cannot compute kernel {kernel.anchor}")
    return found


@lru_cache(64)
def _find(kernel: Fused, target: Target) -> tuple[Node, MatMulShape] | None:
    """Give the product and its sizes, if the kernel is one."""
    anchor = anchor_of(kernel, target, "mat_mul", narrow=(0, 1))
    if anchor is None or not isinstance(anchor.op, MatMul):
        return None
    op, (a, b) = anchor.op, (value.type.static_shape for value in anchor.inputs)
    if len(a) < 2 or len(b) < 2:
        return None
    *batch, rows, columns = anchor.types[0].static_shape
    if rows < FEWEST_ROWS or columns < 2:
        return None
    depth = a[-2] if op.transpose_a else a[-1]
    shape = MatMulShape(
        *(tuple(batch), rows, depth, columns, a, b), op.transpose_a, op.transpose_b, target.vector_lanes
    )
    return anchor, shape
