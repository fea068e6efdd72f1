"""The tiles of the products of `winograd`, and what the products cost."""

from __future__ import annotations

import math

from cnnc.backends.cuda.ffma_params import NUMBERS, FfmaParams
from cnnc.backends.cuda.machine import GPUS, LANES, LATENCY, sustained_flops
from cnnc.target import Target

TILES = (
    FfmaParams(128, 128, 8, 8, 1, 2, 4),
    FfmaParams(64, 128, 8, 8, 1, 2, 4),
    FfmaParams(128, 64, 8, 8, 1, 2, 4),
    FfmaParams(64, 64, 8, 8, 1, 2, 4),
    FfmaParams(32, 64, 8, 8, 1, 2, 4),
)
"""Of short stages, as there are few channels to add up: from many operations for each byte, to many blocks."""

_COPY = 12
"""Instructions to start the copy of a chunk: its addresses, and whether it is there."""

_BUSY_WARPS = 4
"""Warps that keep a multiprocessor's units for arithmetic busy: sums of a thread do not wait for each other."""


def product_seconds(
    tile: FfmaParams, batches: int, rows: int, columns: int, depth: int, bandwidth: float, target: Target
) -> float:
    """Estimate `batches` products of rows by columns, zeros that fill tiles up included.

    What takes longest decides: issuing instructions, on the multiprocessor with the most blocks; or reading operands,
    once for each tile, and writing sums, at `bandwidth` bytes a second.
    """
    gpu = GPUS[target.arch]
    high, wide = math.ceil(rows / tile.rows), math.ceil(columns / tile.columns)
    blocks = math.ceil(batches * high * wide / gpu.multiprocessors)
    stage = tile.depth * NUMBERS
    terms = math.ceil(depth / stage) * stage
    here = min(blocks, gpu.resident(tile.threads, tile.registers, tile.shared_bytes))
    busy = min(1.0, here * tile.threads / LANES / _BUSY_WARPS)
    # A load of four numbers takes as long as four additions.
    products = tile.rows * tile.columns * terms * (1 + (tile.thread_rows + tile.thread_columns) / tile.sums)
    copies = _COPY * (tile.rows + tile.columns) // NUMBERS * terms
    issue = blocks * 2 * (products + copies) / (sustained_flops(target.arch) / gpu.multiprocessors * busy)
    read = 4 * batches * depth * (rows * wide + columns * high)
    moved = (read + 4 * batches * rows * columns) / bandwidth
    latency = math.ceil(blocks / here) * 2 * LATENCY
    return max(issue, moved, latency)
