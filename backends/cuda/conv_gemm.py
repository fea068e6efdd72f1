"""Convolution as a product of matrices that is never laid out (implicit GEMM), in f32 on a GPU's ordinary cores.

    columns[k, j] = x[n, ic, oh * stride - pad + r * dilation, ...]     k = (ic, r, s), j = (oh, ow), 0 in the padding
    y[n, o, j]    = epilogue(sum over k of w[o, k] * columns[k, j])

A block of threads computes `rows` output channels of `columns` pixels of one image.  It takes `depth` terms of k at a
time into shared memory, both operands, and each thread adds up a tile of `thread_rows` by `thread_columns` in
registers, on which the epilogue works too.  Operands are filled up with zeros to whole tiles, so that no addition
needs a guard.

Volkov and Demmel, "Benchmarking GPUs to tune dense linear algebra", SC 2008; Chetlur et al., "cuDNN", 2014, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cnnc.backends.cuda.flat_epilogue import FlatKernel, flat_kernel
from cnnc.backends.cuda.machine import COPY, LATENCY, MULTIPROCESSORS, SECONDS_PER_LAUNCH, sustained_flops
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

_CHAIN = 3
"""Loads that a block waits for at least, one after the other: of both operands, and of a bias."""

MOST_IMAGES = 65535
"""Blocks of a grid along its third dimension."""


@dataclass(frozen=True)
class GemmParams:
    """Tile sizes: of a block, of the terms in shared memory, of a thread."""

    rows: int
    columns: int
    depth: int
    thread_rows: int
    thread_columns: int

    @property
    def threads(self) -> tuple[int, int]:
        """The threads of a block: along the pixels, along the channels."""
        return self.columns // self.thread_columns, self.rows // self.thread_rows


TILES = (
    GemmParams(128, 128, 8, 8, 8),
    GemmParams(64, 128, 8, 8, 4),
    GemmParams(64, 64, 8, 4, 4),
    GemmParams(32, 64, 8, 4, 4),
    GemmParams(32, 32, 16, 2, 2),
    GemmParams(16, 64, 16, 2, 2),
)
"""From many operations for each load, for large products, to many blocks, for small ones."""


@dataclass(frozen=True)
class ConvGemm:
    """Convolutions of one group with an elementwise epilogue."""

    name: str = "conv_gemm"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take f32 convolutions of images, direct, of one group, whose followers go along flattened pixels."""
        flat = flat_kernel(kernel) if target.is_gpu else None
        if flat is None:
            return False
        shape = _shape(flat)
        # One row or column is a product of a matrix and a vector, which tiles do not help.
        return shape.images <= MOST_IMAGES and shape.rows > 1 and shape.columns > 1

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give every tile."""
        return [schedule_of(self.name, tile) for tile in TILES]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds: arithmetic, zeros included, and copies of the multiprocessors that have the most blocks."""
        tile = params_of(GemmParams, schedule)
        shape = _shape(_matched(kernel))
        blocks = shape.images * _ceil(shape.rows, tile.rows) * _ceil(shape.columns, tile.columns)
        multiprocessors = MULTIPROCESSORS[target.arch]
        rounds = _ceil(blocks, multiprocessors)
        depth = _ceil(shape.depth, tile.depth) * tile.depth
        flops = 2 * tile.rows * tile.columns * depth
        # For each term a thread loads a row and a column of its tile; a load takes as long as an addition.
        a, b = tile.thread_rows, tile.thread_columns
        copies = 2 * COPY * (tile.rows + tile.columns) * depth
        operations = flops * (1 + (a + b) / (a * b)) + copies
        issue = rounds * operations / (sustained_flops(target.arch) / multiprocessors)
        return max(issue, _CHAIN * LATENCY) + SECONDS_PER_LAUNCH

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the scheduled PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.conv_gemm_schedule import conv_gemm_func

        return conv_gemm_func(_matched(kernel), params_of(GemmParams, schedule))


@dataclass(frozen=True)
class GemmShape:
    """A product for each image: rows (output channels), columns (pixels), and the depth summed over."""

    images: int
    rows: int
    columns: int
    depth: int


def _shape(flat: FlatKernel) -> GemmShape:
    images, rows, pixels = flat.products.type.static_shape
    return GemmShape(images, rows, pixels, math.prod(flat.operands[1].type.static_shape[1:]))


def _matched(kernel: Fused) -> FlatKernel:
    found = flat_kernel(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found


def _ceil(a: int, b: int) -> int:
    return math.ceil(a / b)
