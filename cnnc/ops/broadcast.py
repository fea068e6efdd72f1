"""Numpy broadcasting of shapes, layouts and indices, and the class all elementwise operators derive from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import infer_types
from cnnc.ir.layout import Layout
from cnnc.ir.op import Kind, Op
from cnnc.ir.types import DType, Size, TensorType, format_shape
from cnnc.ops.blocked import tensor
from cnnc.ops.numeric import cast_to

FLOATS = frozenset(d for d in DType if d.is_float)
INTEGERS = frozenset(d for d in DType if d.is_integer)
SIGNED = FLOATS | (INTEGERS - {DType.U8})
NUMBERS = FLOATS | INTEGERS
BOOLS = frozenset({DType.BOOL})
ANY = NUMBERS | BOOLS


def broadcast_shapes(name: str, *shapes: Sequence[Size]) -> tuple[Size, ...]:
    """Give the shape that all shapes broadcast to, aligned at their last axes; a 1 stretches.

    A run-time size meets only itself or 1.  Raises `ShapeError`, naming the operator `name`.
    """
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Size] = []
    for axis in range(-rank, 0):
        sizes = {shape[axis] for shape in shapes if len(shape) >= -axis} - {1}
        if len(sizes) > 1:
            listed = " and ".join(format_shape(shape) for shape in shapes)
            raise ShapeError(
                f"{name}: shapes {listed} do not broadcast: axis {axis} has different sizes, none of them 1"
            )
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)


def broadcast_layouts(name: str, *types: TensorType) -> Layout | None:
    """Give the one layout an elementwise operator computes in.

    All blocked inputs share it.  A plain input may join them if it has the same value for every channel (no blocked
    axis, or one of size 1): anything else would be read outside its bounds in the pad lanes.
    Raises `ShapeError` otherwise.
    """
    layouts = {t.layout for t in types if t.layout is not None}
    if not layouts:
        return None
    layout = layouts.pop()
    rank = layout.rank
    blocked = [axis - rank for axis, letter in enumerate(layout.logical_axes) if layout.block(letter) > 1]
    plain = [t for t in types if t.layout is None]
    misfit = any(t.rank > rank or any(t.rank >= -a and t.shape[a] != 1 for a in blocked) for t in plain)
    if layouts or misfit:
        raise ShapeError(f"{name}: inputs ({', '.join(map(str, types))}) do not share one layout")
    return layout


def check_dtypes(name: str, types: Sequence[TensorType], takes: frozenset[DType]) -> None:
    """Raise `ShapeError` unless all dtypes are the same one of `takes`."""
    for type_ in types:
        if type_.dtype not in takes:
            wanted = ", ".join(d for d in DType if d in takes)
            raise ShapeError(f"{name}: takes elements of {wanted}, not x : {type_}")
    if len({t.dtype for t in types}) > 1:
        raise ShapeError(f"{name}: inputs ({', '.join(map(str, types))}) have different element types; cast one")


def working_dtype(dtype: DType) -> DType:
    """Give the dtype to calculate in: half precision is widened to f32 and rounded once at the end."""
    return DType.F32 if dtype in (DType.F16, DType.BF16) else dtype


def widen(array: np.ndarray) -> np.ndarray:
    """Convert an array to its working dtype."""
    return array.astype(working_dtype(DType.of(array)).numpy, copy=False)


def read_broadcast(te: Any, x: Any, type_: TensorType, index: Sequence[Any]) -> Any:
    """Read the element of `x` that broadcasting puts at a logical index of the result."""
    aligned = index[len(index) - type_.rank :]
    return te.at(x, type_, *(0 if size == 1 else i for size, i in zip(type_.shape, aligned, strict=True)))


class _Elementwise(Op):
    """y[i] = f(a[i], b[i], ...) after broadcasting.

    A subclass gives f twice: `_numpy` on arrays and `_expression` on one element of each input.  Half precision is
    widened to f32 for both and rounded once at the end; `_expression` gets the first input's widened dtype.
    """

    kind = Kind.ELEMENTWISE
    takes: ClassVar[frozenset[DType]] = FLOATS
    gives: ClassVar[DType | None] = None
    """The output's dtype; None: the inputs'."""

    def _numpy(self, *arrays: Any, **_: Any) -> Any:
        raise TypeError(f"{self.name} defines no numpy function")

    def _expression(self, te: Any, dtype: DType, *elements: Any, **_: Any) -> Any:
        raise TypeError(f"{self.name} defines no expression")

    def _check(self, types: Sequence[TensorType]) -> DType:
        """Check the inputs' dtypes and give the output's."""
        check_dtypes(self.name, types, self.takes)
        return self.gives or types[0].dtype

    def _infer(self, *types: TensorType) -> TensorType:
        dtype = self._check(types)
        return TensorType(broadcast_shapes(self.name, *(t.shape for t in types)), dtype)

    def infer_layout(self, *types: TensorType) -> tuple[Layout | None, ...]:
        """Compute in the inputs' common layout."""
        return (broadcast_layouts(self.name, *types),)

    def reference(self, *arrays: np.ndarray) -> np.ndarray:
        """Apply the numpy function."""
        dtype = self._infer(*(TensorType(a.shape, DType.of(a)) for a in arrays)).dtype
        with np.errstate(all="ignore"):
            return np.asarray(self._numpy(*map(widen, arrays))).astype(dtype.numpy, copy=False)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Apply the expression to each element."""
        out = infer_types(self, tuple(types))[0]

        def element(*index: Any) -> Any:
            reads = [read_broadcast(te, x, type_, index) for x, type_ in zip(xs, types, strict=True)]
            wide = [cast_to(te, r, t.dtype, working_dtype(t.dtype)) for r, t in zip(reads, types, strict=True)]
            value = self._expression(te, working_dtype(types[0].dtype), *wide)
            return cast_to(te, value, working_dtype(out.dtype), out.dtype)

        return [tensor(te, out, element, self.name)]
