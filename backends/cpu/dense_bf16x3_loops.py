"""The loop nest of a fully connected layer on matrix tiles: that of a 1x1 convolution whose pixels are rows."""

from __future__ import annotations

from typing import Any

from cnnc.backends.cpu.conv_bf16x3_loops import MatrixLoops
from cnnc.backends.cpu.conv_bf16x3_shape import MatrixParams
from cnnc.backends.cpu.dense_bf16x3 import convolution
from cnnc.backends.cpu.gemm import DenseShape
from cnnc.backends.cpu.machine import TILE_LINE
from cnnc.backends.cpu.row_index import position
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import Body
from cnnc.ops.blocked import packed_block

__all__ = ["DenseMatrixLoops"]

IN_A_BLOCK = packed_block(TILE_LINE) // TILE_LINE
"""Lines of outputs that lie together in the packed weight."""


class DenseMatrixLoops(MatrixLoops):
    """Writes the loop nest of one layer."""

    def __init__(self, shape: DenseShape, params: MatrixParams, body: Body) -> None:
        self.leading = shape.leading
        super().__init__(convolution(shape), params, body, (*shape.leading, shape.outputs))
        self.next_pixel = shape.outputs

    def _input_at(self, image: Any, block: Any, row: Any, column: Any, lane: Any) -> tuple[Any, ...]:
        return (*position(self.leading, row), block * TILE_LINE + lane)

    def _output_at(self, image: Any, block: Any, row: Any, column: Any, lane: Any) -> tuple[Any, ...]:
        return (*position(self.leading, row), block * TILE_LINE + lane)

    def _read_weight(self, oc: Any, block: Any, r: Any, s: Any, channel: Any) -> Any:
        at = (oc // IN_A_BLOCK, block * TILE_LINE + channel, oc % IN_A_BLOCK * TILE_LINE)
        return loops.widened(self.weight, *at, lanes=TILE_LINE)

    def _ask_for_weight(self, oc: Any, number: Any) -> Any:
        return loops.prefetch(self.weight, oc // IN_A_BLOCK, number // TILE_LINE, oc % IN_A_BLOCK * TILE_LINE)
