"""Dealing channels out: the shuffle between grouped convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import infer_types
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, Kind, Op
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.blocked import channel_block, fixed, tensor
from cnnc.ops.concat import read_joined


@dataclass(frozen=True)
class ShuffleChannels(Op):
    """y[n, c, ...] = x[n, s(start + c), ...] for `size` channels c,  s(i) = (i % groups) * (C / groups) + i // groups.

    x, of C channels, is the inputs one after the other along the channels.  All of them, from 0 on, are the channel
    shuffle of ShuffleNet (Zhang et al., CVPR 2018, section 3.1): those of all groups in turn.
    """

    groups: int
    start: int
    size: int
    kind = Kind.INJECTIVE

    def infer(self, *parts: TensorType) -> TensorType:
        """Give [N, size, ...]; raises `ShapeError` where the groups do not divide C or the channels are not there."""
        if not parts or any(part.rank < 2 for part in parts):
            raise ShapeError(f"{self.name}: needs axes N, C, ..., not ({', '.join(map(str, parts))})")
        x = parts[0]
        for part in parts:
            if (part.dtype, part.shape[0], part.shape[2:]) != (x.dtype, x.shape[0], x.shape[2:]):
                raise ShapeError(f"{self.name}: {part} does not join {x} along the channels")
        channels = sum(fixed(self.name, [part.shape[1] for part in parts]))
        if self.groups < 1 or channels % self.groups:
            raise ShapeError(f"{self.name}: groups={self.groups} must divide the {channels} channels")
        if self.start < 0 or self.size < 0 or self.start + self.size > channels:
            end = self.start + self.size
            raise ShapeError(f"{self.name}: channels {self.start} to {end} are not among {channels}")
        return x.with_shape((x.shape[0], self.size, *x.shape[2:]))

    def infer_layout(self, *parts: TensorType) -> tuple[Layout | None, ...]:
        """Keep channel blocks, whole ones or not."""
        if len({part.layout for part in parts}) > 1:
            raise ShapeError(f"{self.name}: inputs ({', '.join(map(str, parts))}) do not share one layout")
        channel_block(self.name, "x", parts[0])
        return (parts[0].layout,)

    def source(self, channel: Any, channels: int) -> Any:
        """Give the channel of x, of so many, that a channel of y is."""
        return (self.start + channel) % self.groups * (channels // self.groups) + (self.start + channel) // self.groups

    def reference(self, *parts: np.ndarray) -> np.ndarray:
        """Take in numpy."""
        x = np.concatenate(parts, 1)
        return x[:, self.source(np.arange(self.size), x.shape[1])]

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read each element from its channel."""
        out = infer_types(self, tuple(types))[0]
        channels = sum(fixed(self.name, [t.shape[1] for t in types]))

        def element(n: Any, c: Any, *rest: Any) -> Any:
            return read_joined(te, xs, types, 1, (n, self.source(c, channels), *rest))

        return [tensor(te, out, element, self.name)]

    def flops(self, *parts: TensorType) -> int:
        """No arithmetic."""
        return 0

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show all channels and some, one input and several, a run-time batch, channel blocks, another dtype."""
        blocked = Layout("NCHW4c")
        yield Example(cls(2, 0, 8), (TensorType((2, 8, 3, 5)),))
        yield Example(cls(3, 2, 5), (TensorType((2, 4, 3)), TensorType((2, 5, 3))))
        yield Example(cls(2, 5, 5), (TensorType((2, 5, 3, 3), DType.F32, blocked),) * 2)
        yield Example(cls(2, 0, 5), (TensorType((2, 5, 3, 3), DType.F32, blocked),) * 2)
        yield Example(cls(4, 0, 16), (TensorType((1, 16, 2, 2), DType.F32, blocked),))
        yield Example(cls(1, 1, 2), (TensorType((Dim.symbol("n", 3), 4, 2)),))
        yield Example(cls(2, 1, 3), (TensorType((2, 4), DType.I64),))
        yield Example(cls(2, 4, 0), (TensorType((2, 4, 2, 2)),))
