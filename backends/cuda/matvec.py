"""Fully connected layers of a few rows: what they take is the reading of their weights.

    y[r, o] = epilogue(sum over k of x[r, k] * w[o, k])        r of one row to MOST_ROWS

A warp computes `outputs` neighbouring outputs of all rows.  Its lanes read 16 bytes each, side by side in memory, of
each of its rows of weights, for `unroll` steps at once, so that enough bytes are on their way to keep the memory busy;
what of x goes with them is read once for all outputs.  Where there are few outputs, `splits` warps share the terms of
each.  Lanes add up by shuffles, warps through shared memory, always in the same order.

Products with a constant matrix are such layers, too (see `passes/rules/algebra.py`).  Sums are f32, weights and x f32
or stored in 16 bits.  Little, "A proof for the queuing formula L = lambda W", 1961, says how many bytes must be under
way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cnnc.backends.cuda.machine import CHUNK_BYTES, CYCLES_A_SECOND, GPUS, LANES, NOT_HIDDEN, SECONDS_PER_LAUNCH
from cnnc.backends.cuda.operands import follows_in_registers, stored_plain, vector_of
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.graph import Node, Value
from cnnc.ir.types import DType
from cnnc.ops.dense import Dense
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

MOST_ROWS = 8
"""Rows up to which reading weights takes longer than multiplying them."""


@dataclass(frozen=True)
class MatVecParams:
    """Outputs of a warp, steps of loads at once, warps that share an output's terms, warps of a block."""

    outputs: int
    unroll: int
    splits: int
    warps: int

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return self.warps * LANES

    @property
    def block_outputs(self) -> int:
        """The outputs of a block."""
        return self.warps // self.splits * self.outputs


@dataclass(frozen=True)
class MatVecShape:
    """Sizes: `lanes` numbers of a row of weights are read at once."""

    rows: int
    outputs: int
    depth: int
    lanes: int
    weight_bytes: int
    x_bytes: int

    @property
    def nbytes(self) -> int:
        """What is read and written at least, the output as f32."""
        read = self.outputs * self.depth * self.weight_bytes + self.rows * self.depth * self.x_bytes
        return read + 4 * self.rows * self.outputs

    def blocks(self, tile: MatVecParams) -> int:
        """Count the blocks of threads."""
        return math.ceil(self.outputs / tile.block_outputs)

    def registers(self, tile: MatVecParams) -> int:
        """Estimate what a thread keeps: the weights of a step, what of x goes with them, sums, addresses."""
        weights, numbers = (math.ceil(self.lanes * size / 4) for size in (self.weight_bytes, self.x_bytes))
        return 44 + tile.outputs * (weights + self.rows) + self.rows * numbers

    def resident(self, tile: MatVecParams, target: Target) -> int:
        """Give how many blocks a multiprocessor runs at once."""
        return GPUS[target.arch].resident(tile.threads, self.registers(tile), 0)


TILES = tuple(
    MatVecParams(outputs, unroll, splits, warps)
    for outputs in (1, 2, 4)
    for unroll in (1, 2, 4)
    for splits in (1, 2, 4, 8)
    for warps in (4, 8)
    if outputs * unroll <= 8 and splits <= warps
)

_MOST_REGISTERS = 128
"""Beyond, too few threads are there to have loads under way."""


@dataclass(frozen=True)
class MatVec:
    """Fully connected layers of a few rows, with an elementwise epilogue."""

    name: str = "matvec"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take layers of up to MOST_ROWS rows."""
        return target.is_gpu and matched(kernel) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tiles whose steps are not longer than a row, and stay in registers."""
        shape = _matched(kernel).shape
        steps = math.ceil(shape.depth / shape.lanes / LANES)
        fitting = [tile for tile in TILES if shape.registers(tile) <= _MOST_REGISTERS]
        whole = [tile for tile in fitting if tile.unroll * tile.splits <= steps]
        return [schedule_of(self.name, tile) for tile in whole or [MatVecParams(1, 1, 1, 4)]]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds."""
        return seconds(_matched(kernel).shape, params_of(MatVecParams, schedule), target)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.matvec_loops import matvec_func

        return matvec_func(kernel, _matched(kernel), params_of(MatVecParams, schedule))


@dataclass(frozen=True)
class Layer:
    """A kernel's layer: its node, and what it reads from memory."""

    node: Node
    x: Value
    weight: Value

    @property
    def shape(self) -> MatVecShape:
        """Its sizes."""
        outputs, depth = self.weight.type.static_shape
        sizes = self.weight.dtype.itemsize, self.x.dtype.itemsize
        rows = math.prod(self.x.type.static_shape[:-1])
        return MatVecShape(rows, outputs, depth, vector_of(depth, self.weight.dtype), *sizes)


@lru_cache(256)
def matched(kernel: Fused) -> Layer | None:
    """Find a kernel's layer; None where it has none, or too many rows."""
    node = follows_in_registers(kernel, Dense)
    if node is None or node.types[0].dtype is not DType.F32:
        return None
    x, weight = (stored_plain(value, kernel.body) for value in node.inputs[:2])
    if x is None or weight is None or math.prod(x.type.static_shape[:-1]) > MOST_ROWS:
        return None
    return Layer(node, x, weight)


def _matched(kernel: Fused) -> Layer:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found


# What it takes

_LATENCY = 8e-7
"""Seconds from a load to its data, where memory is busy."""

_LOADS = 4
"""Loads that a thread has under way at most: ptxas puts others off, to keep registers for more threads."""

_L2_BYTES_A_CYCLE = 32
_L1_BYTES_A_CYCLE = 64
"""What a multiprocessor gets from its caches."""

_SHARE_OF_PEAK = 0.5
"""Of multiply-adds, beside the instructions that load and widen their operands."""


def seconds(shape: MatVecShape, tile: MatVecParams, target: Target) -> float:
    """Estimate a layer: what memory takes, or what the multiprocessor takes that has the most blocks.

    That one is bound by the loads it has under way (Little's law), by its caches, or by arithmetic.
    """
    gpu = GPUS[target.arch]
    memory = shape.nbytes / gpu.bandwidth
    blocks = math.ceil(shape.blocks(tile) / gpu.multiprocessors)
    under_way = (
        min(shape.resident(tile, target), blocks)
        * tile.threads
        * min(tile.unroll * tile.outputs, _LOADS)
        * min(CHUNK_BYTES, shape.lanes * shape.weight_bytes)
    )
    weights = blocks * tile.block_outputs * shape.depth
    rate = min(under_way / _LATENCY, _L2_BYTES_A_CYCLE * CYCLES_A_SECOND)
    loads = weights * shape.weight_bytes / rate
    near = weights / tile.outputs * shape.rows * shape.x_bytes / (_L1_BYTES_A_CYCLE * CYCLES_A_SECOND)
    peak = gpu.flops / gpu.multiprocessors * _SHARE_OF_PEAK
    arithmetic = 2 * weights * shape.rows / peak
    bounds = (memory, loads, near, arithmetic)
    return max(bounds) + NOT_HIDDEN * sum(bounds) + _LATENCY + SECONDS_PER_LAUNCH
