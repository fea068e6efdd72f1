"""Columns back into images: what windows saw, added up where they overlap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.axes import integers
from cnnc.ops.blocked import every, fixed, flat_index, tensor
from cnnc.ops.broadcast import widen, working_dtype
from cnnc.ops.numeric import cast_to, check_floats, narrow
from cnnc.ops.window import Window, spatial_attr


@dataclass(frozen=True)
class Col2Im(Op):
    """Add up columns, each what one window saw, at the places of an image of some `size` they come from.

    y[n,c,p] = sum over windows q, taps k with q*stride - pad + k*dilation = p of x[n, c*taps + k, q]

    Inputs x[N,C*taps,windows], windows and taps counted in row-major order; pad is (begin..., end...).  What comes from
    the padding is left out.  PyTorch calls it fold, the inverse of unfold where windows do not overlap.
    """

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]

    kind: ClassVar[Kind] = Kind.REDUCTION

    @property
    def window(self) -> Window:
        """The windows over the image."""
        return Window(self.kernel, self.stride, self.pad, self.dilation)

    @property
    def counts(self) -> tuple[int, ...]:
        """The windows along each axis of the image."""
        return tuple(int(count) for count in self.window.output(self.name, self.size) if isinstance(count, int))

    def infer(self, x: TensorType) -> TensorType:
        """Give [N,C,*size]; raises `ShapeError` where windows, channels, their number or the dtype do not fit."""
        check_floats(self.name, x=x)
        self.window.check(self.name, TensorType((1, 1, *self.size)))
        if x.rank != 3:
            raise ShapeError(f"{self.name}: takes columns x[N,C*taps,windows], not {x}")
        channels, windows = fixed(self.name, x.shape[1:])
        taps = math.prod(self.kernel)
        if channels % taps:
            raise ShapeError(f"{self.name}: the {taps} taps of kernel={self.kernel} must divide axis 1 of x : {x}")
        if windows != math.prod(self.counts):
            raise ShapeError(
                f"{self.name}: an image of {self.size} has {math.prod(self.counts)} windows ({self.counts} along its"
                f" axes), but x : {x} has {windows}"
            )
        return x.with_shape((x.shape[0], channels // taps, *self.size))

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Add tap by tap, then cut off the padding."""
        counts, window = self.counts, self.window
        taps = window.taps()
        columns = widen(x).reshape(x.shape[0], x.shape[1] // len(taps), len(taps), *counts)
        image = window.padded(np.zeros((*columns.shape[:2], *self.size), columns.dtype), counts, 0)
        for number, tap in enumerate(taps):
            window.tap_view(image, tap, counts)[...] += columns[:, :, number]
        inner = tuple(slice(begin, begin + size) for begin, size in zip(window.begin, self.size, strict=True))
        return narrow(np.ascontiguousarray(image[(slice(None), slice(None), *inner)]), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Gather: reduce over those taps by which a window reaches the element."""
        out, window, counts = self.infer(types[0]), self.window, self.counts
        wide = working_dtype(out.dtype)
        taps = [te.reduce_axis(k, f"k{i}") for i, k in enumerate(self.kernel)]

        def columns(n: Any, c: Any, *p: Any) -> Any:
            windows, conditions = window.seen_by(te, p, taps, counts)
            channel = c * math.prod(self.kernel) + flat_index(taps, self.kernel)
            value = te.at(xs[0], types[0], n, channel, flat_index(windows, counts))
            value = te.where(every(te, conditions), value, te.const(0, out.dtype))
            return te.sum(cast_to(te, value, out.dtype, wide), taps)

        sums = tensor(te, out.with_dtype(wide), columns, "col2im")
        if wide is out.dtype:
            return [sums]
        narrowed = out.with_dtype(wide)
        return [tensor(te, out, lambda *i: cast_to(te, te.at(sums, narrowed, *i), wide, out.dtype), "col2im_narrow")]

    def flops(self, x: TensorType) -> int:
        """Count one addition for each element of a column."""
        return x.elements

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give windows beside each other and over each other, steps, padding, dilation, 1-D and 3-D, other dtypes."""
        yield _example((2, 3), (4, 6), (2, 2), (2, 2))
        yield _example((1, 2), (5, 4), (3, 3), (1, 1), (1, 1, 1, 1))
        yield _example((2, 1), (7, 6), (3, 2), (2, 3), (0, 1, 2, 1))
        yield _example((1, 3), (6, 7), (2, 3), (1, 2), (1, 0, 0, 2), (2, 2))
        yield _example((1, 2), (9,), (4,), (3,), (1, 0))
        yield _example((1, 2), (3, 4, 3), (2, 2, 1), (1, 2, 1))
        yield _example((0, 2), (4, 4), (2, 2), (2, 2))
        for dtype in (DType.F64, DType.F16):
            yield _example((1, 2), (5, 4), (3, 3), (1, 1), (1, 1, 1, 1), dtype=dtype)
        yield Example(cls((4, 4), (2, 2), (2, 2), (0,) * 4, (1, 1)), (TensorType((Dim.symbol("n", 2), 8, 4)),))


def _example(
    images: tuple[int, int],
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pad: tuple[int, ...] = (),
    dilation: tuple[int, ...] = (),
    dtype: DType = DType.F32,
) -> Example:
    """Make an example of N images of C channels."""
    op = Col2Im(size, kernel, stride, pad or (0,) * (2 * len(size)), dilation or (1,) * len(size))
    return Example(op, (TensorType((images[0], images[1] * math.prod(kernel), math.prod(op.counts)), dtype),))


@onnx("Col2Im")
def _col2im(node: ForeignNode, x: Value, image_shape: Value, block_shape: Value) -> Value:
    size, kernel = integers(node.const(image_shape)), integers(node.const(block_shape))
    rank = len(size)
    if not 1 <= rank <= 3:
        raise node.unsupported(f"images of {rank} spatial axes; one to three are compiled")
    if len(kernel) != rank:
        raise node.invalid(f"block_shape {kernel} is not for the {rank} axes of image_shape {size}")
    stride, dilation = spatial_attr(node, "strides", rank, 1), spatial_attr(node, "dilations", rank, 1)
    return call(Col2Im(tuple(size), tuple(kernel), stride, spatial_attr(node, "pads", 2 * rank, 0), dilation), x)
