"""Operators that only renumber elements: reshape, transpose, expand, tile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call, infer_types
from cnnc.ir.graph import Value
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx
from cnnc.ir.types import Dim, DType, Size, TensorType, format_shape, product, upper_bound
from cnnc.ops.axes import integers, normal_axes, normal_axis
from cnnc.ops.blocked import fixed, flat_index, tensor
from cnnc.ops.broadcast import broadcast_shapes, read_broadcast


class _Renumbering(Op):
    """y[i] = x[g(i)]."""

    kind = Kind.INJECTIVE

    def flops(self, *types: TensorType) -> int:
        """No arithmetic."""
        return 0


@dataclass(frozen=True)
class Reshape(_Renumbering):
    """y = x's elements in row-major order, in another shape."""

    shape: tuple[Size, ...]

    def infer(self, x: TensorType) -> TensorType:
        """Give the shape, which has as many elements as x.

        The counts are compared as exact integers, run-time sizes as polynomials.
        """
        if product(self.shape) != product(x.shape):
            raise ShapeError(
                f"reshape: x : {x} has {product(x.shape)} elements, shape {format_shape(self.shape)}"
                f" has {product(self.shape)}"
            )
        return x.with_shape(self.shape)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Reshape in numpy; a run-time size takes its value from x."""
        shape = [s if isinstance(s, int) else -1 for s in self.shape]
        if shape.count(-1) > 1 or 0 in shape:
            shape = [upper_bound(s) for s in self.shape]
        return x.reshape(shape)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Number the elements that axes in common leave over."""
        x, y = types[0].shape, self.shape
        head = _common(x, y)
        tail = _common(x[head:][::-1], y[head:][::-1])
        inner_x = fixed(self.name, x[head : len(x) - tail])
        inner_y = fixed(self.name, y[head : len(y) - tail])

        def element(*index: Any) -> Any:
            flat = flat_index(index[head : len(y) - tail], inner_y)
            inner = []
            for axis, size in enumerate(inner_x):
                stride = max(math.prod(inner_x[axis + 1 :]), 1)  # 0 where there are no elements
                inner.append(te.floormod(te.floordiv(flat, stride), size) if size > 1 else 0)
            return te.at(xs[0], types[0], *index[:head], *inner, *index[len(y) - tail :])

        return [tensor(te, infer_types(self, tuple(types))[0], element, self.name)]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show merging, splitting, regrouping, 0-d, a run-time batch, no elements, other dtypes."""
        batch = Dim.symbol("n", 3)
        yield Example(cls((2, 60)), (TensorType((2, 3, 4, 5)),))
        yield Example(cls((6, 1, 20)), (TensorType((2, 3, 4, 5)),))
        yield Example(cls((2, 4, 3, 5)), (TensorType((2, 3, 4, 5)),))
        yield Example(cls(()), (TensorType((1, 1)),))
        yield Example(cls((1,)), (TensorType(()),))
        yield Example(cls((batch, 12)), (TensorType((batch, 3, 4)),))
        yield Example(cls((batch, 2, 2, 3)), (TensorType((batch, 4, 3)),))
        yield Example(cls((3, 0)), (TensorType((0, 5)),))
        yield Example(cls((0, 3)), (TensorType((5, 0)),))
        for dtype in (DType.F16, DType.I64, DType.BOOL):
            yield Example(cls((5, 3)), (TensorType((3, 5), dtype),))


def _common(x: Sequence[Size], y: Sequence[Size]) -> int:
    """Count the leading sizes that are the same."""
    count = 0
    while count < min(len(x), len(y)) and x[count] == y[count]:
        count += 1
    return count


def reshape(x: Value, shape: Sequence[Size]) -> Value:
    """Reshape; one entry may be -1, and becomes what is left.

    Raises `ShapeError` for another negative entry, for two -1, and where the count of elements does not fit.
    """
    target = resolve_shape(x.type, shape)
    return x if target == x.shape else call(Reshape(target), x)


def resolve_shape(x: TensorType, shape: Sequence[Size]) -> tuple[Size, ...]:
    """Put the size that is left in the place of -1."""
    for size in shape:
        if isinstance(size, int) and size < -1:
            raise ShapeError(f"reshape: shape {format_shape(shape)} has the entry {size}; only -1 is special")
    unknown = [i for i, size in enumerate(shape) if size == -1]
    if not unknown:
        return tuple(shape)
    if len(unknown) > 1:
        raise ShapeError(f"reshape: shape {format_shape(shape)} has more than one -1")
    known = [size for size in shape if size != -1]
    left = _quotient(x.shape, known)
    if left is None:
        raise ShapeError(f"reshape: x : {x} does not divide into shape {format_shape(shape)}")
    return tuple(left if size == -1 else size for size in shape)


def _quotient(whole: Sequence[Size], part: Sequence[Size]) -> Size | None:
    """Divide products of sizes; None where the quotient is no whole size."""
    rest = list(whole)
    divisor = 1
    for size in part:
        if isinstance(size, int):
            divisor *= size
        elif size in rest:
            rest.remove(size)
        else:
            return None
    total = product(rest)
    if divisor == 0:
        return None
    quotient = total // divisor
    return quotient if quotient * divisor == total else None


def flatten(x: Value, axis: int = 1) -> Value:
    """Merge the axes before `axis` into one, and those from it on into another."""
    cut = axis if axis == x.type.rank else normal_axis("flatten", axis, x.type.rank)
    return call(Reshape((product(x.shape[:cut]), product(x.shape[cut:]))), x)


def squeeze(x: Value, axes: Iterable[int] | None = None) -> Value:
    """Leave out axes of size 1; without `axes` all of them."""
    if axes is None:
        return call(Reshape(tuple(s for s in x.shape if s != 1)), x)
    chosen = normal_axes("squeeze", axes, x.type.rank)
    for axis in chosen:
        if x.shape[axis] != 1:
            raise ShapeError(f"squeeze: axis {axis} of x : {x.type} has size {x.shape[axis]}, not 1")
    return call(Reshape(tuple(s for i, s in enumerate(x.shape) if i not in chosen)), x)


def unsqueeze(x: Value, axes: Iterable[int]) -> Value:
    """Put in axes of size 1, so that they stand at `axes` of the result."""
    given = tuple(axes)
    rank = x.type.rank + len(given)
    chosen = normal_axes("unsqueeze", given, rank)
    sizes = iter(x.shape)
    return call(Reshape(tuple(1 if i in chosen else next(sizes) for i in range(rank))), x)


@dataclass(frozen=True)
class Transpose(_Renumbering):
    """Axis i of y is axis perm[i] of x."""

    perm: tuple[int, ...]

    def infer(self, x: TensorType) -> TensorType:
        """Permute the shape."""
        if sorted(self.perm) != list(range(x.rank)):
            raise ShapeError(f"transpose: perm {list(self.perm)} is no permutation of the axes of x : {x}")
        return x.with_shape([x.shape[axis] for axis in self.perm])

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Transpose in numpy."""
        return np.ascontiguousarray(x.transpose(self.perm)).reshape([x.shape[a] for a in self.perm])

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read at the permuted index."""

        def element(*index: Any) -> Any:
            return te.at(xs[0], types[0], *(index[self.perm.index(axis)] for axis in range(len(index))))

        return [tensor(te, infer_types(self, tuple(types))[0], element, self.name)]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show several permutations, 0-d, a run-time batch, no elements, other dtypes."""
        yield Example(cls((0, 2, 3, 1)), (TensorType((2, 5, 3, 7)),))
        yield Example(cls((3, 1, 0, 2)), (TensorType((2, 5, 3, 7)),))
        yield Example(cls((1, 0)), (TensorType((33, 17)),))
        yield Example(cls(()), (TensorType(()),))
        yield Example(cls((0, 2, 1)), (TensorType((Dim.symbol("n", 3), 4, 5)),))
        yield Example(cls((1, 0)), (TensorType((0, 3)),))
        for dtype in (DType.F16, DType.I64, DType.U8, DType.BOOL):
            yield Example(cls((1, 0)), (TensorType((3, 5), dtype),))


@dataclass(frozen=True)
class Expand(_Renumbering):
    """y = x broadcast to a shape."""

    shape: tuple[Size, ...]

    def infer(self, x: TensorType) -> TensorType:
        """Give the shape; x must broadcast to it."""
        if broadcast_shapes("expand", x.shape, self.shape) != tuple(self.shape):
            raise ShapeError(
                f"expand: x : {x} does not broadcast to {format_shape(self.shape)}; use `expand(x, shape)`"
            )
        return x.with_shape(self.shape)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Broadcast in numpy; a run-time size takes its value from x where x has it."""
        offset = len(self.shape) - x.ndim
        shape = [
            x.shape[i - offset]
            if not isinstance(s, int) and i >= offset and x.shape[i - offset] != 1
            else upper_bound(s)
            for i, s in enumerate(self.shape)
        ]
        return np.broadcast_to(x, shape)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read at index 0 of the stretched axes."""
        out = infer_types(self, tuple(types))[0]
        return [tensor(te, out, lambda *index: read_broadcast(te, xs[0], types[0], index), self.name)]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show stretched and new axes, 0-d, no elements, a run-time batch, other dtypes."""
        yield Example(cls((2, 5, 3, 7)), (TensorType((5, 1, 7)),))
        yield Example(cls((2, 3)), (TensorType(()),))
        yield Example(cls((0, 3)), (TensorType((1, 3)),))
        yield Example(cls((Dim.symbol("n", 3), 4)), (TensorType((Dim.symbol("n", 3), 1)),))
        for dtype in (DType.F16, DType.I64, DType.BOOL):
            yield Example(cls((4, 3)), (TensorType((4, 1), dtype),))


def expand(x: Value, shape: Sequence[Size]) -> Value:
    """Broadcast x and `shape` against each other, as ONNX does: a 1 in `shape` leaves x's size."""
    target = broadcast_shapes("expand", x.shape, shape)
    return x if target == x.shape else call(Expand(target), x)


@dataclass(frozen=True)
class Tile(_Renumbering):
    """y = x repeated repeats[i] times along axis i: y[.., j, ..] = x[.., j mod size, ..]."""

    repeats: tuple[int, ...]

    def infer(self, x: TensorType) -> TensorType:
        """Multiply the sizes."""
        if len(self.repeats) != x.rank or any(r < 0 for r in self.repeats):
            raise ShapeError(
                f"tile: repeats {list(self.repeats)} must be {x.rank} numbers >= 0, one an axis of x : {x}"
            )
        return x.with_shape([s * r for s, r in zip(x.shape, self.repeats, strict=True)])

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Tile in numpy."""
        return np.tile(x, self.repeats)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read at the index modulo x's size."""
        repeated = [axis for axis, count in enumerate(self.repeats) if count > 1]
        sizes = dict(zip(repeated, fixed(self.name, [types[0].shape[axis] for axis in repeated]), strict=True))

        def element(*index: Any) -> Any:
            return te.at(
                xs[0], types[0], *(te.floormod(i, sizes[axis]) if axis in sizes else i for axis, i in enumerate(index))
            )

        return [tensor(te, infer_types(self, tuple(types))[0], element, self.name)]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show one and several axes, 0-d, no repeats, a run-time batch, other dtypes."""
        yield Example(cls((1, 2, 3)), (TensorType((2, 3, 5)),))
        yield Example(cls((3,)), (TensorType((4,)),))
        yield Example(cls(()), (TensorType(()),))
        yield Example(cls((2, 0)), (TensorType((2, 3)),))
        yield Example(cls((1, 2)), (TensorType((Dim.symbol("n", 3), 4)),))
        for dtype in (DType.F16, DType.I64, DType.BOOL):
            yield Example(cls((2, 2)), (TensorType((3, 2), dtype),))


# ONNX


@onnx("Reshape")
def _reshape(node: ForeignNode, x: Value, shape: Value) -> Value:
    wanted: list[Size] = list(integers(node.const(shape)))
    if node.attr("allowzero", 0):
        if 0 in wanted and -1 in wanted:
            raise node.invalid(f"shape {wanted} has both 0 and -1, which allowzero=1 forbids")
        return reshape(x, wanted)
    for axis, size in enumerate(wanted):
        if size == 0:
            if axis >= x.type.rank:
                raise node.invalid(f"shape {wanted} keeps size {axis} of x : {x.type}, which has only {x.type.rank}")
            wanted[axis] = x.shape[axis]
    return reshape(x, wanted)


@onnx("Flatten")
def _flatten(node: ForeignNode, x: Value) -> Value:
    return flatten(x, node.attr("axis", 1))


@onnx("Squeeze")
def _squeeze(node: ForeignNode, x: Value, axes: Value | None = None) -> Value:
    if axes is not None:
        return squeeze(x, integers(node.const(axes)))
    return squeeze(x, node.attr("axes"))


@onnx("Unsqueeze")
def _unsqueeze(node: ForeignNode, x: Value, axes: Value | None = None) -> Value:
    chosen = node.attr("axes") if axes is None else integers(node.const(axes))
    if chosen is None:
        raise node.invalid("the axes are missing")
    return unsqueeze(x, chosen)


@onnx("Transpose")
def _transpose(node: ForeignNode, x: Value) -> Value:
    return call(Transpose(tuple(node.attr("perm", range(x.type.rank)[::-1]))), x)


@onnx("Expand")
def _expand(node: ForeignNode, x: Value, shape: Value) -> Value:
    return expand(x, integers(node.const(shape)))


@onnx("Tile")
def _tile(node: ForeignNode, x: Value, repeats: Value) -> Value:
    return call(Tile(tuple(integers(node.const(repeats)))), x)
