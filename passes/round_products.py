"""Multiply in tf32 or bf16: round what convolutions and products of matrices are computed from, inside their kernels.

    conv(x, w, b) -> conv(round_tf32(x), round_tf32(w), b)

The products of such numbers are exact in f32, in which they are added up: what the graph means is what tensor cores
compute.  Nothing is stored any differently.  Convolutions whose groups are no whole blocks of 4 channels, which tensor
cores do not help, stay as they are.

    conv{algorithm=bf16x3}(x, w, b) -> conv{algorithm=bf16x3}(round_bf16(x), w, b)

In bf16, that is for the matrix tiles of CPUs: what they do not compute stays f32, and narrow_weights has rounded w.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cnnc.errors import UsageError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.rewrite import map_graph, rebuild
from cnnc.ir.types import DType
from cnnc.ops.conv import Conv, fills_tiles
from cnnc.ops.dense import Dense, MatMul
from cnnc.ops.fused import Fused
from cnnc.ops.round_bf16 import RoundBf16
from cnnc.ops.round_tf32 import RoundTf32
from cnnc.passes.registry import Pass
from cnnc.target import Target

_BLOCK = 4
"""The f32 numbers in 16 bytes, which tensor cores take at once."""


@dataclass(frozen=True)
class RoundProducts(Pass):
    """Round the operands of f32 products to `dtype`; comes after fusion, so that values lie in memory as they were."""

    dtype: str = "tf32"

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph with rounded operands; operators outside of kernels stay as they are.

        Raises `UsageError` for a type that is neither tf32 nor bf16.
        """
        if self.dtype not in _ROUNDING:
            raise UsageError(f"{self.name}: dtype={self.dtype} is none of {', '.join(_ROUNDING)}")
        round_operands = _ROUNDING[self.dtype]

        def kernel(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            if not isinstance(node.op, Fused):
                return rebuild(node, inputs)
            body = map_graph(node.op.body, round_operands)
            if body.outputs == node.op.body.outputs:
                return rebuild(node, inputs)
            return call(replace(node.op, body=body), *inputs, loc=node.loc).node.values

        return map_graph(graph, kernel)


def _round_to_bf16(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
    if not isinstance(node.op, Conv | Dense) or node.op.algorithm != "bf16x3" or isinstance(inputs[0].op, RoundBf16):
        return rebuild(node, inputs)
    return rebuild(node, (call(RoundBf16(), inputs[0], loc=node.loc), *inputs[1:]))


def _round_to_tf32(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
    if not _is_product(node) or any(v.dtype is not DType.F32 for v in inputs):
        return rebuild(node, inputs)
    rounded = tuple(v if isinstance(v.op, RoundTf32) else call(RoundTf32(), v, loc=node.loc) for v in inputs[:2])
    return rebuild(node, (*rounded, *inputs[2:]))


def _is_product(node: Node) -> bool:
    if isinstance(node.op, Conv):
        return fills_tiles(node.op, node.inputs[1].type, _BLOCK)
    return isinstance(node.op, Dense | MatMul)


_ROUNDING = {"tf32": _round_to_tf32, "bf16": _round_to_bf16}
"""How a node's operands are rounded, by the type it multiplies in."""
