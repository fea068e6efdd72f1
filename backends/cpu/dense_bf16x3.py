"""Fully connected layers of many rows on AMX's matrix tiles, each float32 in three bf16 parts.

    y[m, o] = sum over i of x[m, i] * weight[o, i]        in tiles of 16 rows x 16 outputs

The rows are the pixels of a 1x1 convolution (see conv_bf16x3.py), read and written as they lie; the weight is packed,
as for the kernels without tiles (see gemm_packed.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu import conv_bf16x3
from cnnc.backends.cpu.anchored import anchor_of, body_of, machine_of, operand_bytes
from cnnc.backends.cpu.conv_bf16x3_shape import MatrixParams
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.gemm import DenseShape
from cnnc.backends.cpu.machine import TILE_LINE
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.blocked import packed_block, weight_layout
from cnnc.ops.dense import Dense
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["DenseBf16x3", "build", "convolution"]


def convolution(shape: DenseShape) -> ConvShape:
    """Give the 1x1 convolution that computes the same, a pixel for each row."""
    plain = ConvShape(1, shape.inputs, shape.rows, 1, shape.outputs, 1, 1)
    return replace(plain, weight_bytes=shape.weight_bytes, parts=shape.parts)


def build(shape: DenseShape, params: MatrixParams, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands begin with x and weight."""
    from cnnc.backends.cpu.dense_bf16x3_loops import DenseMatrixLoops

    return DenseMatrixLoops(shape, params, body).function()


@dataclass(frozen=True)
class DenseBf16x3:
    """The template: layers whose algorithm is `bf16x3`, with whole lines of inputs and outputs and a packed weight."""

    name: str = "dense_bf16x3"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a `dense` of float32 rows, where there are tiles to compute it in."""
        return _find(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tile sizes worth considering."""
        shape = convolution(_known(kernel, target)[1])
        return (schedule_of(self.name, params) for params in conv_bf16x3.space(shape, machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        shape = convolution(_known(kernel, target)[1])
        return conv_bf16x3.cost(shape, params_of(MatrixParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        anchor, shape = _known(kernel, target)
        return build(shape, params_of(MatrixParams, schedule), body_of(kernel, anchor))


def _known(kernel: Fused, target: Target) -> tuple[Node, DenseShape]:
    found = _find(kernel, target)
    if found is None:
        raise VerifyError(f"dense_bf16x3 cannot compute kernel {kernel.anchor}")
    return found


@lru_cache(64)
def _find(kernel: Fused, target: Target) -> tuple[Node, DenseShape] | None:
    """Give the layer and its sizes, if the kernel is one."""
    if not target.multiplies_tiles:
        return None
    anchor = anchor_of(kernel, target, "dense", prologue=True, narrow=(1,))
    if anchor is None or not isinstance(anchor.op, Dense) or anchor.op.algorithm != "bf16x3":
        return None
    x, weight = anchor.inputs[0].type, anchor.inputs[1].type
    if x.layout is not None or weight.layout != weight_layout(2, 1, packed_block(TILE_LINE)):
        return None
    outputs, inputs = weight.static_shape
    if inputs % TILE_LINE or outputs % TILE_LINE:
        return None
    parts = (conv_bf16x3.bf16_parts(anchor.inputs[0]), conv_bf16x3.bf16_parts(anchor.inputs[1]))
    return anchor, DenseShape(x.static_shape[:-1], inputs, outputs, TILE_LINE, operand_bytes(anchor.inputs[1]), parts)
