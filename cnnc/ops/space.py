"""Moving elements between channels and space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.blocked import channel_block, channel_layout, fixed, tensor

MODES = ("DCR", "CRD")
"""How block row, block column and depth follow each other in the channels: depth last, or depth first."""


@dataclass(frozen=True)
class _Space(Op):
    """The fields and checks of both directions."""

    block: int
    mode: str = "DCR"

    kind: ClassVar[Kind] = Kind.INJECTIVE

    def _check(self, x: TensorType) -> None:
        if x.rank != 4:
            raise ShapeError(f"{self.name}: needs axes N, C, H, W, not x : {x}")
        if self.mode not in MODES:
            raise ShapeError(f"{self.name}: mode {self.mode!r} is neither DCR nor CRD")
        if self.block < 1:
            raise ShapeError(f"{self.name}: block={self.block} must be at least 1")

    def flops(self, x: TensorType) -> int:
        """No arithmetic."""
        return 0


@dataclass(frozen=True)
class DepthToSpace(_Space):
    """Spread channels over squares of block x block pixels; in mode CRD also called pixel shuffle.

    y[n, c, h*block + i, w*block + j] = x[n, (i*block + j)*C' + c, h, w]  (DCR)
                                      = x[n, c*block^2 + i*block + j, h, w]  (CRD),  C' = C / block^2
    """

    def infer(self, x: TensorType) -> TensorType:
        """Give [N, C/block^2, H*block, W*block]; raises `ShapeError` where block^2 does not divide C."""
        self._check(x)
        channels = fixed(self.name, x.shape[1:2])[0]
        if channels % self.block**2:
            raise ShapeError(f"{self.name}: block^2 = {self.block**2} must divide the {channels} channels of x : {x}")
        return x.with_shape((x.shape[0], channels // self.block**2, x.shape[2] * self.block, x.shape[3] * self.block))

    def infer_layout(self, x: TensorType) -> tuple[Layout | None, ...]:
        """Keep channel blocks where whole ones move to a pixel: depth last, in a multiple of the block."""
        lanes = channel_block(self.name, "x", x)
        depth = fixed(self.name, x.shape[1:2])[0] // self.block**2
        if lanes > 1 and (self.mode != "DCR" or depth % lanes):
            raise ShapeError(f"{self.name}: channels of one pixel do not fill blocks of x : {x}")
        return (channel_layout(x.rank, lanes),)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Reshape, transpose, reshape."""
        n, c, h, w = x.shape
        b, depth = self.block, c // self.block**2
        if self.mode == "DCR":
            y = x.reshape(n, b, b, depth, h, w).transpose(0, 3, 4, 1, 5, 2)
        else:
            y = x.reshape(n, depth, b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
        return np.ascontiguousarray(y).reshape(n, depth, h * b, w * b)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read each element from its channel."""
        out = self.infer(types[0]).with_layout(types[0].layout)
        b, depth = self.block, out.static_shape[1]

        def element(n: Any, c: Any, h: Any, w: Any) -> Any:
            part = h % b * b + w % b
            channel = part * depth + c if self.mode == "DCR" else c * b**2 + part
            return te.at(xs[0], types[0], n, channel, h // b, w // b)

        return [tensor(te, out, element, "depth_to_space")]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give both modes, several blocks, a run-time batch, integers."""
        for mode in MODES:
            yield Example(cls(2, mode), (TensorType((2, 12, 3, 2)),))
            yield Example(cls(3, mode), (TensorType((1, 18, 2, 3), DType.I32),))
            yield Example(cls(1, mode), (TensorType((1, 3, 2, 2), DType.F16),))
            yield Example(cls(2, mode), (TensorType((Dim.symbol("n", 2), 4, 2, 2)),))
            yield Example(cls(2, mode), (TensorType((0, 4, 2, 2)),))
        yield Example(cls(2), (TensorType((2, 32, 3, 2), DType.F32, Layout("NCHW4c")),))
        yield Example(cls(3), (TensorType((1, 36, 2, 3), DType.F32, Layout("NCHW4c")),))


@dataclass(frozen=True)
class SpaceToDepth(_Space):
    """Gather squares of block x block pixels into channels, the inverse of `DepthToSpace`.

    y[n, (i*block + j)*C + c, h, w] = x[n, c, h*block + i, w*block + j]  (DCR)
    y[n, c*block^2 + i*block + j, h, w] = the same  (CRD, also called pixel unshuffle)
    """

    def infer(self, x: TensorType) -> TensorType:
        """Give [N, C*block^2, H/block, W/block]; raises `ShapeError` where block does not divide H and W."""
        self._check(x)
        h, w = fixed(self.name, x.shape[2:])
        if h % self.block or w % self.block:
            raise ShapeError(f"{self.name}: block={self.block} must divide height and width of x : {x}")
        return x.with_shape((x.shape[0], x.shape[1] * self.block**2, h // self.block, w // self.block))

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Reshape, transpose, reshape."""
        n, c, h, w = x.shape
        b = self.block
        order = (0, 3, 5, 1, 2, 4) if self.mode == "DCR" else (0, 1, 3, 5, 2, 4)
        y = x.reshape(n, c, h // b, b, w // b, b).transpose(order)
        return np.ascontiguousarray(y).reshape(n, c * b**2, h // b, w // b)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read each element from its pixel."""
        out = self.infer(types[0])
        b, channels = self.block, fixed(self.name, types[0].shape[1:2])[0]

        def element(n: Any, c: Any, h: Any, w: Any) -> Any:
            part, channel = (c // channels, c % channels) if self.mode == "DCR" else (c % b**2, c // b**2)
            return te.at(xs[0], types[0], n, channel, h * b + part // b, w * b + part % b)

        return [tensor(te, out, element, "space_to_depth")]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give both modes, several blocks, a run-time batch, integers."""
        for mode in MODES:
            yield Example(cls(2, mode), (TensorType((2, 3, 6, 4)),))
            yield Example(cls(3, mode), (TensorType((1, 2, 6, 9), DType.I32),))
            yield Example(cls(1, mode), (TensorType((1, 3, 2, 2), DType.F16),))
            yield Example(cls(2, mode), (TensorType((Dim.symbol("n", 2), 1, 4, 2)),))
            yield Example(cls(2, mode), (TensorType((0, 3, 2, 2)),))


@onnx("DepthToSpace", "SpaceToDepth")
def _space(node: ForeignNode, x: Value) -> Value:
    make = DepthToSpace if node.op_type == "DepthToSpace" else SpaceToDepth
    block = node.attr("blocksize")
    if block is None:
        raise node.invalid("blocksize is missing")
    return call(make(block, node.attr("mode", "DCR")), x)
