"""Attention in one kernel: scores live in registers and shared memory, a tile of keys at a time.

    scores[m, n] = scale * (sum over d of q[m, d] * k[n, d]) + mask[m, n]
    largest'     = max(largest, max over n of scores)            for each tile of keys, one after the other
    total'       = exp(largest - largest') * total + sum over n of exp(scores - largest')
    y'           = exp(largest - largest') * y + sum over n of exp(scores - largest') * v[n]
    y[m]         = y / total                                     after the last tile

A block of threads takes a tile of queries of one head.  COLUMNS threads share a row of scores, so that its maximum is a
few shuffles away; keys and values of a tile, and the queries, are in shared memory in f32, whatever they are stored in.

Online softmax: Milakov and Gimelshein, 2018; without the matrix of scores in memory: Dao et al., "FlashAttention",
NeurIPS 2022; dividing last, tiles of queries as blocks of threads: Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cnnc.backends.cuda.machine import CYCLES_A_SECOND, GPUS, LANES, NOT_HIDDEN, QUARTERS, SECONDS_PER_LAUNCH
from cnnc.backends.cuda.operands import follows_in_registers, stored_operands
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.graph import Node, Value
from cnnc.ir.types import DType
from cnnc.ops.attention import Attention
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

COLUMNS = 16
"""Threads along the keys of a tile."""

VECTOR = 4
"""Numbers that a thread reads from shared memory at once, at most."""


@dataclass(frozen=True)
class AttentionParams:
    """Queries and keys of a thread, and threads along the queries."""

    rows: int
    keys: int
    high: int

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return COLUMNS * self.high

    @property
    def block_rows(self) -> int:
        """The queries of a block."""
        return self.rows * self.high

    @property
    def block_keys(self) -> int:
        """The keys of a tile."""
        return self.keys * COLUMNS


TILES = tuple(AttentionParams(rows, keys, high) for rows in (1, 2, 4, 8) for keys in (2, 4) for high in (4, 8, 16))


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention: `queries` and `keys` of each of `batch` x `op.heads`, and bytes of a number of q, k, v."""

    op: Attention
    batch: int
    queries: int
    keys: int
    sizes: tuple[int, int, int]
    is_masked: bool = False

    @property
    def features(self) -> int:
        """Features of a query and of a key in shared memory: whole vectors."""
        return _whole(self.op.size, VECTOR)

    @property
    def pitch(self) -> int:
        """From one query or key to the next: an odd number of vectors, so that neighbours lie in different banks."""
        return VECTOR * (self.features // VECTOR | 1)

    @property
    def value_vector(self) -> int:
        """How many neighbouring features of the result a thread computes: as many as leave no thread without any."""
        return next(n for n in (VECTOR, 2, 1) if n == 1 or self.op.value_size % (COLUMNS * n) == 0)

    @property
    def value_vectors(self) -> int:
        """How many such vectors a thread has."""
        return math.ceil(self.op.value_size / (COLUMNS * self.value_vector))

    @property
    def values(self) -> int:
        """Features of a value in shared memory."""
        return COLUMNS * self.value_vector * self.value_vectors

    @property
    def nbytes(self) -> int:
        """What is read and written at least, the output as f32."""
        q, k, v = self.sizes
        read = self.queries * self.op.size * q + self.keys * (self.op.size * k + self.op.value_size * v)
        return self.batch * self.op.heads * (read + 4 * self.queries * self.op.value_size)

    def blocks(self, tile: AttentionParams) -> int:
        """Count the blocks of threads."""
        return self.batch * self.op.heads * math.ceil(self.queries / tile.block_rows)

    def operand_floats(self, tile: AttentionParams) -> int:
        """Count the numbers of queries, keys and values in shared memory."""
        return (tile.block_rows + tile.block_keys) * self.pitch + tile.block_keys * self.values

    def shares(self, tile: AttentionParams) -> tuple[int, int]:
        """Give the extents of the shares in shared memory, a vector more than there are keys to keep banks apart."""
        return tile.block_rows, tile.block_keys + VECTOR

    def shared_bytes(self, tile: AttentionParams) -> int:
        """Give the shared memory of a block."""
        return 4 * (self.operand_floats(tile) + math.prod(self.shares(tile)))

    def registers(self, tile: AttentionParams) -> int:
        """Estimate what a thread keeps: scores, results, what it multiplies, and addresses."""
        result = self.value_vector * self.value_vectors
        operands = max(VECTOR * (tile.rows + tile.keys), VECTOR * tile.rows + result)
        return 56 + tile.rows * (tile.keys + result + 3) + operands

    def resident(self, tile: AttentionParams, target: Target) -> int:
        """Give how many blocks a multiprocessor runs at once."""
        return GPUS[target.arch].resident(tile.threads, self.registers(tile), self.shared_bytes(tile))


@dataclass(frozen=True)
class AttentionTemplate:
    """Attention on plain tensors, with an elementwise epilogue."""

    name: str = "attention"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take attention in f32, of what is stored in f32 or narrower, if a tile fits."""
        return target.is_gpu and matched(kernel) is not None and bool(self._tiles(kernel, target))

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tiles that fit."""
        return [schedule_of(self.name, tile) for tile in self._tiles(kernel, target)]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds."""
        return seconds(_matched(kernel).shape, params_of(AttentionParams, schedule), target)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.attention_loops import attention_func

        found, tile = _matched(kernel), params_of(AttentionParams, schedule)
        return attention_func(kernel, found, tile, found.shape.resident(tile, target))

    def _tiles(self, kernel: Fused, target: Target) -> list[AttentionParams]:
        shape, most = _matched(kernel).shape, GPUS[target.arch].most_shared_bytes
        return [tile for tile in TILES if shape.registers(tile) <= _MOST_REGISTERS and shape.shared_bytes(tile) <= most]


_MOST_REGISTERS = 240
"""Of a thread, by the estimate."""


@dataclass(frozen=True)
class StoredAttention:
    """A kernel's attention: its node, and where q, k, v and perhaps a mask are stored."""

    node: Node
    op: Attention
    stored: tuple[Value, ...]

    @property
    def shape(self) -> AttentionShape:
        """Its sizes."""
        q, k, v = (value.type for value in self.stored[:3])
        (batch, queries, _), (_, keys, _) = q.static_shape, k.static_shape
        sizes = (q.dtype.itemsize, k.dtype.itemsize, v.dtype.itemsize)
        return AttentionShape(self.op, batch, queries, keys, sizes, len(self.stored) > 3)


@lru_cache(256)
def matched(kernel: Fused) -> StoredAttention | None:
    """Find a kernel's attention; None where it has none that is computed in f32."""
    node = follows_in_registers(kernel, Attention, operands=4)
    if node is None or not isinstance(node.op, Attention) or node.types[0].dtype is not DType.F32:
        return None
    stored = stored_operands(node, kernel.body)
    return StoredAttention(node, node.op, stored) if stored is not None else None


def _matched(kernel: Fused) -> StoredAttention:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found


# What it takes

_LONE_WARP = 0.3
"""Instructions a cycle of a warp that has its quarter of a multiprocessor to itself."""

_OF_A_SCORE = 16
"""Instructions from a sum to a share: scale, mask, maximum, exponential, total."""

_OF_A_ROW = 60
"""Those for each query and tile: shuffles, and what the new maximum scales."""

_OF_A_TILE = 100
"""Those for each tile, barriers included."""

_TILE_LATENCY = 1000
"""Cycles from the loads of a tile of keys and values to the first product, which other blocks may use."""

_LATENCY = 1500
"""Cycles from the start of a block to its first product, and from the last to its end."""


def seconds(shape: AttentionShape, tile: AttentionParams, target: Target) -> float:
    """Estimate an attention: rounds of as many blocks as fit, each bound by its instructions, or what memory takes."""
    gpu = GPUS[target.arch]
    warps = math.ceil(tile.threads / LANES)
    blocks = shape.blocks(tile)
    here = min(shape.resident(tile, target), math.ceil(blocks / gpu.multiprocessors))
    rounds = math.ceil(blocks / (gpu.multiprocessors * here))
    quarter = here * warps / QUARTERS
    cycles = _instructions(shape, tile) * quarter / min(1.0, _LONE_WARP * max(1.0, quarter))
    cycles += _TILE_LATENCY * math.ceil(shape.keys / tile.block_keys) / here
    bounds = rounds * (cycles + _LATENCY) / CYCLES_A_SECOND, shape.nbytes / gpu.bandwidth
    return max(bounds) + NOT_HIDDEN * sum(bounds) + SECONDS_PER_LAUNCH


def _instructions(shape: AttentionShape, tile: AttentionParams) -> float:
    """Count those of a thread: multiply-adds, what they read from shared memory, and what is done for each score.

    A load of a vector takes as long as four other instructions, where the lanes read different ones.
    """
    rows, keys, block_keys = tile.rows, tile.keys, tile.block_keys
    result = shape.value_vector * shape.value_vectors
    dots = rows * keys * shape.features + (rows + 4 * keys) * shape.features / VECTOR
    means = rows * result * block_keys + (rows + VECTOR * result) * block_keys / VECTOR
    fill = 4 * block_keys * (shape.features + shape.values) / VECTOR / tile.threads
    each = dots + means + fill + rows * keys * _OF_A_SCORE + rows * _OF_A_ROW + _OF_A_TILE
    return each * math.ceil(shape.keys / block_keys)


def _whole(extent: int, tile: int) -> int:
    return math.ceil(extent / tile) * tile
