"""Softmax, layer and RMS norm in one kernel: a row is read once, and stays in registers between the passes over it.

    softmax      y = exp(x - max) / total                            total = sum of exp(x - max)
    log_softmax  y = x - max - log(total)
    layer_norm   y = (x - mean) / sqrt(var + epsilon) * gamma + beta     var = mean of (x - mean)^2
    rms_norm     y = x / sqrt(mean of x^2 + epsilon) * gamma

A warp, or a block of threads, has a row, and each thread some vectors of it.  What the generic template makes of these
is a launch for each sum or maximum, and one for the result, each of which reads all of x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cnnc.backends.cuda.machine import GPUS, LANES, NOT_HIDDEN, SECONDS_PER_LAUNCH
from cnnc.backends.cuda.operands import follows_in_registers, stored_operands, vector_of
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.graph import Node, Value
from cnnc.ir.types import DType
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.norm import LayerNorm, RmsNorm
from cnnc.ops.softmax import LogSoftmax, Softmax
from cnnc.target import Target

MOST_NUMBERS = 32
"""Of a row, in the registers of a thread."""


@dataclass(frozen=True)
class RowParams:
    """Threads of a row, whole warps, and rows of a block."""

    threads: int
    rows: int


TILES = (RowParams(32, 1), RowParams(32, 4), *(RowParams(threads, 1) for threads in (64, 128, 256, 512, 1024)))


@dataclass(frozen=True)
class RowShape:
    """Rows of the axes `inner`, one for each index of the axes `leading`; `lanes` numbers are read at once."""

    leading: tuple[int, ...]
    inner: tuple[int, ...]
    lanes: int
    x_bytes: int

    @property
    def rows(self) -> int:
        """The number of rows."""
        return math.prod(self.leading)

    @property
    def length(self) -> int:
        """The numbers of a row."""
        return math.prod(self.inner)

    def turns(self, tile: RowParams) -> int:
        """Count the vectors of a thread."""
        return math.ceil(self.length / self.lanes / tile.threads)

    def registers(self, tile: RowParams) -> int:
        """Estimate what a thread keeps."""
        return 32 + self.turns(tile) * self.lanes

    def resident(self, tile: RowParams, target: Target) -> int:
        """Give how many blocks a multiprocessor runs at once."""
        return GPUS[target.arch].resident(tile.threads * tile.rows, self.registers(tile), 0)


@dataclass(frozen=True)
class Rows:
    """Operators over the last axes of plain tensors, with an elementwise epilogue."""

    name: str = "rows"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take rows in f32, of what is stored in f32 or narrower, that fit into registers."""
        return target.is_gpu and matched(kernel) is not None and bool(self._tiles(kernel))

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the numbers of threads that a row keeps busy."""
        return [schedule_of(self.name, tile) for tile in self._tiles(kernel)]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds."""
        return seconds(_matched(kernel).shape, params_of(RowParams, schedule), target)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.rows_loops import rows_func

        found, tile = _matched(kernel), params_of(RowParams, schedule)
        return rows_func(kernel, found, tile, found.shape.resident(tile, target))

    def _tiles(self, kernel: Fused) -> list[RowParams]:
        shape = _matched(kernel).shape
        fitting = [tile for tile in TILES if shape.turns(tile) * shape.lanes <= MOST_NUMBERS]
        return [tile for tile in fitting if tile.threads == LANES or shape.length > tile.threads * shape.lanes // 2]


_KINDS = (Softmax, LogSoftmax, LayerNorm, RmsNorm)


@dataclass(frozen=True)
class RowKernel:
    """A kernel's operator over rows: its node, and where x, and perhaps gamma and beta, are stored."""

    node: Node
    stored: tuple[Value, ...]

    @property
    def shape(self) -> RowShape:
        """Its sizes."""
        x, op = self.stored[0].type, self.node.op
        assert isinstance(op, _KINDS)
        axis = op.axis % x.rank
        inner = x.static_shape[axis:]
        return RowShape(x.static_shape[:axis], inner, vector_of(inner[-1], x.dtype), x.dtype.itemsize)


@lru_cache(256)
def matched(kernel: Fused) -> RowKernel | None:
    """Find a kernel's operator over rows; None where it has none that is computed in f32."""
    node = follows_in_registers(kernel, _KINDS, operands=3)
    if node is None or node.types[0].dtype is not DType.F32:
        return None
    stored = stored_operands(node, kernel.body)
    if stored is None:
        return None
    rank = stored[0].type.rank
    # Softmax is over one axis.
    last = not isinstance(node.op, Softmax | LogSoftmax) or node.op.axis % rank == rank - 1
    return RowKernel(node, stored) if last else None


def _matched(kernel: Fused) -> RowKernel:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found


# What it takes

_LATENCY = 1.2e-6
"""Seconds from the loads of a row to its stores, sums over a warp included."""

_OF_A_BARRIER = 2e-7
"""Seconds for what warps hand each other, of one sum."""

_OF_A_NUMBER = 4e-8
"""Seconds for one number of a thread: an exponential or a division among others."""

_BYTES_PER_SECOND = 32 * 1.4e9
"""What a multiprocessor gets from the L2 cache."""


def seconds(shape: RowShape, tile: RowParams, target: Target) -> float:
    """Estimate rows: what memory takes, or rounds of as many blocks as fit, each bound by latency or by its loads."""
    gpu = GPUS[target.arch]
    blocks = math.ceil(shape.rows / tile.rows)
    here = min(shape.resident(tile, target), math.ceil(blocks / gpu.multiprocessors))
    rounds = math.ceil(blocks / (gpu.multiprocessors * here))
    latency = _LATENCY + (2 * _OF_A_BARRIER if tile.threads > LANES else 0.0)
    # A thread alone issues the instructions for all of its numbers one after the other.
    latency += shape.turns(tile) * shape.lanes * _OF_A_NUMBER
    loads = here * tile.rows * shape.length * shape.x_bytes / _BYTES_PER_SECOND
    moved = shape.rows * shape.length * (shape.x_bytes + 4) / gpu.bandwidth
    bounds = rounds * max(latency, loads), moved
    return max(bounds) + NOT_HIDDEN * sum(bounds) + SECONDS_PER_LAUNCH
