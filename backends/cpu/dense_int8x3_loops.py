"""The loop nest of a fully connected layer in int8 digits: that of a 1x1 convolution whose pixels are rows."""

from __future__ import annotations

from typing import Any

from cnnc.backends.cpu.conv_int8x3_loops import DigitLoops
from cnnc.backends.cpu.conv_int8x3_shape import DigitParams
from cnnc.backends.cpu.dense_int8x3 import convolution
from cnnc.backends.cpu.gemm import DenseShape
from cnnc.backends.cpu.machine import TILE_LINE
from cnnc.backends.cpu.row_index import position
from cnnc.backends.lower.body import Body

__all__ = ["DenseDigitLoops"]


class DenseDigitLoops(DigitLoops):
    """Writes the loop nest of one layer."""

    def __init__(self, shape: DenseShape, params: DigitParams, body: Body) -> None:
        self.leading = shape.leading
        super().__init__(convolution(shape), params, body, (*shape.leading, shape.outputs))

    def _input_at(self, image: Any, block: Any, row: Any, column: Any, lane: Any) -> tuple[Any, ...]:
        return (*position(self.leading, row), block * TILE_LINE + lane)

    def _output_at(self, image: Any, oc: Any, pixel: Any, lane: Any) -> tuple[Any, ...]:
        return (*position(self.leading, pixel), oc * TILE_LINE + lane)
