"""Concatenation along an axis, and its inverse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call, infer_types
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx
from cnnc.ir.types import Dim, DType, Size, TensorType, format_shape
from cnnc.ops.axes import integers, normal_axis
from cnnc.ops.blocked import channel_block, fixed, tensor


@dataclass(frozen=True)
class Concat(Op):
    """y = the inputs one after the other along an axis."""

    axis: int
    kind = Kind.INJECTIVE

    def infer(self, *parts: TensorType) -> TensorType:
        """Add up the sizes along the axis; everything else must agree."""
        if not parts:
            raise ShapeError("concat: there is nothing to join")
        first = parts[0]
        if normal_axis(self.name, self.axis, first.rank) != self.axis:
            raise ShapeError(f"concat: axis {self.axis} must not be negative")
        for position, part in enumerate(parts):
            if part.dtype is not first.dtype or self._around(part) != self._around(first):
                raise ShapeError(
                    f"concat: input {position} is {part}, which does not join {first} along axis {self.axis}"
                )
        total: Size = 0
        for part in parts:
            total = total + part.shape[self.axis]
        return first.with_shape([total if i == self.axis else s for i, s in enumerate(first.shape)])

    def _around(self, part: TensorType) -> tuple[Size, ...] | None:
        """Give the sizes of the other axes; None where there is no such axis."""
        return part.shape[: self.axis] + part.shape[self.axis + 1 :] if part.rank > self.axis else None

    def infer_layout(self, *parts: TensorType) -> tuple[Layout | None, ...]:
        """Keep channel blocks; along C all parts but the last must have whole blocks."""
        if all(part.layout is None for part in parts):
            return (None,)
        if len({part.layout for part in parts}) > 1:
            raise ShapeError(f"concat: inputs ({', '.join(map(str, parts))}) do not share one layout")
        block = channel_block(self.name, "x", parts[0])
        for part in parts[:-1]:
            if self.axis == 1 and fixed(self.name, part.shape[1:2])[0] % block:
                raise ShapeError(f"concat: along C in {part.layout}, the channels of {part} do not fill whole blocks")
        return (parts[0].layout,)

    def reference(self, *parts: np.ndarray) -> np.ndarray:
        """Concatenate in numpy."""
        return np.concatenate(parts, self.axis)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Choose the part of each element."""
        out = infer_types(self, tuple(types))[0]
        return [tensor(te, out, lambda *index: read_joined(te, xs, types, self.axis, index), self.name)]

    def flops(self, *parts: TensorType) -> int:
        """No arithmetic."""
        return 0

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show one to many parts, every axis, empty parts, a run-time batch, channel blocks, other dtypes."""
        blocked = Layout("NCHW4c")
        yield Example(cls(1), (TensorType((2, 3, 4, 5)), TensorType((2, 1, 4, 5)), TensorType((2, 7, 4, 5))))
        yield Example(cls(0), (TensorType((2, 3)), TensorType((1, 3))))
        yield Example(cls(2), (TensorType((2, 3, 4)),))
        yield Example(cls(1), (TensorType((2, 3)), TensorType((2, 0)), TensorType((2, 4))))
        yield Example(cls(0), tuple(TensorType((n,)) for n in (3, 1, 4, 1, 5, 9, 2)))
        batch = Dim.symbol("n", 3)
        yield Example(cls(1), (TensorType((batch, 2)), TensorType((batch, 3))))
        yield Example(cls(1), tuple(TensorType((2, c, 3, 3), DType.F32, blocked) for c in (8, 4, 5)))
        yield Example(cls(3), tuple(TensorType((2, 5, 3, w), DType.F32, blocked) for w in (2, 3)))
        for dtype in (DType.F16, DType.I64, DType.U8, DType.BOOL):
            yield Example(cls(1), (TensorType((2, 3), dtype), TensorType((2, 2), dtype)))


def read_joined(te: Any, xs: Sequence[Any], types: Sequence[TensorType], axis: int, index: Sequence[Any]) -> Any:
    """Write an element of the tensors joined along an axis; it is found by bisection: log2(parts) comparisons."""
    starts = [0, *accumulate(fixed("concat", [t.shape[axis] for t in types]))]

    def read(first: int, last: int) -> Any:
        if first == last:
            where = index[axis] - starts[first]
            return te.at(xs[first], types[first], *index[:axis], where, *index[axis + 1 :])
        middle = (first + last + 1) // 2
        return te.where(index[axis] < starts[middle], read(first, middle - 1), read(middle, last))

    return read(0, len(xs) - 1)


@dataclass(frozen=True)
class Split(Op):
    """The outputs, one after the other along an axis, are x."""

    axis: int
    sizes: tuple[int, ...]
    kind = Kind.INJECTIVE

    @property
    def outputs(self) -> int:
        """One for each size."""
        return len(self.sizes)

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        """Give a type for each part; the sizes must add up to x's."""
        if normal_axis(self.name, self.axis, x.rank) != self.axis:
            raise ShapeError(f"split: axis {self.axis} must not be negative")
        if not self.sizes or any(size < 0 for size in self.sizes) or sum(self.sizes) != x.shape[self.axis]:
            raise ShapeError(
                f"split: sizes {format_shape(self.sizes)} do not add up to size {x.shape[self.axis]}"
                f" of axis {self.axis} of x : {x}"
            )
        head, tail = x.shape[: self.axis], x.shape[self.axis + 1 :]
        return tuple(x.with_shape([*head, size, *tail]) for size in self.sizes)

    def infer_layout(self, x: TensorType) -> tuple[Layout | None, ...]:
        """Keep channel blocks; along C all parts but the last must have whole blocks."""
        if x.layout is not None:
            block = channel_block(self.name, "x", x)
            if self.axis == 1 and any(size % block for size in self.sizes[:-1]):
                raise ShapeError(f"split: along C in {x.layout}, sizes {format_shape(self.sizes)} cut blocks")
        return (x.layout,) * self.outputs

    def reference(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Split in numpy."""
        return tuple(np.split(x, list(accumulate(self.sizes))[:-1], self.axis))

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read each part at its offset."""

        def part(start: int, out: TensorType) -> Any:
            def element(*index: Any) -> Any:
                where = index[self.axis] + start
                return te.at(xs[0], types[0], *index[: self.axis], where, *index[self.axis + 1 :])

            return tensor(te, out, element, self.name)

        starts = [0, *accumulate(self.sizes)]
        outs = infer_types(self, tuple(types))
        return [part(start, out) for start, out in zip(starts, outs, strict=False)]

    def flops(self, x: TensorType) -> int:
        """No arithmetic."""
        return 0

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show one and several parts, every axis, an empty part, a run-time batch, channel blocks, other dtypes."""
        yield Example(cls(1, (1, 4, 2)), (TensorType((2, 7, 3)),))
        yield Example(cls(0, (2,)), (TensorType((2, 3)),))
        yield Example(cls(2, (2, 0, 1)), (TensorType((2, 1, 3)),))
        yield Example(cls(1, (2, 2)), (TensorType((Dim.symbol("n", 3), 4)),))
        yield Example(cls(1, (4, 8, 1)), (TensorType((2, 13, 3, 3), DType.F32, Layout("NCHW4c")),))
        yield Example(cls(2, (1, 2)), (TensorType((2, 5, 3, 3), DType.F32, Layout("NCHW4c")),))
        for dtype in (DType.F16, DType.I64, DType.BOOL):
            yield Example(cls(0, (1, 2)), (TensorType((3, 2), dtype),))


# ONNX


@onnx("Concat")
def _concat(node: ForeignNode, *parts: Value) -> Value:
    axis = node.attr("axis")
    if axis is None:
        raise node.invalid("the attribute `axis` is missing")
    return call(Concat(normal_axis(node.op_type, axis, parts[0].type.rank)), *parts)


@onnx("Split")
def _split(node: ForeignNode, x: Value, sizes: Value | None = None) -> tuple[Value, ...]:
    axis = normal_axis(node.op_type, node.attr("axis", 0), x.type.rank)
    chosen = node.attr("split") if sizes is None else integers(node.const(sizes))
    if chosen is None:
        chosen = _equal_sizes(node, x, axis)
    if len(chosen) < node.outputs:
        raise node.invalid(f"splits into {len(chosen)} parts {list(chosen)}, but has {node.outputs} outputs")
    return call(Split(axis, tuple(chosen)), x).node.values


def _equal_sizes(node: ForeignNode, x: Value, axis: int) -> list[int]:
    """Divide an axis into equal parts; the last may be smaller only where `num_outputs` says how many (opset 18)."""
    (size,) = fixed(node.op_type, x.shape[axis : axis + 1])
    parts = node.attr("num_outputs", node.outputs)
    if parts < 1:
        raise node.invalid(f"cannot split into {parts} parts")
    each = -(-size // parts)
    last = size - each * (parts - 1)
    if last < 0 or (last != each and node.opset < 18):
        raise node.invalid(f"size {size} of axis {axis} of x : {x.type} does not divide into {parts} equal parts")
    return [each] * (parts - 1) + [last]
