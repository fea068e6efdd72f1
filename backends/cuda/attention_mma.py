"""Attention in one kernel on tensor cores: scores and shares live in registers, a tile of keys at a time.

    scores[m, n] = scale * (sum over d of q[m, d] * k[n, d]) + mask[m, n]       products of 16 bits, sums in f32
    y[m]         = (sum over n of round(exp(scores - largest)) * v[n]) / (sum over n of exp(scores - largest))

with the largest score so far, to which earlier sums are scaled (see `online_softmax`).  A warp keeps fragments of 16
queries, with their sums, in registers.  Keys and values come by asynchronous copies, stage by stage (see `mma_ring`).
As sums lie in registers just as factors do, shares are rounded to the type of the values where they are, and
multiplied.  Where there are few queries, warps share the keys of a tile, and add up at the end what each has found.

Dao, "FlashAttention-2", 2023, which rounds shares, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cnnc.backends.cuda import attention
from cnnc.backends.cuda.attention import AttentionShape, StoredAttention
from cnnc.backends.cuda.machine import (
    CHUNK_BYTES,
    CYCLES_A_SECOND,
    GPUS,
    LANES,
    NOT_HIDDEN,
    QUARTERS,
    SECONDS_PER_LAUNCH,
)
from cnnc.backends.cuda.mma_params import BYTES_A_CYCLE, CYCLES_OF_MMA, MMA_COLUMNS, MMA_ROWS
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.types import DType
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

PAIR = 16
"""Numbers in two chunks: the depth of a product."""

MOST_FEATURES = 128
"""Of a head."""

_CHUNK = 8
"""Numbers in a chunk."""


@dataclass(frozen=True)
class AttentionMmaParams:
    """Fragments of a warp, warps along queries and along the keys of a tile, keys of a tile, and stages."""

    fragments: int
    high: int
    across: int
    keys: int
    stages: int

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return self.high * self.across * LANES

    @property
    def warp_rows(self) -> int:
        """The queries of a warp."""
        return self.fragments * MMA_ROWS

    @property
    def rows(self) -> int:
        """The queries of a block."""
        return self.high * self.warp_rows

    @property
    def warp_keys(self) -> int:
        """The keys of a warp in each tile."""
        return self.keys // self.across

    @property
    def scores(self) -> int:
        """The scores of a thread in each tile."""
        return self.warp_rows * self.warp_keys // LANES

    def sums(self, shape: AttentionShape) -> int:
        """Count what a thread adds up of the result."""
        return self.warp_rows * whole_pairs(shape.op.value_size) // LANES

    def parts(self, shape: AttentionShape) -> int:
        """Count what a thread hands to the warp that adds up: sums, and largest and total of its rows."""
        return self.sums(shape) + 4 * self.fragments

    def shared_bytes(self, shape: AttentionShape) -> int:
        """Give the shared memory of a block, that which keeps banks apart included; parts come when it is free."""
        size, value_size = whole_pairs(shape.op.size) // _CHUNK, whole_pairs(shape.op.value_size) // _CHUNK
        stage = size * (self.keys + 1) + self.keys * (value_size + 1)
        parts = 4 * (self.across - 1) * self.high * LANES * self.parts(shape)
        return max((size * (self.rows + 1) + self.stages * stage) * CHUNK_BYTES, parts)

    def registers(self, shape: AttentionShape) -> int:
        """Estimate what a thread keeps: queries, scores, sums, factors, addresses, and numbers of a mask."""
        queries = self.warp_rows * whole_pairs(shape.op.size) // 2 // LANES
        return 64 + queries + self.scores + self.sums(shape) + 8 * self.fragments + (24 if shape.is_masked else 0)

    def blocks(self, shape: AttentionShape) -> int:
        """Count the blocks of threads."""
        return shape.batch * shape.op.heads * math.ceil(shape.queries / self.rows)

    def resident(self, shape: AttentionShape, target: Target) -> int:
        """Give how many blocks a multiprocessor runs at once."""
        return GPUS[target.arch].resident(self.threads, self.registers(shape), self.shared_bytes(shape))


TILES = tuple(
    AttentionMmaParams(fragments, high, across, keys, stages)
    for fragments, high, across, keys in (
        (2, 4, 1, 64),
        (2, 4, 1, 32),
        (1, 8, 1, 64),
        (1, 4, 1, 64),
        (1, 4, 1, 32),
        (1, 2, 2, 64),
        (1, 2, 1, 32),
        (1, 1, 4, 128),
        (1, 1, 4, 64),
        (1, 1, 2, 32),
    )
    for stages in (2, 3, 4)
)
"""From few copies for each product, for many queries, to many blocks, for few."""


@dataclass(frozen=True)
class AttentionMma:
    """Attention on plain tensors of 16 bits whose heads are whole chunks, with an elementwise epilogue."""

    name: str = "attention_mma"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take attention whose queries, keys and values are narrow, if a tile fits."""
        return target.is_gpu and matched(kernel) is not None and bool(self._tiles(kernel, target))

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tiles that fit."""
        return [schedule_of(self.name, tile) for tile in self._tiles(kernel, target)]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds."""
        return seconds(_matched(kernel).shape, params_of(AttentionMmaParams, schedule), target)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.attention_mma_loops import attention_mma_func

        found, tile = _matched(kernel), params_of(AttentionMmaParams, schedule)
        return attention_mma_func(kernel, found, tile, tile.resident(found.shape, target))

    def _tiles(self, kernel: Fused, target: Target) -> list[AttentionMmaParams]:
        shape, most = _matched(kernel).shape, GPUS[target.arch].most_shared_bytes
        return [t for t in TILES if t.registers(shape) <= _MOST_REGISTERS and t.shared_bytes(shape) <= most]


_MOST_REGISTERS = 248
"""Of a thread, by the estimate."""


@lru_cache(256)
def matched(kernel: Fused) -> StoredAttention | None:
    """Find a kernel's attention; None where it is not for tensor cores, or a copy would not begin at whole chunks."""
    found = attention.matched(kernel)
    if found is None:
        return None
    op, stored = found.op, found.stored[:3]
    features = [value.type.static_shape[2] for value in stored]
    places = [op.size, op.value_size, *op.starts, *features, *(op.steps if op.heads > 1 else ())]
    is_whole = not any(place % _CHUNK for place in places) and max(op.size, op.value_size) <= MOST_FEATURES
    narrow = stored[0].dtype in (DType.F16, DType.BF16) and len({value.dtype for value in stored}) == 1
    return found if is_whole and narrow else None


def _matched(kernel: Fused) -> StoredAttention:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found


def whole_pairs(features: int) -> int:
    """Give the features of a head with the zeros that fill the last product."""
    return math.ceil(features / PAIR) * PAIR


# What it takes

_CYCLES_OF_EXP2 = 8
"""Between such instructions of a warp, of which a quarter of a multiprocessor has four lanes."""

_CYCLES_OF_LOAD = 16
"""Between a warp's loads of four matrices: 512 bytes, while shared memory gives 128 a cycle to all quarters."""

_LONE_WARP = 0.6
"""Instructions a cycle of a warp that has its quarter of a multiprocessor to itself; scores do not wait for another."""

_LATENCY_OF_MMA = 33
"""Cycles from a product's start to the next one that adds to it."""

_OF_A_SCORE = 6
"""Instructions from a sum to a share: maximum, difference, scale, exponential, total, half of a rounding."""

_OF_A_MASK = 6
"""Those for what a mask adds to a score: its address, the load, scale and sum."""

_OF_A_ROW = 24
"""Those for each query and tile: shuffles, and what the new maximum scales."""

_OF_A_COPY = 10
"""Those to copy a chunk: where it is, and whether."""

_OF_A_TILE = 60
"""Those for each tile, barriers included."""

_TILE_LATENCY = 1000
"""Cycles from the copies of a tile of keys and values to the first product."""

_LATENCY = 1500
"""Cycles from the start of a block to its first product, and from the last to its end."""


def seconds(shape: AttentionShape, tile: AttentionMmaParams, target: Target) -> float:
    """Estimate an attention: rounds of as many blocks as fit, or what memory takes.

    A tile of keys takes as long as tensor cores, exponentials, loads or all instructions do for the warps of a quarter,
    as one warp that multiplies and takes shares by turns, or as what it reads is on its way.
    """
    gpu = GPUS[target.arch]
    blocks = tile.blocks(shape)
    here = min(tile.resident(shape, target), math.ceil(blocks / gpu.multiprocessors))
    rounds = math.ceil(blocks / (gpu.multiprocessors * here))
    quarter = math.ceil(here * tile.threads / LANES / QUARTERS)
    size, value_size = whole_pairs(shape.op.size), whole_pairs(shape.op.value_size)
    products = tile.fragments * tile.warp_keys * (size + value_size) // (MMA_COLUMNS * PAIR)
    loads = tile.warp_keys * (size + value_size) // PAIR**2
    others = _others(shape, tile)
    multiply, powers = products * CYCLES_OF_MMA[target.arch], tile.scores * _CYCLES_OF_EXP2
    units = multiply, powers, loads * _CYCLES_OF_LOAD, products + loads + others
    busy = quarter * (max(units) + NOT_HIDDEN * sum(units))
    alone = multiply + max(powers, others / _LONE_WARP) + _LATENCY_OF_MMA * (size + tile.warp_keys) / PAIR
    read = 2 * tile.keys * (size + value_size) * here / BYTES_A_CYCLE
    step, steps = max(busy, alone, read), math.ceil(shape.keys / tile.keys)
    all_steps = step + (steps - 1) * max(step, _TILE_LATENCY / (tile.stages - 1))
    handed_over = (tile.across - 1) * 4 * tile.parts(shape) / _LONE_WARP
    cycles = all_steps + handed_over + _LATENCY
    bounds = rounds * cycles / CYCLES_A_SECOND, shape.nbytes / gpu.bandwidth
    return max(bounds) + NOT_HIDDEN * sum(bounds) + SECONDS_PER_LAUNCH


def _others(shape: AttentionShape, tile: AttentionMmaParams) -> float:
    """Count a warp's instructions for a tile of keys, but for products and loads."""
    features = whole_pairs(shape.op.size) + whole_pairs(shape.op.value_size)
    copies = tile.keys * features / _CHUNK / tile.threads
    of_a_score = _OF_A_SCORE + (_OF_A_MASK if shape.is_masked else 0)
    of_rows = tile.sums(shape) + 2 * tile.fragments * _OF_A_ROW
    return tile.scores * of_a_score + of_rows + _OF_A_COPY * copies + _OF_A_TILE
