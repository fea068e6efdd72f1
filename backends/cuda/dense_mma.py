"""Fully connected layers on tensor cores.

    y[m, o] = epilogue(sum over i of x[m, i] * w[o, i])

Both operands have what is summed over side by side, so that one copy takes 16 bytes of it.  Products of f16, bf16 or of
what was rounded to tf32, added up in f32 (see `conv_mma`, also for what blocks share where there are few).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cnnc.backends.cuda.mma_operands import follows_in_registers, stored_for_mma
from cnnc.backends.cuda.mma_params import CHUNK_BYTES, MmaParams, MmaShape, seconds
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.graph import Node, Value
from cnnc.ops.dense import Dense
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target


@dataclass(frozen=True)
class DenseMma:
    """Fully connected layers whose rows are whole chunks, with an elementwise epilogue."""

    name: str = "dense_mma"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take layers whose operands are narrow, or rounded to tf32."""
        return target.is_gpu and matched(kernel) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give every tile that fits, with the parts that keep multiprocessors busy."""
        return [schedule_of(self.name, tile) for tile in _matched(kernel).shape.candidates(target)]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds."""
        return seconds(_matched(kernel).shape, params_of(MmaParams, schedule), target)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.dense_mma_loops import dense_mma_func

        return dense_mma_func(kernel, _matched(kernel), params_of(MmaParams, schedule))


@dataclass(frozen=True)
class MmaDense:
    """A kernel's layer: its node, what it reads from memory, and the product of matrices it is."""

    node: Node
    rows: Value
    weight: Value

    @property
    def chunk(self) -> int:
        """The numbers in 16 bytes."""
        return CHUNK_BYTES // self.rows.dtype.itemsize

    @property
    def shape(self) -> MmaShape:
        """The product: a row for each set of features, a column for each output."""
        outputs, features = self.weight.type.static_shape
        rows = math.prod(self.rows.type.static_shape[:-1])
        return MmaShape(rows, outputs, features // self.chunk, self.rows.dtype)


@lru_cache(256)
def matched(kernel: Fused) -> MmaDense | None:
    """Find a kernel's layer; None where it is not for tensor cores.

    Rows must begin at addresses that are multiples of 16 bytes, and outputs come in pairs.
    """
    node = follows_in_registers(kernel, Dense)
    if node is None:
        return None
    rows, weight = (stored_for_mma(value, kernel.body) for value in node.inputs[:2])
    if rows is None or weight is None or rows.dtype is not weight.dtype:
        return None
    if rows.type.layout is not None or weight.type.layout is not None:
        return None
    found = MmaDense(node, rows, weight)
    outputs, features = weight.type.static_shape
    return found if features % found.chunk == 0 and outputs % 2 == 0 else None


def _matched(kernel: Fused) -> MmaDense:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found
