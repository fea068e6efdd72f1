"""Reading at indices that are data.

Negative indices count from the end.  An index outside an axis is an error, in the reference as in a binary, where a
check runs before the kernel; the kernel itself never reads outside x, it takes the nearest element there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call, infer_types
from cnnc.ir.graph import Value
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx, random_array
from cnnc.ir.types import Dim, DType, Size, TensorType, upper_bound
from cnnc.ops.axes import normal_axis
from cnnc.ops.blocked import fixed, tensor

INDICES = (DType.I32, DType.I64)


def check_indices(name: str, indices: TensorType, sizes: Iterable[Size]) -> None:
    """Raise `ShapeError` for indices that are no integers, or that index an axis without elements."""
    if indices.dtype not in INDICES:
        raise ShapeError(f"{name}: indices are i32 or i64, not {indices}")
    if 0 in sizes and indices.elements:
        raise ShapeError(f"{name}: indices {indices} have nothing to choose from: the axis has size 0")


def wrap_indices(name: str, indices: np.ndarray, size: int) -> np.ndarray:
    """Count negative indices from the end; raises `ShapeError` for one outside [-size, size)."""
    outside = (indices < -size) | (indices >= size)
    if outside.any():
        raise ShapeError(f"{name}: index {indices[outside].flat[0]} is outside an axis of size {size}")
    return np.where(indices < 0, indices + size, indices)


def read_index(te: Any, index: Any, size: int) -> Any:
    """Write an index that is data as one that is inside [0, size) whatever the data."""
    wrapped = te.select(index < 0, index + size, index)
    return te.index(te.minimum(te.maximum(wrapped, 0), size - 1))


def draw_indices(
    types: Sequence[TensorType], position: int, size: Callable[[tuple[int, ...]], int] | int
) -> Callable[[np.random.Generator], tuple[np.ndarray, ...]]:
    """Make the `draw` of an example whose input `position` holds indices below `size`."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        arrays = [random_array(rng, type_) for type_ in types]
        limit = size if isinstance(size, int) else size(types[position].static_shape)
        type_ = types[position]
        arrays[position] = rng.integers(-limit, limit, type_.static_shape).astype(type_.dtype.numpy)
        return tuple(arrays)

    return draw


class _Gather(Op):
    """Reads one element of x for each element of y."""

    kind = Kind.INJECTIVE

    def flops(self, *types: TensorType) -> int:
        """No arithmetic."""
        return 0


@dataclass(frozen=True)
class Gather(_Gather):
    """y[a.., i.., b..] = x[a.., indices[i..], b..], with `axis` many a."""

    axis: int

    def infer(self, x: TensorType, indices: TensorType) -> TensorType:
        """Put the indices' shape in the place of the axis."""
        if normal_axis(self.name, self.axis, x.rank) != self.axis:
            raise ShapeError(f"gather: axis {self.axis} must not be negative")
        check_indices(self.name, indices, x.shape[self.axis : self.axis + 1])
        return x.with_shape([*x.shape[: self.axis], *indices.shape, *x.shape[self.axis + 1 :]])

    def index_extents(self, x: TensorType, *others: TensorType) -> dict[int, tuple[int, ...]]:
        """Index into the axis."""
        return {1: (upper_bound(x.shape[self.axis]),)}

    def reference(self, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Take in numpy."""
        return np.take(x, wrap_indices(self.name, indices, x.shape[self.axis]), self.axis)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read the index, then x."""
        (size,) = fixed(self.name, types[0].shape[self.axis : self.axis + 1])
        after = self.axis + types[1].rank

        def element(*index: Any) -> Any:
            chosen = read_index(te, te.at(xs[1], types[1], *index[self.axis : after]), size)
            return te.at(xs[0], types[0], *index[: self.axis], chosen, *index[after:])

        return [tensor(te, infer_types(self, tuple(types))[0], element, self.name)]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show every axis, a single index, a matrix of them, none, a run-time batch, dtypes."""
        shapes: tuple[tuple[int, tuple[Any, ...], tuple[Any, ...]], ...] = (
            (0, (5, 3), (4,)),
            (1, (2, 5, 3), (2, 3)),
            (2, (2, 3, 7), ()),
            (0, (5,), (2,)),
            (1, (2, 5), (0,)),
            (1, (Dim.symbol("n", 3), 5), (2,)),
        )
        for axis, x, indices in shapes:
            types = (TensorType(x), TensorType(indices, DType.I64))
            yield Example(cls(axis), types, draw_indices(types, 1, upper_bound(x[axis])))
        for dtype in (DType.F16, DType.I64, DType.BOOL):
            types = (TensorType((4, 3), dtype), TensorType((5,), DType.I32))
            yield Example(cls(0), types, draw_indices(types, 1, 4))


@dataclass(frozen=True)
class GatherElements(_Gather):
    """y[i, j, ..] = x[i, .., indices[i, j, ..], ..]: each element of `indices` replaces its own index along `axis`."""

    axis: int

    def infer(self, x: TensorType, indices: TensorType) -> TensorType:
        """Give the indices' shape, which is inside x's except along the axis."""
        check_elements(self.name, self.axis, x, indices)
        return x.with_shape(indices.shape)

    def index_extents(self, x: TensorType, *others: TensorType) -> dict[int, tuple[int, ...]]:
        """Index into the axis."""
        return {1: (upper_bound(x.shape[self.axis]),)}

    def reference(self, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Take in numpy."""
        inside = x[tuple(slice(None if i == self.axis else s) for i, s in enumerate(indices.shape))]
        return np.take_along_axis(inside, wrap_indices(self.name, indices, x.shape[self.axis]), self.axis)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read the index, then x."""
        (size,) = fixed(self.name, types[0].shape[self.axis : self.axis + 1])

        def element(*index: Any) -> Any:
            chosen = read_index(te, te.at(xs[1], types[1], *index), size)
            return te.at(xs[0], types[0], *index[: self.axis], chosen, *index[self.axis + 1 :])

        return [tensor(te, infer_types(self, tuple(types))[0], element, self.name)]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show every axis, fewer and more indices than elements, dtypes."""
        for axis, x, indices in ((0, (3, 4), (2, 4)), (1, (3, 4), (2, 6)), (2, (2, 3, 5), (2, 3, 1)), (0, (4,), (0,))):
            types = (TensorType(x), TensorType(indices, DType.I64))
            yield Example(cls(axis), types, draw_indices(types, 1, x[axis]))
        types = (TensorType((3, 2), DType.U8), TensorType((3, 2), DType.I32))
        yield Example(cls(0), types, draw_indices(types, 1, 3))


def check_elements(name: str, axis: int, x: TensorType, indices: TensorType) -> None:
    """Raise `ShapeError` unless `indices` has x's rank and is no larger than x except along the axis."""
    if normal_axis(name, axis, x.rank) != axis:
        raise ShapeError(f"{name}: axis {axis} must not be negative")
    check_indices(name, indices, x.shape[axis : axis + 1])
    fits = len(indices.shape) == x.rank and all(
        i == axis or a == b or (isinstance(a, int) and isinstance(b, int) and a <= b)
        for i, (a, b) in enumerate(zip(indices.shape, x.shape, strict=True))
    )
    if not fits:
        raise ShapeError(f"{name}: indices {indices} do not lie inside x : {x} but for axis {axis}")


@dataclass(frozen=True)
class GatherNd(_Gather):
    """y[b.., i.., c..] = x[b.., indices[b.., i.., :].., c..]: the last axis of `indices` holds whole positions."""

    batch_dims: int = 0

    def infer(self, x: TensorType, indices: TensorType) -> TensorType:
        """Give batch axes, the other axes of `indices`, and the axes of x that positions leave over."""
        count = check_positions(self.name, self.batch_dims, x, indices)
        return x.with_shape([*indices.shape[:-1], *x.shape[self.batch_dims + count :]])

    def index_extents(self, x: TensorType, indices: TensorType) -> dict[int, tuple[int, ...]]:
        """Index into the axes after the batch."""
        count = upper_bound(indices.shape[-1])
        return {1: tuple(map(upper_bound, x.shape[self.batch_dims : self.batch_dims + count]))}

    def reference(self, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Index in numpy."""
        batch = np.ix_(*(np.arange(size) for size in indices.shape[:-1]))[: self.batch_dims]
        where = [
            wrap_indices(self.name, indices[..., k], x.shape[self.batch_dims + k]) for k in range(indices.shape[-1])
        ]
        return np.asarray(x[(*batch, *where)])

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read the position, then x."""
        x, indices = types
        (count,) = fixed(self.name, indices.shape[-1:])
        sizes = fixed(self.name, x.shape[self.batch_dims : self.batch_dims + count])

        def element(*index: Any) -> Any:
            head, tail = index[: indices.rank - 1], index[indices.rank - 1 :]
            chosen = [read_index(te, te.at(xs[1], indices, *head, k), size) for k, size in enumerate(sizes)]
            return te.at(xs[0], x, *index[: self.batch_dims], *chosen, *tail)

        return [tensor(te, infer_types(self, tuple(types))[0], element, self.name)]

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show whole and partial positions, batches, a single one, none."""
        for batch, x, indices in (
            (0, (3, 3), (5, 2)),
            (0, (3, 3, 4), (2, 2, 2)),
            (0, (3, 4), (1,)),
            (1, (2, 4, 3), (2, 5, 1)),
            (2, (2, 3, 4, 5), (2, 3, 1)),
            (0, (3, 2), (0, 1)),
        ):
            types = (TensorType(x), TensorType(indices, DType.I64))
            count = indices[-1]
            yield Example(cls(batch), types, draw_indices(types, 1, min(x[batch : batch + count])))


def check_positions(name: str, batch: int, x: TensorType, indices: TensorType) -> int:
    """Check an operand of positions and give how many axes of x one names; raises `ShapeError`."""
    if not 0 <= batch < min(max(indices.rank, 1), max(x.rank, 1)) or indices.rank == 0 or x.rank == 0:
        raise ShapeError(f"{name}: batch_dims {batch} does not fit x : {x} and indices {indices}")
    (count,) = fixed(name, indices.shape[-1:])
    if not 1 <= count <= x.rank - batch or indices.shape[:batch] != x.shape[:batch]:
        raise ShapeError(f"{name}: indices {indices} hold no positions in x : {x} (batch_dims={batch})")
    check_indices(name, indices, x.shape[batch : batch + count])
    return count


# ONNX


@onnx("Gather")
def _gather(node: ForeignNode, x: Value, indices: Value) -> Value:
    return call(Gather(normal_axis(node.op_type, node.attr("axis", 0), x.type.rank)), x, indices)


@onnx("GatherElements")
def _gather_elements(node: ForeignNode, x: Value, indices: Value) -> Value:
    return call(GatherElements(normal_axis(node.op_type, node.attr("axis", 0), x.type.rank)), x, indices)


@onnx("GatherND")
def _gather_nd(node: ForeignNode, x: Value, indices: Value) -> Value:
    return call(GatherNd(node.attr("batch_dims", 0)), x, indices)
