"""Products of matrices in f32 on a GPU's ordinary cores: fully connected layers, and products of activations.

    y[..., m, n] = epilogue(sum over k of a[..., m, k] * b[..., k, n])        a layer's b is its weight, transposed

A block of threads takes both operands into shared memory, whichever way round they lie (`cp.async`, 16 bytes at a time
where lines begin at multiples of that), and each thread adds up a tile in registers.  Sums are those of f32 numbers, by
fused multiply-additions (`FFMA`).  Where there are few tiles, slices of warps of a block share the depth of each, and
then blocks do (see `mma_launch`).

Volkov and Demmel, "Benchmarking GPUs to tune dense linear algebra", SC 2008; Kerr et al., "CUTLASS: Fast Linear Algebra
in CUDA C++", 2017, also for slices of warps (sliced-K) and of blocks (split-K).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cnnc.backends.cuda.codegen import MOST_BLOCKS
from cnnc.backends.cuda.ffma_params import NUMBERS, TILES, FfmaParams
from cnnc.backends.cuda.machine import CHUNK_BYTES, GPUS, LANES, NOT_HIDDEN, SECONDS_PER_LAUNCH
from cnnc.backends.cuda.matrices import MatrixProduct, matrix_product
from cnnc.backends.cuda.matvec import MOST_ROWS
from cnnc.backends.cuda.operands import follows_in_registers, stored_plain
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.types import DType
from cnnc.ops.dense import Dense, MatMul
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target


@dataclass(frozen=True)
class MatMulFfma:
    """Products of f32 matrices of any size, with an elementwise epilogue."""

    name: str = "matmul_ffma"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take products whose operands are f32; layers of up to MOST_ROWS rows are left to `matvec`."""
        return target.is_gpu and matched(kernel) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give every tile that fits, with the parts that keep multiprocessors busy."""
        return [schedule_of(self.name, tile) for tile in _matched(kernel).shape.candidates(TILES, target)]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds."""
        return seconds(_matched(kernel), params_of(FfmaParams, schedule), target)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.matmul_mma_loops import matmul_mma_func

        return matmul_mma_func(kernel, _matched(kernel), params_of(FfmaParams, schedule))


@lru_cache(256)
def matched(kernel: Fused) -> MatrixProduct | None:
    """Find a kernel's product; None where it is none of f32, has few rows, or more tiles than a grid."""
    node = follows_in_registers(kernel, (Dense, MatMul))
    if node is None or node.types[0].dtype is not DType.F32:
        return None
    left, right = (stored_plain(value, kernel.body) for value in node.inputs[:2])
    if left is None or right is None or not left.dtype is right.dtype is DType.F32:
        return None
    found = matrix_product(node, left, right)
    if isinstance(node.op, Dense) and found.shape.rows <= MOST_ROWS:
        return None
    _, most_down, most_deep = MOST_BLOCKS
    fewest_columns = min(tile.columns for tile in TILES)
    fits = found.shape.columns <= most_down * fewest_columns and found.shape.batches <= most_deep
    return found if fits else None


def _matched(kernel: Fused) -> MatrixProduct:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found


# What it takes

_LANES = {"sm_80": 64}
_MOST_LANES = 128
"""Multiply-additions that a multiprocessor does in a cycle, and what more recent ones do."""

_QUARTERS = 4
"""Of a multiprocessor, each with a scheduler, which issues one instruction of a warp in a cycle."""

_CYCLES_OF_LOAD = 4
"""Of a multiprocessor's shared memory, for 16 bytes for each lane of a warp."""

_CYCLES_TO_LOAD = 30
"""From a load from shared memory to its use."""

_CYCLES_OF_COPY = 6
"""Instructions to start a copy: its place, its conditions, its address."""

_CYCLES_OF_FETCH = 500
"""From a copy's start to its end, where the L2 cache has what is copied."""

_CYCLES_OF_STEP = 60
"""From one stage to the next: threads wait for their copies, and for each other."""

_CYCLES_OF_SUM = 8
"""Instructions for a sum to be stored, what follows included."""

_LATENCY = 1100
"""Cycles from the start of a block to its first product, and from the last to its end."""

_BYTES_A_CYCLE = 32
"""What a multiprocessor gets from the L2 cache."""

_SCRATCH_BYTES_PER_SECOND = 2e12


def seconds(found: MatrixProduct, tile: FfmaParams, target: Target) -> float:
    """Estimate a product: the blocks of the multiprocessor that has the most, in rounds of as many as fit.

    Nor is it done before memory has given all operands once.  Parts of the depth cost writing and reading their sums,
    and a launch.
    """
    gpu, shape = GPUS[target.arch], found.shape
    lanes = _LANES.get(target.arch, _MOST_LANES)
    cycles_a_second = gpu.flops / (2 * gpu.multiprocessors * lanes)

    def cycles(here: int) -> float:
        store = tile.sums / tile.slices * _CYCLES_OF_SUM * max(1, here * tile.threads / LANES / _QUARTERS)
        return shape.steps(tile) * _cycles_of_stage(found, tile, lanes, here) + store + _LATENCY

    resident = gpu.resident(tile.threads, tile.registers, tile.shared_bytes)
    rounds, rest = divmod(math.ceil(shape.blocks(tile) * tile.splits / gpu.multiprocessors), resident)
    work = ((rounds * cycles(resident) if rounds else 0) + (cycles(rest) if rest else 0)) / cycles_a_second
    memory = sum(matrix.stored.type.nbytes for matrix in (found.left, found.right)) / gpu.bandwidth
    bounds = work, memory
    total = max(bounds) + NOT_HIDDEN * sum(bounds) + SECONDS_PER_LAUNCH
    if tile.splits > 1:
        moved = 2 * 4 * tile.splits * shape.batches * shape.rows * shape.columns
        total += moved / _SCRATCH_BYTES_PER_SECOND + SECONDS_PER_LAUNCH
    return total


def _cycles_of_stage(found: MatrixProduct, tile: FfmaParams, lanes: int, here: int) -> float:
    """Estimate the cycles in which `here` blocks multiply a stage each.

    That is bound by what is issued, by shared memory, by what a warp waits for by itself, by what the L2 cache gives,
    or by how far copies are ahead.
    """
    warps = here * tile.threads / LANES
    chunks = tile.depth / tile.slices
    load = tile.thread_rows + tile.thread_columns
    multiply = tile.sums * NUMBERS * LANES * _QUARTERS / lanes
    copies = tile.depth * sum(
        extent * matrix.chunk / matrix.piece
        for extent, matrix in ((tile.rows, found.left), (tile.columns, found.right))
    )
    copy = copies / tile.threads * _CYCLES_OF_COPY
    bounds = (
        (chunks * max(multiply, tile.sums * NUMBERS + load) + copy) * warps / _QUARTERS,
        chunks * load * _CYCLES_OF_LOAD * warps,
        chunks * (_CYCLES_TO_LOAD + multiply) + copy,
        here * tile.depth * (tile.rows + tile.columns) * CHUNK_BYTES / _BYTES_A_CYCLE,
        _CYCLES_OF_FETCH / (tile.stages - 1),
    )
    return max(bounds) + NOT_HIDDEN * sum(bounds) + _CYCLES_OF_STEP
