"""Convolution in one, two or three dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx, random_array
from cnnc.ir.types import DType, TensorType
from cnnc.ops.blocked import channel_block, channel_layout, every, fixed, plain_only, tensor, tile_layout, weight_layout
from cnnc.ops.broadcast import widen, working_dtype
from cnnc.ops.numeric import cast_to, check_floats, check_vector, narrow
from cnnc.ops.window import Window, read_window
from cnnc.ops.winograd import (
    WinogradWeight,
    spatial_kernel,
    spatial_weight_tensor,
    winograd_conv,
    winograd_layout,
    winograd_rows_layout,
    winograd_tile,
)


@dataclass(frozen=True)
class Conv(Op):
    """Slide weights over the input (cross-correlation, as in PyTorch and ONNX).

    y[n,o,p] = b[o] + sum over i, k of x[n, g*I/groups + i, p*stride - pad + k*dilation] * w[o,i,k],  g the group of o

    Inputs x[N,I,...], w[O,I/groups,...], optionally b[O]; pad is (begin..., end...).  `algorithm` names how it is
    computed ("direct", "bf16x3", "winograd2", "winograd4", "winograd6").  With Winograd's, w is handed in transformed,
    as winograd_weight{tile,stride}(w); what the convolution means stays the same.
    """

    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    algorithm: str = "direct"

    kind: ClassVar[Kind] = Kind.REDUCTION

    def window(self, w: TensorType | np.ndarray) -> Window:
        """Give the windows for these weights."""
        kernel: tuple[int, ...] | None = w.static_shape[2:] if isinstance(w, TensorType) else w.shape[2:]
        if self.tile is not None and kernel is not None:
            kernel = spatial_kernel(self.tile, kernel, self.stride)
        if kernel is None:
            raise ShapeError(
                f"{self.name}: {self.algorithm} takes weights transformed by"
                f" winograd_weight{{tile={self.tile},stride={self.stride}}}, not {w}"
            )
        return Window(kernel, self.stride, self.pad, self.dilation)

    @property
    def tile(self) -> int | None:
        """The output tile of Winograd's algorithm, None for any other."""
        return winograd_tile(self.algorithm)

    def infer(self, x: TensorType, w: TensorType, b: TensorType | None = None) -> TensorType:
        """Give [N,O,...]; raises `ShapeError` where channels, groups, windows or dtypes do not fit."""
        check_floats(self.name, x=x, weight=w, bias=b)
        if w.rank != x.rank or not w.is_static:
            raise ShapeError(f"{self.name}: weight {w} must be of fixed shape and of the rank of x : {x}")
        self._check_winograd(w)
        window = self.window(w)
        window.check(self.name, x)
        if self.groups < 1 or w.static_shape[0] % self.groups:
            raise ShapeError(f"{self.name}: groups={self.groups} must divide the {w.shape[0]} output channels of {w}")
        if x.shape[1] != w.static_shape[1] * self.groups:
            raise ShapeError(
                f"{self.name}: weight takes {w.static_shape[1] * self.groups} channels"
                f" but x : {x} has {x.shape[1]} (groups={self.groups})"
            )
        check_vector(self.name, "bias", b, w.shape[0], "output channel")
        return x.with_shape((x.shape[0], w.shape[0], *window.output(self.name, x.shape[2:])))

    def _check_winograd(self, w: TensorType) -> None:
        """Raise `ShapeError` for what Winograd's algorithm does not take."""
        if self.tile is None:
            return
        if w.rank != 4 or any(s != 1 for s in (*self.dilation, self.groups)):
            raise ShapeError(
                f"{self.name}: {self.algorithm} takes two axes, dilation and groups of 1,"
                f" not {w}, dilation={self.dilation}, groups={self.groups}"
            )

    def infer_layout(self, x: TensorType, w: TensorType, b: TensorType | None = None) -> tuple[Layout | None, ...]:
        """Take NCHW{b}c with OIHW{b}i{o}o and give NCHW{o}c; a plain x goes with OIHW{o}o or a plain weight.

        With groups the blocks must divide the groups' channels.  Or, as in a depthwise convolution, whole groups fit
        into a block, which stays the same: then the weight is OIHW{b}o.  The bias is plain.  Transformed weights for
        NCHW{b}c are HWOI{b}i{o}o; those in HWIO4o go with a plain x and give a plain tensor.  Weights in HWIO{b}i keep
        the block of x, too: untransformed, with whole blocks in each group if there are several.
        """
        block = channel_block(self.name, "x", x)
        plain_only(self.name, bias=b)
        if w.layout is None:
            if block > 1:
                raise ShapeError(f"{self.name}: x is in layout {x.layout} but the weight is plain")
            return (None,)
        if block == 1 and self.tile is not None and w.layout == winograd_rows_layout():
            return (None,)
        if block > 1 and w.layout == tile_layout(w.rank, block) and fills_tiles(self, w, block):
            return (x.layout,)
        out_block = w.layout.block("O")
        if block > 1 and self.groups > 1 and w.layout == weight_layout(w.rank, 1, out_block):
            if block != out_block or x.shape[1] != w.shape[0] or block % w.static_shape[1]:
                raise ShapeError(f"{self.name}: whole groups must fit into the blocks of x : {x} and weight {w}")
            return (x.layout,)
        wanted = weight_layout(w.rank, block, out_block) if self.tile is None else winograd_layout(block, out_block)
        if w.layout != wanted and not (
            self.tile is None and block == 1 and w.layout == weight_layout(w.rank, w.layout.block("I"), out_block)
        ):
            raise ShapeError(f"{self.name}: for x : {x} the weight must be in layout {wanted}, not {w.layout}")
        if self.groups > 1 and (w.static_shape[1] % block or w.static_shape[0] // self.groups % out_block):
            raise ShapeError(f"{self.name}: blocks of x : {x} and weight {w} must divide the {self.groups} groups")
        return (channel_layout(x.rank, out_block),)

    def reference(self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
        """Add up, tap by tap, the products of the weights and the shifted input; with Winograd's weights as it does."""
        window = self.window(w)
        sizes = tuple(int(s) for s in window.output(self.name, x.shape[2:]) if isinstance(s, int))
        if self.tile is None:
            y = self._products(x, w, window, sizes)
        else:
            y = winograd_conv(x, w, self.tile, window, sizes)
        if b is not None:
            y = y + widen(b).reshape(-1, *(1,) * window.rank)
        return narrow(y, x)

    def _products(self, x: np.ndarray, w: np.ndarray, window: Window, sizes: tuple[int, ...]) -> np.ndarray:
        padded = window.padded(widen(x), sizes, 0)
        g = self.groups
        batch, positions = x.shape[0], math.prod(sizes)
        weights = widen(w).reshape(g, w.shape[0] // g, w.shape[1], math.prod(window.kernel))
        total = np.zeros((batch, g, w.shape[0] // g, positions), padded.dtype)
        for number, tap in enumerate(window.taps()):
            seen = window.tap_view(padded, tap, sizes).reshape(batch, g, w.shape[1], positions)
            total += np.ascontiguousarray(weights[..., number]) @ seen
        return total.reshape(batch, w.shape[0], *sizes)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce over channels of the group and taps, then add the bias."""
        x_type, w_type = types[0], types[1]
        out = self.infer(*types).with_layout(self.infer_layout(*types)[0])
        window = self.window(w_type)
        spatial, sizes = fixed(self.name, x_type.shape[2:]), fixed(self.name, out.shape[2:])
        wide = working_dtype(out.dtype)
        per_group = w_type.static_shape[0] // self.groups
        weights = xs[1]
        if self.tile is not None:
            weights = spatial_weight_tensor(te, weights, w_type, self.tile, self.stride)
            w_type = TensorType((*w_type.shape[:2], *window.kernel), w_type.dtype)
        ic = te.reduce_axis(w_type.static_shape[1], "ic")
        taps = [te.reduce_axis(k, f"k{i}") for i, k in enumerate(window.kernel)]

        def products(n: Any, o: Any, *p: Any) -> Any:
            where = window.position(p, taps)
            channel = ic if self.groups == 1 else o // per_group * w_type.static_shape[1] + ic
            value = te.at(xs[0], x_type, n, channel, *where)
            conditions = window.in_bounds(where, spatial, sizes)
            if conditions:
                value = te.where(every(te, conditions), value, te.const(0, x_type.dtype))
            weight = te.at(weights, w_type, o, ic, *taps)
            if out.layout and w_type.layout and w_type.layout.block("O") == 1:
                # Output channels that the weight has no pad lanes for.
                weight = te.where(o < w_type.static_shape[0], weight, te.const(0, w_type.dtype))
            return te.sum(cast_to(te, value, out.dtype, wide) * cast_to(te, weight, out.dtype, wide), [ic, *taps])

        # Weights are 0 in the pad lanes, but an infinite input makes NaN of it: `finish` puts the 0 back.
        sums = tensor(te, out.with_dtype(wide), products, "conv", guard=False)
        if len(xs) == 2 and wide is out.dtype and not (out.layout and out.layout.pads(out.static_shape)):
            return [sums]

        def finish(n: Any, o: Any, *p: Any) -> Any:
            value = te.at(sums, out.with_dtype(wide), n, o, *p)
            if len(xs) == 3:
                value = value + cast_to(te, xs[2][o], out.dtype, wide)
            return cast_to(te, value, wide, out.dtype)

        return [tensor(te, out, finish, "conv_bias")]

    def flops(self, x: TensorType, w: TensorType, b: TensorType | None = None) -> int:
        """Count two for each multiply-add, one for each bias."""
        elements = self.infer(x, w, b).elements
        return elements * (2 * w.static_shape[1] * math.prod(self.window(w).kernel) + (b is not None))

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give ordinary, odd, grouped, dilated, empty and blocked convolutions in 1, 2 and 3 dimensions."""
        yield _example((1, 3, 9, 7), (5, 3, 3, 3), (1, 1), (1, 1, 1, 1), bias=True)
        yield _example((2, 4, 10, 9), (6, 4, 3, 2), (2, 3), (0, 1, 2, 0))
        yield _example((2, 6, 9, 8), (4, 3, 3, 3), (1, 2), (2, 1, 0, 3), (2, 1), groups=2, bias=True)
        yield _example((1, 5, 6, 6), (5, 1, 3, 3), (1, 1), (1, 1, 1, 1), groups=5, bias=True)
        yield _example((1, 3, 6, 6), (6, 1, 5, 5), (2, 2), (2, 2, 2, 2), groups=3)
        yield _example((2, 7, 5, 5), (3, 7, 1, 1), (1, 1), (0, 0, 0, 0), bias=True)
        yield _example((1, 2, 4, 4), (3, 2, 2, 2), (1, 1), (3, 0, 4, 5))
        yield _example((2, 3, 17), (4, 3, 5), (2,), (1, 3), (2,), bias=True)
        yield _example((1, 2, 5, 6, 4), (3, 2, 2, 3, 3), (1, 2, 1), (0, 1, 1, 1, 0, 1), bias=True)
        yield _example((0, 3, 5, 5), (2, 3, 3, 3), (1, 1), (0, 0, 0, 0), bias=True)
        yield _example((1, 0, 5, 5), (2, 0, 3, 3), (1, 1), (0, 0, 0, 0), bias=True)
        for dtype in (DType.F64, DType.F16):
            yield _example((1, 4, 6, 5), (3, 4, 3, 3), (1, 1), (1, 0, 1, 0), bias=True, dtype=dtype)
        yield _example((2, 6, 7, 6), (10, 6, 3, 3), (2, 1), (1, 1, 1, 1), bias=True, blocks=(4, 8))
        yield _example((1, 3, 8, 8), (9, 3, 3, 3), (2, 2), (1, 1, 1, 1), bias=True, blocks=(1, 8))
        yield _example((1, 6, 6, 6), (6, 1, 3, 3), (1, 1), (1, 1, 1, 1), groups=6, bias=True, blocks=(4, 4))
        yield _example((1, 8, 6, 6), (16, 4, 3, 3), (1, 1), (1, 0, 0, 1), groups=2, blocks=(4, 8))
        yield _example(
            (1, 12, 6, 6), (12, 2, 3, 3), (2, 1), (1, 1, 1, 1), groups=6, bias=True, blocks=(8, 8), inside=True
        )
        yield _example((2, 5, 11), (7, 5, 3), (1,), (1, 1), blocks=(4, 4))
        yield _example((2, 5, 6, 7), (11, 5, 3, 2), (2, 1), (1, 0, 1, 1), bias=True, blocks=(8, 1))
        yield _example((1, 8, 5, 5), (8, 8, 1, 1), (1, 1), (0, 0, 0, 0), blocks=(4, 1))
        yield _example((1, 16, 5, 4), (32, 8, 3, 1), (1, 1), (1, 0, 1, 0), groups=2, bias=True, blocks=(8, 1))
        yield _winograd_example(4, (1, 3, 9, 7), 5, (1, 1, 1, 1), bias=True)
        yield _winograd_example(2, (2, 4, 5, 6), 3, (0, 2, 1, 0))
        yield _winograd_example(6, (1, 9, 13, 7), 8, (1, 1, 1, 1), blocks=(8, 8))
        yield _winograd_example(4, (1, 6, 9, 8), 10, (1, 1, 1, 1), bias=True, blocks=(8, 8))
        yield _winograd_example(2, (2, 9, 4, 5), 8, (1, 0, 2, 1), blocks=(8, 8))
        yield _winograd_example(4, (1, 3, 11, 12), 5, (1, 1, 1, 1), stride=(2, 2), bias=True)
        yield _winograd_example(4, (1, 9, 7, 8), 8, (2, 2, 2, 2), kernel=(5, 5), blocks=(8, 8))
        yield _winograd_example(2, (1, 4, 6, 9), 6, (0, 3, 0, 3), kernel=(1, 7))
        yield _winograd_example(4, (2, 3, 9, 7), 6, (1, 0, 1, 1), bias=True, rows=True)


def fills_tiles(conv: Conv, w: TensorType, block: int) -> bool:
    """Whether a convolution is one product of matrices, or one a group, each of whole blocks of channels."""
    outputs, inputs = w.static_shape[0] // conv.groups, w.static_shape[1]
    return conv.tile is None and (conv.groups == 1 or (inputs % block == 0 and outputs % block == 0))


def _example(
    x: tuple[int, ...],
    w: tuple[int, ...],
    stride: tuple[int, ...],
    pad: tuple[int, ...],
    dilation: tuple[int, ...] = (),
    groups: int = 1,
    bias: bool = False,
    dtype: DType = DType.F32,
    blocks: tuple[int, int] = (1, 1),
    inside: bool = False,
) -> Example:
    """Make an example; `blocks` are those of the input's and the weight's channels; `inside`: groups fit in."""
    op = Conv(stride, pad, dilation or (1,) * len(stride), groups)
    inside = inside or groups == x[1] == w[0]
    layout = weight_layout(len(w), 1 if inside else blocks[0], blocks[1]) if blocks[1] > 1 else None
    if blocks[0] > blocks[1] == 1:
        layout = tile_layout(len(w), blocks[0])
    types = [TensorType(x, dtype, channel_layout(len(x), blocks[0])), TensorType(w, dtype, layout)]
    return Example(op, (*types, TensorType((w[0],), dtype)) if bias else tuple(types))


def _winograd_example(
    tile: int,
    x: tuple[int, ...],
    channels: int,
    pad: tuple[int, ...],
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    bias: bool = False,
    blocks: tuple[int, int] = (1, 1),
    rows: bool = False,
) -> Example:
    """Make an example with transformed weights, which not any number would be."""
    op = Conv(stride, pad, (1, 1), algorithm=f"winograd{tile}")
    spatial = TensorType((channels, x[1], *kernel))
    transform = WinogradWeight(tile, stride)
    transformed = transform.infer(spatial)
    layout = winograd_rows_layout() if rows else winograd_layout(*blocks) if blocks[1] > 1 else None
    image = TensorType(x, DType.F32, channel_layout(4, blocks[0]))
    vectors = (TensorType((channels,)),) if bias else ()

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        weight = transform.reference(random_array(rng, spatial))
        return (random_array(rng, image), weight, *(random_array(rng, vector) for vector in vectors))

    return Example(op, (image, transformed.with_layout(layout), *vectors), draw)


@onnx("Conv")
def _conv(node: ForeignNode, x: Value, w: Value, b: Value | None = None) -> Value:
    if not 3 <= len(x.shape) <= 5:
        raise node.unsupported(f"convolution of {x.type}; one to three spatial axes are compiled")
    if len(w.shape) != len(x.shape) or not w.type.is_static:
        raise node.invalid(f"weight {w.type} must be of fixed shape and of the rank of X : {x.type}")
    kernel = w.type.static_shape[2:]
    declared = tuple(node.attr("kernel_shape", ())) or kernel
    if declared != kernel:
        raise node.invalid(f"kernel_shape {declared} contradicts the weight {w.type}")
    window = read_window(node, x.shape[2:], kernel)
    op = Conv(window.stride, window.pad, window.dilation, node.attr("group", 1))
    return call(op, x, w) if b is None else call(op, x, w, b)
