"""Store the weights of convolutions, fully connected layers and products of matrices in 16 bits.

    conv(x, w : f32) -> conv(x, cast{f32}(round(w) : bf16))

The conversion back moves into the kernel (see fuse), which widens each number as it loads it; arithmetic and all other
values stay f32.  A weight that `dtype` cannot hold, because a number in it would become infinite, stays what it is,
and so does a transformed one that no Winograd kernel reads: `--why narrow_weights` and the compile report name them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cnnc.errors import UsageError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.literal import Literal
from cnnc.ir.op import Op
from cnnc.ir.rewrite import map_graph, rebuild, record, record_miss
from cnnc.ir.types import DType
from cnnc.ops.cast import Cast
from cnnc.ops.conv import Conv
from cnnc.ops.conv_transpose import ConvTranspose
from cnnc.ops.dense import Dense, MatMul
from cnnc.ops.source import Constant
from cnnc.passes.registry import Pass
from cnnc.target import Target

NARROW = (DType.BF16, DType.F16)
"""The types weights may be stored in."""

RULE = "narrow_weights"
"""The name under which the log has what was narrowed, and what was not."""


@dataclass(frozen=True)
class NarrowWeights(Pass):
    """Narrow all weights that are constants of type f32 to `dtype`, bf16 or f16."""

    dtype: DType = DType.BF16

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph with narrow weights; raises `UsageError` for a type that is not narrow."""
        if self.dtype not in NARROW:
            raise UsageError(f"{self.name}: dtype={self.dtype} is none of {', '.join(NARROW)}")
        stored: dict[Value, Value | None] = {}

        def narrow(value: Value) -> Value:
            if value not in stored:
                stored[value] = self._stored(value)
            found = stored[value]
            # Each layer widens for itself, inside its kernel.
            return value if found is None else call(Cast(DType.F32), found, loc=value.node.loc)

        def visit(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            if _is_recovered(node, inputs):
                record_miss(RULE, f"{_name(inputs[1])} is transformed, but read by no Winograd kernel", node.loc)
                return rebuild(node, inputs)
            weights = set(weight_positions(node.op))
            return rebuild(node, tuple(narrow(v) if i in weights else v for i, v in enumerate(inputs)))

        return map_graph(graph, visit)

    def _stored(self, weight: Value) -> Value | None:
        """Round a weight; None where it is no f32 constant, or would not survive."""
        if not isinstance(weight.op, Constant) or weight.dtype is not DType.F32:
            return None
        wide = weight.op.value.array
        with np.errstate(over="ignore"):
            rounded = wide.astype(self.dtype.numpy)
        lost = np.isfinite(wide) & ~np.isfinite(rounded.astype(np.float32))
        if lost.any():
            reason = f"{_name(weight)} holds {wide[lost][0]:.6g}, too large for {self.dtype}"
            record_miss(RULE, reason, weight.node.loc)
            return None
        op = Constant(Literal(rounded), weight.op.label, weight.op.layout)
        narrowed = call(op, loc=weight.node.loc)
        record(RULE, weight, narrowed)
        return narrowed


def _is_recovered(node: Node, inputs: tuple[Value, ...]) -> bool:
    """Whether a convolution recovers its weight from a transformed one, which would add to the error of rounding."""
    if not isinstance(node.op, Conv) or node.op.tile is None:
        return False
    return isinstance(inputs[1].op, Constant) and inputs[1].type.layout is None


def _name(weight: Value) -> str:
    label = weight.op.label if isinstance(weight.op, Constant) else ""
    return f"{label or 'a weight'} : {weight.type}"


def weight_positions(op: Op) -> tuple[int, ...]:
    """Say which inputs of an operator are its weights, if they are constants."""
    if isinstance(op, MatMul):
        return (0, 1)
    return (1,) if isinstance(op, Conv | ConvTranspose | Dense) else ()
