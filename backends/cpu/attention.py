"""Attention in one kernel: the scores of a block of queries live in a near cache, and nowhere else.

    scores[n, m] = sum over d of k[n, d] * (scale * q[m, d]) + mask[m, n]
    shares[n, m] = exp(scores[n, m] - max over n) / sum over n
    y[m, e]      = sum over n of shares[n, m] * v[n, e]

A slice is a block of queries of one head.  The queries are the lanes of the vectors, so the queries are transposed once
and nothing else is: maximum and sum run over whole vectors, and keys, shares and values are read in the order they lie
in memory.  Attention without the matrix of scores is that of Dao et al., "FlashAttention", NeurIPS 2022; a block of
queries is small enough here to hold the scores of all keys, so softmax is computed as it is defined.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import anchor_of, body_after, machine_of
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.register_tile import best_tile, covering_cycles, step_cycles, vector_width
from cnnc.backends.cpu.segments import even_split
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.attention import Attention
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["AttentionParams", "AttentionShape", "AttentionTemplate", "build", "cost", "space"]


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention: `queries` and `keys` of each of `batch` x `op.heads`; `mask` is the mask's shape."""

    op: Attention
    batch: int
    queries: int
    keys: int
    mask: tuple[int, ...] | None = None
    lanes: int = 8


@dataclass(frozen=True)
class AttentionParams:
    """A slice is `vectors` vectors of queries; scores are computed for `keys` keys at once."""

    vectors: int
    keys: int


def space(shape: AttentionShape, machine: Machine) -> Iterator[AttentionParams]:
    """Give the block sizes worth considering."""
    for vectors in range(1, min(-(-shape.queries // shape.lanes), 4) + 1):
        fitting = [keys for keys in range(1, MOST_KEYS + 1) if machine.fits(keys, vectors)]
        for keys in fitting[-2:]:
            yield AttentionParams(vectors, min(keys, shape.keys))


MOST_KEYS = 8
"""Keys read side by side: more lines than a cache has ways, a power of two apart, would drive each other out."""


def cost(shape: AttentionShape, params: AttentionParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    op, width = shape.op, params.vectors * shape.lanes
    slices = shape.batch * op.heads * -(-shape.queries // width)
    dots = 0.0
    for keys, count in even_split(shape.keys, params.keys):
        dots += count * (step_cycles(machine, keys, params.vectors) * op.size + 20.0)
    value_vectors = -(-op.value_size // vector_width(op.value_size, shape.lanes))
    means = covering_cycles(machine, width, value_vectors, *best_tile(machine, width, value_vectors)) * shape.keys
    cycles = dots + SHARE_CYCLES * shape.keys * params.vectors + means + params.vectors * op.size * shape.lanes
    cycles += HIDDEN * 4.0 * shape.keys * (op.size + op.value_size) / machine.l2_bytes
    if 4.0 * width * shape.keys > 0.8 * machine.l1:
        cycles += 4.0 * 4.0 * width * shape.keys / machine.l2_bytes
    return cycles * machine.turns(slices) * machine.sharing(slices) / machine.hertz


HIDDEN = 0.3
"""The share of reading keys and values from L2 that arithmetic does not hide."""

SHARE_CYCLES = 10.0
"""What a vector of scores costs on its way to shares: compare, subtract, exponential, add, multiply."""


def build(shape: AttentionShape, params: AttentionParams, machine: Machine, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands are q, k, v and perhaps a mask."""
    from cnnc.backends.cpu.attention_loops import AttentionLoops

    return AttentionLoops(shape, params, machine, body).function()


@dataclass(frozen=True)
class AttentionTemplate:
    """The template: attention on plain tensors."""

    name: str = "attention"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take an `attention`."""
        return _find(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the block sizes worth considering."""
        return (schedule_of(self.name, params) for params in space(_known(kernel, target)[1], machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        return cost(_known(kernel, target)[1], params_of(AttentionParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        anchor, shape = _known(kernel, target)
        return build(shape, params_of(AttentionParams, schedule), machine_of(target), body_after(kernel, anchor))


def _known(kernel: Fused, target: Target) -> tuple[Node, AttentionShape]:
    found = _find(kernel, target)
    if found is None:
        raise VerifyError(f"attention cannot compute kernel {kernel.anchor}")
    return found


@lru_cache(64)
def _find(kernel: Fused, target: Target) -> tuple[Node, AttentionShape] | None:
    """Give the attention and its sizes, if the kernel is one."""
    anchor = anchor_of(kernel, target, "attention")
    if anchor is None or not isinstance(anchor.op, Attention):
        return None
    (batch, queries, _), (_, keys, _), _, *mask = (value.type.static_shape for value in anchor.inputs)
    return anchor, AttentionShape(anchor.op, batch, queries, keys, mask[0] if mask else None, target.vector_lanes)
