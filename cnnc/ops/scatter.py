"""Writing at indices that are data.

Negative indices count from the end; where several updates meet, the last one in row-major order stays, or they are
combined.  An index outside x is an error in the reference; compiled code never writes outside y, it drops the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call, infer_types
from cnnc.ir.graph import Value
from cnnc.ir.op import Example, ForeignNode, Op, onnx
from cnnc.ir.types import DType, TensorType, upper_bound
from cnnc.ops.axes import normal_axis
from cnnc.ops.blocked import every, fixed, flat_index, inside, tensor
from cnnc.ops.broadcast import NUMBERS, check_dtypes, widen
from cnnc.ops.compare import Where
from cnnc.ops.gather import Gather, check_elements, check_positions, draw_indices, wrap_indices
from cnnc.ops.numeric import highest, lowest
from cnnc.ops.reshape import reshape
from cnnc.ops.source import Constant, constant

_UFUNCS: dict[str, Any] = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
_REDUCERS = {"add": "sum", "mul": "prod", "max": "max", "min": "min"}
_COMBINERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add": lambda te, a, b: a + b,
    "mul": lambda te, a, b: a * b,
    "max": lambda te, a, b: te.maximum(a, b),
    "min": lambda te, a, b: te.minimum(a, b),
}


@dataclass(frozen=True)
class _Scatter(Op):
    """y = x, but for what updates change."""

    def _check(self, reduction: str, x: TensorType, updates: TensorType) -> None:
        if reduction != "none" and reduction not in _UFUNCS:
            raise ShapeError(f"{self.name}: reduction is none, {', '.join(_UFUNCS)}, not {reduction!r}")
        if x.dtype is not updates.dtype:
            raise ShapeError(f"{self.name}: updates {updates} have another element type than x : {x}; cast one")
        if reduction != "none":
            check_dtypes(self.name, (x,), NUMBERS)

    def _apply(self, reduction: str, x: np.ndarray, where: tuple[Any, ...], updates: np.ndarray) -> np.ndarray:
        y = widen(x).copy()
        if reduction == "none":
            y[where] = updates
        else:
            _UFUNCS[reduction].at(y, where, widen(updates))
        return y.astype(x.dtype, copy=False)

    def _scattered(
        self, te: Any, reduction: str, x: Any, out: TensorType, count: int, match: Any, update: Any
    ) -> Sequence[Any]:
        """Describe y: update r of `count` hits an index where `match(r, index)` holds, with `update(r, index)`."""
        number = te.reduce_axis(count, "update")
        if reduction == "none":

            def last(*index: Any) -> Any:
                hit = te.cast(number, DType.I32)
                return te.max(te.where(match(number, index), hit, te.const(-1, DType.I32)), [number])

            last_type = out.with_dtype(DType.I32)
            winner = tensor(te, last_type, last, f"{self.name}_last")

            def chosen(*index: Any) -> Any:
                found = te.at(winner, last_type, *index)
                return te.where(found >= 0, update(te.index(found), index), te.at(x, out, *index))

            return [tensor(te, out, chosen, self.name)]
        nothing = {"add": 0, "mul": 1, "max": lowest(out.dtype), "min": highest(out.dtype)}[reduction]

        def combined(*index: Any) -> Any:
            value = te.where(match(number, index), update(number, index), te.const(nothing, out.dtype))
            return getattr(te, _REDUCERS[reduction])(value, [number])

        total = tensor(te, out, combined, f"{self.name}_{reduction}")

        def finished(*index: Any) -> Any:
            return _COMBINERS[reduction](te, te.at(x, out, *index), te.at(total, out, *index))

        return [tensor(te, out, finished, self.name)]


@dataclass(frozen=True)
class ScatterElements(_Scatter):
    """y = x, but y[i, .., indices[i, j, ..], ..] = updates[i, j, ..] (or combined with it)."""

    axis: int
    reduction: str = "none"

    def infer(self, x: TensorType, indices: TensorType, updates: TensorType) -> TensorType:
        """Give x's type; updates and indices have one shape, inside x's except along the axis."""
        self._check(self.reduction, x, updates)
        check_elements(self.name, self.axis, x, indices)
        if indices.shape != updates.shape:
            raise ShapeError(f"scatter_elements: indices {indices} and updates {updates} differ in shape")
        return x

    def index_extents(self, x: TensorType, *others: TensorType) -> dict[int, tuple[int, ...]]:
        """Index into the axis."""
        return {1: (upper_bound(x.shape[self.axis]),)}

    def reference(self, x: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
        """Assign in numpy."""
        where: list[Any] = list(np.ix_(*(np.arange(size) for size in indices.shape)))
        where[self.axis] = wrap_indices(self.name, indices, x.shape[self.axis])
        return self._apply(self.reduction, x, tuple(where), updates)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Search, for each element of y, the updates along the axis."""
        x, indices, updates = types
        axis = self.axis
        (size,) = fixed(self.name, x.shape[axis : axis + 1])
        shape = fixed(self.name, indices.shape)

        def match(number: Any, index: Sequence[Any]) -> Any:
            read = te.at(xs[1], indices, *index[:axis], number, *index[axis + 1 :])
            hit = te.index(te.select(read < 0, read + size, read)) == index[axis]
            limits = [
                (i, n) for a, (i, n) in enumerate(zip(index, shape, strict=True)) if a != axis and n != x.shape[a]
            ]
            return te.where(inside(te, limits), hit, te.const(False, DType.BOOL)) if limits else hit

        def update(number: Any, index: Sequence[Any]) -> Any:
            return te.at(xs[2], updates, *index[:axis], number, *index[axis + 1 :])

        out = infer_types(self, tuple(types))[0]
        return self._scattered(te, self.reduction, xs[0], out, shape[axis], match, update)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show every axis, fewer updates than elements, several on one element, every reduction, no updates."""
        for reduction in ("none", *_UFUNCS):
            for axis, x, shape in ((0, (3, 4), (2, 4)), (1, (3, 4), (2, 6)), (0, (4,), (0,))):
                for dtype in (DType.F32, DType.I64):
                    types = (TensorType(x, dtype), TensorType(shape, DType.I64), TensorType(shape, dtype))
                    yield Example(cls(axis, reduction), types, draw_indices(types, 1, x[axis]))


@dataclass(frozen=True)
class ScatterNd(_Scatter):
    """y = x, but y[indices[i.., :].., c..] = updates[i.., c..] (or combined with it)."""

    reduction: str = "none"

    def infer(self, x: TensorType, indices: TensorType, updates: TensorType) -> TensorType:
        """Give x's type; updates have the indices' leading axes, then those of x that positions leave over."""
        self._check(self.reduction, x, updates)
        count = check_positions(self.name, 0, x, indices)
        wanted = (*indices.shape[:-1], *x.shape[count:])
        if updates.shape != wanted:
            raise ShapeError(
                f"scatter_nd: updates {updates} must be {updates.with_shape(wanted)} for {indices} and {x}"
            )
        return x

    def index_extents(self, x: TensorType, indices: TensorType, updates: TensorType) -> dict[int, tuple[int, ...]]:
        """Index into the leading axes."""
        return {1: tuple(map(upper_bound, x.shape[: upper_bound(indices.shape[-1])]))}

    def reference(self, x: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
        """Assign in numpy."""
        where = [wrap_indices(self.name, indices[..., k], x.shape[k]) for k in range(indices.shape[-1])]
        return self._apply(self.reduction, x, tuple(where), updates)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Search, for each element of y, all updates."""
        x, indices, updates = types
        many = fixed(self.name, indices.shape[:-1])
        (count,) = fixed(self.name, indices.shape[-1:])
        sizes = fixed(self.name, x.shape[:count])

        def position(number: Any) -> list[Any]:
            return [
                te.floormod(te.floordiv(number, math.prod(many[axis + 1 :])), size) if size > 1 else 0
                for axis, size in enumerate(many)
            ]

        def match(number: Any, index: Sequence[Any]) -> Any:
            reads = [te.at(xs[1], indices, *position(number), k) for k in range(count)]
            wrapped = [te.index(te.select(r < 0, r + size, r)) for r, size in zip(reads, sizes, strict=True)]
            return every(te, [w == i for w, i in zip(wrapped, index[:count], strict=True)])

        def update(number: Any, index: Sequence[Any]) -> Any:
            return te.at(xs[2], updates, *position(number), *index[count:])

        out = infer_types(self, tuple(types))[0]
        return self._scattered(te, self.reduction, xs[0], out, math.prod(many), match, update)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show whole and partial positions, several updates on one element, every reduction, no updates."""
        for reduction in ("none", *_UFUNCS):
            for x, shape in (((4, 3), (5, 2)), ((4, 4, 3), (2, 3, 2)), ((4, 3), (1,)), ((4,), (0, 1))):
                types = (TensorType(x), TensorType(shape, DType.I64), TensorType((*shape[:-1], *x[shape[-1] :])))
                yield Example(cls(reduction), types, draw_indices(types, 1, min(x[: shape[-1]])))


# ONNX


@onnx("ScatterElements", "Scatter")
def _scatter_elements(node: ForeignNode, x: Value, indices: Value, updates: Value) -> Value:
    axis = normal_axis(node.op_type, node.attr("axis", 0), x.type.rank)
    return call(ScatterElements(axis, node.attr("reduction", "none")), x, indices, updates)


@onnx("ScatterND")
def _scatter_nd(node: ForeignNode, x: Value, indices: Value, updates: Value) -> Value:
    y = call(ScatterNd(node.attr("reduction", "none")), x, indices, updates)
    if isinstance(indices.op, Constant) and node.attr("reduction", "none") == "none" and x.type.is_static:
        return _scatter_known(x, indices.op.value.array, updates)
    return y


def _scatter_known(x: Value, indices: np.ndarray, updates: Value) -> Value:
    """Scatter at known positions: choose for each element of y between x and one update.

    y = where(hit, updates[last], x), with tables `hit` and `last` made here: nothing is searched at run time.
    """
    count = indices.shape[-1]
    many = math.prod(indices.shape[:-1])
    head = x.type.static_shape[:count]
    if many == 0 or x.type.elements == 0:
        return x
    positions = [wrap_indices("scatter_nd", indices[..., k], size).ravel() for k, size in enumerate(head)]
    last = np.full(math.prod(head), -1, np.int64)
    last[flat_index(positions, head)] = np.arange(many)
    rest = x.type.static_shape[count:]
    hit = constant((last >= 0).reshape(head + (1,) * len(rest)))
    rows = reshape(updates, (many, *rest))
    return call(Where(), hit, call(Gather(0), rows, constant(np.maximum(last, 0).reshape(head))), x)
