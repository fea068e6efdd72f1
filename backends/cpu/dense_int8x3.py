"""Fully connected layers of many rows on AMX's matrix tiles, each float32 in three int8 digits.

    y[m, o] = sum over i of x[m, i] * weight[o, i]        in tiles of 16 rows x 16 outputs

The rows are the pixels of a 1x1 convolution (see conv_int8x3.py), read and written as they lie: each has a scale of its
own.  The weights come as digits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu import conv_int8x3
from cnnc.backends.cpu.anchored import anchor_of, body_of, machine_of
from cnnc.backends.cpu.conv_int8x3_shape import DigitParams
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.gemm import DenseShape
from cnnc.backends.cpu.machine import TILE_LINE
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.digit_conv import MOST_TERMS, digits_layout
from cnnc.ops.digit_dense import DigitDense
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["DenseInt8x3", "build", "convolution"]


def convolution(shape: DenseShape) -> ConvShape:
    """Give the 1x1 convolution that computes the same, a pixel for each row."""
    return ConvShape(1, shape.inputs, shape.rows, 1, shape.outputs, 1, 1)


def build(shape: DenseShape, params: DigitParams, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands begin with x and digits."""
    from cnnc.backends.cpu.dense_int8x3_loops import DenseDigitLoops

    return DenseDigitLoops(shape, params, body).function()


@dataclass(frozen=True)
class DenseInt8x3:
    """The template: `digit_dense` with whole lines of inputs and outputs, and digits as tiles take them."""

    name: str = "dense_int8x3"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a layer of float32 rows, where there are tiles to compute it in."""
        return _find(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tile sizes worth considering."""
        shape = convolution(_known(kernel, target)[1])
        return (schedule_of(self.name, params) for params in conv_int8x3.space(shape, machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        shape = convolution(_known(kernel, target)[1])
        return conv_int8x3.cost(shape, params_of(DigitParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        anchor, shape = _known(kernel, target)
        return build(shape, params_of(DigitParams, schedule), body_of(kernel, anchor))


def _known(kernel: Fused, target: Target) -> tuple[Node, DenseShape]:
    found = _find(kernel, target)
    if found is None:
        raise VerifyError(f"dense_int8x3 cannot compute kernel {kernel.anchor}")
    return found


@lru_cache(64)
def _find(kernel: Fused, target: Target) -> tuple[Node, DenseShape] | None:
    """Give the layer and its sizes, if the kernel is one."""
    if not target.multiplies_tiles:
        return None
    anchor = anchor_of(kernel, target, "digit_dense", digits=(1,))
    if anchor is None or not isinstance(anchor.op, DigitDense):
        return None
    x, digits = anchor.inputs[0].type, anchor.inputs[1].type
    inputs, outputs = x.static_shape[-1], digits.static_shape[0]
    if digits.layout != digits_layout(TILE_LINE) or inputs > MOST_TERMS:
        return None
    if inputs % TILE_LINE or outputs % TILE_LINE:
        return None
    return anchor, DenseShape(x.static_shape[:-1], inputs, outputs, TILE_LINE)
