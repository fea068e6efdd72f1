"""Fold zero padding into the convolution or average pool that reads it.

    conv(pad(x, p), pad=q)                            -> conv(x, pad=p+q)
    average_pool(pad(x, p), pad=q, count_include_pad) -> average_pool(x, pad=p+q, count_include_pad)
    average_pool(pad(x, p), pad=0)                    -> average_pool(x, pad=p, count_include_pad)

Only where zeros are added, along spatial axes.  Never into a max pool: it ignores its padding, which is not the same
as seeing a zero there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.rewrite import miss, rewrite
from cnnc.ops.conv import Conv
from cnnc.ops.pad import Pad
from cnnc.ops.pool import AveragePool
from cnnc.passes.registry import Pass
from cnnc.target import Target


@dataclass(frozen=True)
class FoldPad(Pass):
    """Fold pads forward."""

    def run(self, graph: Graph, target: Target) -> Graph:
        """Apply the rules until none fires."""
        return rewrite(graph, (fold_pad_into_conv, fold_pad_into_average_pool))


def fold_pad_into_conv(v: Value) -> Value | None:
    """conv(pad(x, p), pad=q) -> conv(x, pad=p+q)."""
    match v.node:
        case Node(Conv() as conv, (Value(Node(Pad() as pad, (x,))), *weights)):
            extra = _spatial_zeros(pad)
            return None if extra is None else call(replace(conv, pad=_sum(conv.pad, extra)), x, *weights)
    return None


def fold_pad_into_average_pool(v: Value) -> Value | None:
    """average_pool(pad(x, p), pad=q) -> average_pool(x, pad=p+q, count_include_pad)."""
    match v.node:
        case Node(AveragePool() as pool, (Value(Node(Pad() as pad, (x,))),)):
            extra = _spatial_zeros(pad)
            if extra is None:
                return None
            if pool.ceil_mode or (any(pool.pad) and not pool.count_include_pad):
                miss("the pool counts its own padding otherwise than the zeros")
                return None
            folded = replace(pool, pad=_sum(pool.pad, extra), count_include_pad=True)
            try:
                return call(folded, x)
            except ShapeError:
                miss("a window would see nothing but padding")
                return None
    return None


def _spatial_zeros(pad: Pad) -> tuple[int, ...] | None:
    """Give the spatial pads as convolutions have them, where they add zeros and nothing else does."""
    rank = len(pad.pads) // 2
    if pad.mode != "constant" or pad.value != 0 or min(pad.pads, default=0) < 0:
        miss("the pad does not add zeros")
        return None
    if any(pad.pads[axis] for axis in (0, 1, rank, rank + 1)):
        miss("the pad adds images or channels")
        return None
    return (*pad.pads[2:rank], *pad.pads[rank + 2 :])


def _sum(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))
