"""Padding, and cropping as its negative."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call, infer_types
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx
from cnnc.ir.types import Dim, DType, Size, TensorType
from cnnc.ops.axes import integers, normal_axis
from cnnc.ops.blocked import channel_block, every, fixed, tensor

MODES = ("constant", "reflect", "edge", "wrap")


@dataclass(frozen=True)
class Pad(Op):
    """y[i] = x[i - begin], and outside x: `value`, or x mirrored without its edge, its edge, or x again.

    `pads` has all begins, then all ends.  A negative one crops; outside the mode "constant" an axis is either padded
    or cropped, not both, and must have elements to repeat.
    """

    pads: tuple[int, ...]
    mode: str = "constant"
    value: float = 0.0
    kind = Kind.INJECTIVE

    def _pairs(self) -> list[tuple[int, int]]:
        rank = len(self.pads) // 2
        return list(zip(self.pads[:rank], self.pads[rank:], strict=True))

    def infer(self, x: TensorType) -> TensorType:
        """Add the pads to the sizes."""
        if self.mode not in MODES:
            raise ShapeError(f"pad: mode is one of {', '.join(MODES)}, not {self.mode!r}")
        if len(self.pads) != 2 * x.rank:
            raise ShapeError(f"pad: pads {list(self.pads)} must be {2 * x.rank} numbers, two an axis of x : {x}")
        return x.with_shape([self._size(x, axis, *pair) for axis, pair in enumerate(self._pairs())])

    def _size(self, x: TensorType, axis: int, begin: int, end: int) -> Size:
        size = x.shape[axis]
        if begin == 0 and end == 0:
            return size
        smallest = size if isinstance(size, int) else size.lower
        if smallest + min(begin, 0) + min(end, 0) < 0:
            raise ShapeError(f"pad: {begin} before and {end} after crop more than axis {axis} of x : {x} has")
        if self.mode != "constant":
            if min(begin, end) < 0 < max(begin, end):
                raise ShapeError(f"pad: axis {axis} is padded and cropped at once ({begin}, {end}) in mode {self.mode}")
            if max(begin, end) > 0 and size == 0:
                raise ShapeError(f"pad: mode {self.mode} has nothing to repeat along axis {axis} of x : {x}")
        return size + (begin + end)

    def infer_layout(self, x: TensorType) -> tuple[Layout | None, ...]:
        """Keep channel blocks where C is not padded."""
        if x.layout is not None:
            channel_block(self.name, "x", x)
            if self._pairs()[1] != (0, 0):
                raise ShapeError(f"pad: {self._pairs()[1]} of the channels needs a plain tensor, not x : {x}")
        return (x.layout,)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Pad in numpy, then crop."""
        crop = [
            slice(max(-begin, 0), size + min(end, 0)) for (begin, end), size in zip(self._pairs(), x.shape, strict=True)
        ]
        width = [(max(begin, 0), max(end, 0)) for begin, end in self._pairs()]
        cropped = x[tuple(crop)]
        if not width:
            return cropped
        if self.mode == "constant":
            return np.pad(cropped, width, constant_values=np.asarray(self.value).astype(x.dtype))
        for axis, pair in enumerate(width):
            positions = [self._source(i, x.shape[axis]) for i in range(-pair[0], cropped.shape[axis] + pair[1])]
            if any(pair):
                cropped = np.take(cropped, positions, axis)
        return cropped

    def _source(self, position: int, size: int) -> int:
        """Give the element of an axis that stands at a position outside it."""
        if self.mode == "edge":
            return min(max(position, 0), size - 1)
        if self.mode == "wrap":
            return position % size
        period = max(2 * (size - 1), 1)
        folded = position % period
        return min(folded, period - folded) if size > 1 else 0

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read at the source position, guarded in the mode "constant"."""
        x = types[0]
        out = infer_types(self, tuple(types))[0]
        padded = [axis for axis, pair in enumerate(self._pairs()) if max(pair) > 0]
        sizes = dict(zip(padded, fixed(self.name, [x.shape[axis] for axis in padded]), strict=True))

        def element(*index: Any) -> Any:
            where = [i - begin if begin else i for i, (begin, _) in zip(index, self._pairs(), strict=True)]
            if self.mode != "constant":
                return te.at(
                    xs[0], x, *(self._folded(te, i, sizes[a]) if a in sizes else i for a, i in enumerate(where))
                )
            conditions = [c for a in padded for c in self._bounds(where[a], sizes[a], self._pairs()[a])]
            value = te.at(xs[0], x, *where)
            return (
                te.where(every(te, conditions), value, te.const(self._number(x.dtype), x.dtype))
                if conditions
                else value
            )

        return [tensor(te, out, element, self.name)]

    def _number(self, dtype: DType) -> Any:
        return np.asarray(self.value).astype(dtype.numpy).item()

    def _bounds(self, position: Any, size: int, pair: tuple[int, int]) -> list[Any]:
        return [position >= 0] * (pair[0] > 0) + [position < size] * (pair[1] > 0)

    def _folded(self, te: Any, position: Any, size: int) -> Any:
        """Write `_source` as an expression."""
        if size == 1:
            return 0
        if self.mode == "edge":
            return te.minimum(te.maximum(position, 0), size - 1)
        if self.mode == "wrap":
            return te.floormod(position, size)
        folded = te.floormod(position, 2 * (size - 1))
        return te.minimum(folded, 2 * (size - 1) - folded)

    def flops(self, x: TensorType) -> int:
        """No arithmetic."""
        return 0

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show every mode, lopsided pads, wider than x, crops, 0-d, a run-time batch, channel blocks, other dtypes."""
        x = TensorType((2, 5, 3, 7))
        blocked = x.with_layout(Layout("NCHW4c"))
        yield Example(cls((0, 0, 1, 2, 0, 0, 3, 0)), (x,))
        yield Example(cls((1, 2, 0, 0, 0, 1, 0, 0), "constant", -1.5), (x,))
        yield Example(cls((0, -1, 2, -3, 0, 2, -1, -4), "constant", float("-inf")), (x,))
        yield Example(cls((0, 0, 1, 2, 0, 0, 3, 0), "constant", 2.0), (blocked,))
        yield Example(cls((1, 0, -1, 0, 0, 0, -1, 2)), (blocked,))
        for mode in MODES[1:]:
            yield Example(cls((0, 1, 2, 0, 0, 0, 2, 6), mode), (x,))
            yield Example(cls((7, 4, 9, 5), mode), (TensorType((3, 1)),))
            yield Example(cls((-1, 2, 0, 1), mode), (TensorType((3, 4)),))
            yield Example(cls((1, 0, 1, 2, 0, 0, 1, 0), mode), (blocked,))
        yield Example(cls(()), (TensorType(()),))
        yield Example(cls((2, 1)), (TensorType((0,)),))
        yield Example(cls((0, 1, 0, 2)), (TensorType((Dim.symbol("n", 3), 4)),))
        for dtype, value in ((DType.F16, 0.5), (DType.I64, -3), (DType.U8, 7), (DType.BOOL, 1)):
            yield Example(cls((1, 0, 0, 2), "constant", value), (TensorType((3, 2), dtype),))


# ONNX


@onnx("Pad")
def _pad(
    node: ForeignNode, x: Value, pads: Value | None = None, value: Value | None = None, axes: Value | None = None
) -> Value:
    mode = node.attr("mode", "constant")
    if node.opset < 11:
        widths, number = list(node.attr("pads", ())), node.attr("value", 0.0)
    else:
        widths = integers(node.const(pads))
        number = 0 if value is None else _one_number(node, value)
    chosen = (
        range(x.type.rank) if axes is None else [normal_axis("pad", a, x.type.rank) for a in integers(node.const(axes))]
    )
    if len(widths) != 2 * len(chosen) or len(set(chosen)) != len(chosen):
        raise node.invalid(f"pads {widths} must be two numbers for each of the different axes {list(chosen)}")
    every_axis = [0] * (2 * x.type.rank)
    for position, axis in enumerate(chosen):
        every_axis[axis] = widths[position]
        every_axis[x.type.rank + axis] = widths[len(chosen) + position]
    if mode not in MODES:
        raise node.invalid(f"mode {mode!r} is none of {', '.join(MODES)}")
    return x if not any(every_axis) else call(Pad(tuple(every_axis), mode, number), x)


def _one_number(node: ForeignNode, value: Value) -> Any:
    array = node.const(value)
    if array is None or array.size != 1:
        raise node.invalid(f"the value to pad with must be one number, not {value.type}")
    return array.item()
