"""Tile sizes for tensor cores, and what a product in such tiles takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from cnnc.backends.cuda.ffma_params import FfmaParams
from cnnc.backends.cuda.machine import (
    CHUNK_BYTES,
    CYCLES_A_SECOND,
    GPUS,
    LANES,
    MULTIPROCESSORS,
    NOT_HIDDEN,
    QUARTERS,
    SECONDS_PER_LAUNCH,
)
from cnnc.ir.types import DType
from cnnc.target import Target

MMA_ROWS, MMA_COLUMNS = 16, 8

GROUP_THREADS = 4 * LANES
GROUP_ROWS = 64
"""What four warps multiply together, by any number of columns up to 256 that 8 divides (`wgmma`)."""

SWIZZLED = 8
"""Chunks in 128 bytes, over which `wgmma` has the chunks of a row change places."""


@dataclass(frozen=True)
class MmaParams:
    """Tiles of a block and of a warp, chunks of depth in a stage, stages, and parts that the depth is split into."""

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int
    depth: int
    stages: int
    splits: int = 1

    @property
    def warps_across(self) -> int:
        """Warps along the columns."""
        return self.columns // self.warp_columns

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return self.rows // self.warp_rows * self.warps_across * LANES

    @property
    def sums(self) -> int:
        """What a thread adds up."""
        return self.warp_rows * self.warp_columns // LANES

    @property
    def shared_bytes(self) -> int:
        """The most shared memory a block needs, that which keeps banks apart included."""
        return self.stages * self.depth * (self.rows + self.columns + 16) * CHUNK_BYTES


@dataclass(frozen=True)
class WgmmaParams:
    """Tiles of a block, groups of four warps that share its rows, stages, and parts that the depth is split into."""

    rows: int
    columns: int
    groups: int
    stages: int
    splits: int = 1

    @property
    def depth(self) -> int:
        """Chunks of depth in a stage."""
        return SWIZZLED

    @property
    def group_rows(self) -> int:
        """The rows of a group of warps."""
        return self.rows // self.groups

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return self.groups * GROUP_THREADS

    @property
    def sums(self) -> int:
        """What a thread adds up."""
        return self.group_rows * self.columns // GROUP_THREADS

    @property
    def shared_bytes(self) -> int:
        """The shared memory of a block."""
        return self.stages * self.depth * (self.rows + self.columns) * CHUNK_BYTES


@dataclass(frozen=True)
class TmaParams(WgmmaParams):
    """The same where one thread has whole boxes copied (TMA), and each stage has a barrier."""

    @property
    def barrier_chunks(self) -> int:
        """The chunks of shared memory for barriers: one each."""
        return self.stages

    @property
    def shared_bytes(self) -> int:
        """The shared memory of a block."""
        return super().shared_bytes + self.barrier_chunks * CHUNK_BYTES


BlockTile = MmaParams | WgmmaParams

Tile = TypeVar("Tile", bound=BlockTile | FfmaParams)

TILES = (
    MmaParams(128, 256, 64, 64, 4, 3),
    MmaParams(256, 128, 64, 64, 4, 3),
    MmaParams(128, 128, 64, 32, 4, 4),
    MmaParams(128, 64, 32, 32, 4, 4),
    MmaParams(64, 128, 32, 32, 4, 4),
    MmaParams(64, 64, 32, 32, 4, 4),
    MmaParams(64, 64, 32, 16, 8, 3),
    MmaParams(32, 64, 16, 32, 8, 4),
    MmaParams(64, 32, 32, 16, 8, 4),
    MmaParams(32, 32, 16, 16, 8, 4),
)
"""From many operations for each byte, for large products, to many blocks, for small ones."""

WGMMA_TILES = (
    WgmmaParams(128, 256, 2, 4),
    WgmmaParams(256, 128, 2, 4),
    WgmmaParams(128, 192, 2, 4),
    WgmmaParams(128, 128, 2, 4),
    WgmmaParams(128, 64, 2, 4),
    WgmmaParams(64, 256, 1, 4),
    WgmmaParams(64, 128, 1, 4),
    WgmmaParams(64, 64, 1, 5),
)
"""The same for groups of warps."""

TMA_TILES = tuple(TmaParams(tile.rows, tile.columns, tile.groups, tile.stages) for tile in WGMMA_TILES)

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class MmaShape:
    """Products of matrices: rows by columns, over `chunks` of 16 bytes, of numbers of a type."""

    rows: int
    columns: int
    chunks: int
    dtype: DType
    batches: int = 1

    def blocks(self, tile: BlockTile | FfmaParams) -> int:
        """Count the tiles."""
        return self.batches * math.ceil(self.rows / tile.rows) * math.ceil(self.columns / tile.columns)

    def steps(self, tile: BlockTile | FfmaParams) -> int:
        """Count the stages that each part of the depth goes through, at most."""
        return math.ceil(math.ceil(self.chunks / tile.depth) / tile.splits)

    def candidates(self, tiles: Iterable[Tile], target: Target) -> list[Tile]:
        """List the tiles worth considering: those that fit; parts, where blocks would leave multiprocessors idle."""
        found = []
        for tile in tiles:
            if tile.shared_bytes > GPUS[target.arch].most_shared_bytes:
                continue
            steps = math.ceil(self.chunks / tile.depth)
            for splits in SPLITS:
                whole = splits == 1 or math.ceil(steps / math.ceil(steps / splits)) == splits
                few = splits == 1 or self.blocks(tile) * splits <= 2 * MULTIPROCESSORS[target.arch]
                if whole and few and (splits == 1 or steps >= FEWEST_STEPS * splits):
                    found.append(replace(tile, splits=splits))
        return found


FEWEST_STEPS = 4
"""Stages that a part of the depth should have: fewer are over before the copies are under way."""

CYCLES_OF_MMA = {"sm_80": 8, "sm_86": 32, "sm_89": 32, "sm_90": 6, "sm_90a": 6}
"""Between instructions of tensor cores in a multiprocessor's quarter; tf32's take as long, and do half the work."""

_WGMMA_COLUMNS_A_CYCLE = 2
"""Of 64 rows over two chunks, by a multiprocessor: the data sheet's peak, of which `mma` comes to two thirds."""

_WGMMA_CYCLES_OF_STEP = 60
"""From one stage to the next: warps of all groups wait for each other, and find out where the chunks are."""

_TMA_CYCLES_OF_STEP = 30
"""The same where they only wait, and one thread starts a few copies.  A guess, as is the next: not measured."""

LINE_BYTES = 128
_TMA_CYCLES_OF_LINE = 1
"""For a multiprocessor's copies to go from one line of a box, or so many bytes of a longer one, to the next."""

BYTES_A_CYCLE = 32
"""What a multiprocessor gets from the L2 cache."""

_LATENCY = 700
"""Cycles from the start of a block to its first product, and from the last to its end."""

_SCRATCH_BYTES_PER_SECOND = 2e12


def seconds(shape: MmaShape, tile: BlockTile, target: Target, lines: int = 0) -> float:
    """Estimate a product: rounds of as many blocks as fit, each bound by tensor cores or by what it reads.

    `lines` are those of a stage's boxes, where it is copied so.  Nor is it done before memory has given all columns
    once; rows may be those of an image, which are read again from near.  Parts of the depth cost writing and reading
    their sums, and a launch.
    """
    multiprocessors = MULTIPROCESSORS[target.arch]
    blocks = shape.blocks(tile) * tile.splits
    at_once = resident(tile, target)
    here = min(at_once, math.ceil(blocks / multiprocessors))
    multiply = _wgmma_cycles(tile, here) if isinstance(tile, WgmmaParams) else _mma_cycles(tile, here, target)
    read = tile.depth * (tile.rows + tile.columns) * CHUNK_BYTES / BYTES_A_CYCLE
    read = max(read, lines * _TMA_CYCLES_OF_LINE)
    cycles = shape.steps(tile) * max(multiply, read) * here + _LATENCY
    rounds = math.ceil(blocks / (multiprocessors * here))
    memory = shape.batches * shape.columns * shape.chunks * CHUNK_BYTES / GPUS[target.arch].bandwidth
    bounds = rounds * cycles / CYCLES_A_SECOND, memory
    total = max(bounds) + NOT_HIDDEN * sum(bounds) + SECONDS_PER_LAUNCH
    if tile.splits > 1:
        moved = 2 * 4 * tile.splits * shape.batches * shape.rows * shape.columns
        total += moved / _SCRATCH_BYTES_PER_SECOND + SECONDS_PER_LAUNCH
    return total


def _mma_cycles(tile: MmaParams, here: int, target: Target) -> float:
    """Estimate the cycles in which `here` blocks multiply a stage each, by their number."""
    instructions = tile.rows // MMA_ROWS * (tile.columns // MMA_COLUMNS) * (tile.depth // 2)
    # A warp alone does not keep its quarter of a multiprocessor busy.
    busy = min(1.0, 0.35 + 0.2 * here * tile.threads / LANES / QUARTERS)
    return instructions / QUARTERS * CYCLES_OF_MMA[target.arch] / busy


def _wgmma_cycles(tile: WgmmaParams, here: int) -> float:
    """Estimate the same where groups of warps multiply; while one goes from stage to stage, others go on."""
    products = tile.rows // GROUP_ROWS * (tile.depth // 2)
    step = _TMA_CYCLES_OF_STEP if isinstance(tile, TmaParams) else _WGMMA_CYCLES_OF_STEP
    return products * tile.columns / _WGMMA_COLUMNS_A_CYCLE + step / (here * tile.groups)


def resident(tile: BlockTile, target: Target) -> int:
    """Give how many blocks a multiprocessor runs at once, by shared memory and by registers."""
    return GPUS[target.arch].resident(tile.threads, min(255, tile.sums + 64), tile.shared_bytes)
