"""Tile sizes of products of matrices on a GPU's ordinary cores."""

from __future__ import annotations

from dataclasses import dataclass

from cnnc.backends.cuda.machine import CHUNK_BYTES, LANES

LANE_ROWS, LANE_COLUMNS = 4, 8
"""How the threads of a warp share its tile."""

NUMBERS = CHUNK_BYTES // 4
"""The numbers in a chunk."""


@dataclass(frozen=True)
class FfmaParams:
    """Tiles of a block and of a thread, slices, chunks of depth in a stage, stages, and parts of the depth.

    As many groups of warps as there are slices share the chunks of each stage, and add up their sums in the end.
    """

    rows: int
    columns: int
    thread_rows: int
    thread_columns: int
    slices: int
    depth: int
    stages: int
    splits: int = 1

    @property
    def warp_rows(self) -> int:
        """The rows of a warp's tile."""
        return LANE_ROWS * self.thread_rows

    @property
    def warp_columns(self) -> int:
        """The columns of a warp's tile."""
        return LANE_COLUMNS * self.thread_columns

    @property
    def warps_across(self) -> int:
        """Warps along the columns."""
        return self.columns // self.warp_columns

    @property
    def slice_threads(self) -> int:
        """The threads of a slice."""
        return self.rows // self.warp_rows * self.warps_across * LANES

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return self.slices * self.slice_threads

    @property
    def sums(self) -> int:
        """What a thread adds up."""
        return self.thread_rows * self.thread_columns

    @property
    def slice_bytes(self) -> int:
        """The shared memory through which slices add up."""
        return 4 * self.threads * self.sums if self.slices > 1 else 0

    @property
    def shared_bytes(self) -> int:
        """The most shared memory a block needs, that which keeps banks apart included."""
        return self.stages * self.depth * (self.rows + self.columns + 2) * CHUNK_BYTES + self.slice_bytes

    @property
    def registers(self) -> int:
        """Estimate what a thread keeps: sums, the chunks that it multiplies, addresses."""
        return min(255, self.sums + NUMBERS * self.thread_rows + 2 * NUMBERS * NUMBERS + 40)


TILES = (
    FfmaParams(128, 128, 8, 8, 1, 8, 2),
    FfmaParams(64, 128, 8, 8, 1, 8, 2),
    FfmaParams(128, 64, 8, 8, 1, 8, 2),
    FfmaParams(64, 64, 8, 8, 2, 8, 2),
    FfmaParams(64, 64, 8, 4, 1, 8, 2),
    FfmaParams(32, 64, 8, 8, 4, 8, 3),
    FfmaParams(32, 64, 4, 4, 1, 8, 4),
    FfmaParams(32, 64, 4, 4, 2, 8, 4),
    FfmaParams(64, 32, 4, 4, 2, 8, 4),
    FfmaParams(32, 32, 4, 4, 4, 8, 4),
    FfmaParams(16, 64, 4, 4, 4, 8, 4),
    FfmaParams(16, 32, 4, 4, 4, 8, 4),
    FfmaParams(16, 32, 4, 4, 8, 8, 4),
)
"""From many operations for each byte, for large products, to many blocks, and many warps in each, for small ones."""
