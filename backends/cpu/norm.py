"""Layer norm over the last axis of plain tensors, or over the channels of blocked images (NCHWc).

    y = (x - mean) / sqrt(var + epsilon) * gamma + beta

A group is what one mean is of: a row, or the channels of a pixel.  A few groups are computed side by side, a vector of
each at a time, three times over what then lies in the nearest cache: for the sum, for the squares of the distances from
the mean, and for the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import anchor_of, body_after, machine_of
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.row_index import position
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.blocked import channel_layout
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.norm import ChannelNorm, LayerNorm
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["NormParams", "NormShape", "NormTemplate", "build", "cost"]


@dataclass(frozen=True)
class NormShape:
    """Groups of `length` numbers: `leading` are the axes of the groups.

    With `blocked` those are N, H, W of an image in NCHW{lanes}c, otherwise those before the last.
    """

    leading: tuple[int, ...]
    length: int
    epsilon: float
    lanes: int = 8
    blocked: bool = False

    @property
    def groups(self) -> int:
        """The number of groups."""
        return math.prod(self.leading)

    @property
    def vectors(self) -> int:
        """Whole vectors in a group."""
        return self.length // self.lanes

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The physical shape of input and output."""
        if not self.blocked:
            return (*self.leading, self.length)
        return (self.leading[0], -(-self.length // self.lanes), *self.leading[1:], self.lanes)

    def place(self, group: Any, index: Any) -> list[Any]:
        """Give where number `index` of a group lies."""
        at = position(self.leading, group)
        return [*at, index] if not self.blocked else [at[0], index // self.lanes, *at[1:], index % self.lanes]


@dataclass(frozen=True)
class NormParams:
    """`side` groups are computed side by side; a slice is `groups` groups, a multiple of that."""

    side: int
    groups: int


def cost(shape: NormShape, params: NormParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    cycles = shape.groups * (5.0 * shape.vectors + 25.0 + 4.0 * (shape.length % shape.lanes))
    far = 8.0 * math.prod(shape.output_shape) / machine.memory_bytes
    slices = -(-shape.groups // params.groups)
    waves = machine.turns(slices) / slices
    total = max(cycles, far) * waves + 60.0 * slices / machine.threads
    return total * machine.sharing(slices) / machine.hertz


def build(shape: NormShape, params: NormParams, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands are x, gamma, perhaps beta."""
    from cnnc.backends.cpu.norm_loops import NormLoops
    from cnnc.backends.lower import loops

    bound = body.bind(shape.output_shape)
    writer = NormLoops(shape, bound)
    slices = -(-shape.groups // params.groups)

    def one_slice(index: Any) -> Any:
        return writer.groups(index * params.groups, params.groups, params.side)

    return loops.function([*bound.inputs, writer.y], loops.parallel(slices, one_slice))


@dataclass(frozen=True)
class NormTemplate:
    """The template: layer norms over the last axis, and channel norms of blocked images."""

    name: str = "norm"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a `layer_norm` over the last axis, or a `channel_norm` in blocks."""
        return _find(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give slices of several sizes."""
        shape = _known(kernel, target)[1]
        side = min(SIDE, shape.groups)
        for parts in (1, 4, 16, 64):
            tiles = -(-shape.groups // side // parts) or 1
            yield schedule_of(self.name, NormParams(side, side * tiles))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        return cost(_known(kernel, target)[1], params_of(NormParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        anchor, shape = _known(kernel, target)
        return build(shape, params_of(NormParams, schedule), body_after(kernel, anchor))


SIDE = 4
"""Groups side by side: enough to hide the latency of an addition."""


def _known(kernel: Fused, target: Target) -> tuple[Node, NormShape]:
    found = _find(kernel, target)
    if found is None:
        raise VerifyError(f"norm cannot compute kernel {kernel.anchor}")
    return found


@lru_cache(64)
def _find(kernel: Fused, target: Target) -> tuple[Node, NormShape] | None:
    """Give the norm and its sizes, if the kernel is one that this template can compute."""
    anchor = anchor_of(kernel, target, "layer_norm", "channel_norm")
    if anchor is None or any(value.type.layout is not None for value in anchor.inputs[1:]):
        return None
    x, lanes = anchor.inputs[0].type, target.vector_lanes
    shape = x.static_shape
    match anchor.op:
        case LayerNorm(axis, epsilon) if axis % x.rank == x.rank - 1 and x.layout is None and x.rank > 1:
            return anchor, NormShape(shape[:-1], shape[-1], epsilon, lanes)
        case ChannelNorm(epsilon) if 3 <= x.rank <= 5 and x.layout == channel_layout(x.rank, lanes):
            return anchor, NormShape((shape[0], *shape[2:]), shape[1], epsilon, lanes, blocked=True)
    return None
