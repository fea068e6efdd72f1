"""Slicing with steps."""

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
from cnnc.ops.blocked import channel_block, tensor


@dataclass(frozen=True)
class Slice(Op):
    """y[i, j, ...] = x[start_0 + i * step_0, start_1 + j * step_1, ...], sizes many along each axis.

    Steps may be negative.  An axis of run-time size is taken whole.
    """

    starts: tuple[int, ...]
    sizes: tuple[Size, ...]
    steps: tuple[int, ...]
    kind = Kind.INJECTIVE

    def infer(self, x: TensorType) -> TensorType:
        """Give the sizes; every index must be inside x."""
        if not len(self.starts) == len(self.sizes) == len(self.steps) == x.rank:
            raise ShapeError(f"slice: starts, sizes and steps must have {x.rank} entries, one an axis of x : {x}")
        for axis, (start, size, step) in enumerate(zip(self.starts, self.sizes, self.steps, strict=True)):
            whole = x.shape[axis]
            if step == 0:
                raise ShapeError(f"slice: the step of axis {axis} is 0")
            if isinstance(whole, int) and isinstance(size, int):
                last = start + (size - 1) * step
                inside = size == 0 or (size > 0 and 0 <= start < whole and 0 <= last < whole)
            else:
                inside = (start, size, step) == (0, whole, 1)
            if not inside:
                raise ShapeError(
                    f"slice: {size} elements from {start} by {step} leave axis {axis}, of size {whole}, of x : {x}"
                )
        return x.with_shape(self.sizes)

    def infer_layout(self, x: TensorType) -> tuple[Layout | None, ...]:
        """Keep channel blocks where whole ones are taken."""
        if x.layout is not None:
            block = channel_block(self.name, "x", x)
            start, size, step, whole = self.starts[1], self.sizes[1], self.steps[1], x.shape[1]
            to_end = start + size == whole
            if step != 1 or start % block or not (to_end or (isinstance(size, int) and size % block == 0)):
                raise ShapeError(f"slice: channels {start}, {size} many by {step}, cut blocks of x : {x}")
        return (x.layout,)

    def _run_time(self, x: Sequence[int], axis: int) -> int:
        size = self.sizes[axis]
        return size if isinstance(size, int) else x[axis]

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Slice in numpy."""
        index = []
        for axis, (start, step) in enumerate(zip(self.starts, self.steps, strict=True)):
            stop = start + self._run_time(x.shape, axis) * step
            index.append(slice(start, stop if stop >= 0 else None, step))
        taken = x[tuple(index)]
        return taken[tuple(slice(self._run_time(x.shape, axis)) for axis in range(x.ndim))]

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read at start + index * step."""

        def element(*index: Any) -> Any:
            where = [i * step + start for i, start, step in zip(index, self.starts, self.steps, strict=True)]
            return te.at(xs[0], types[0], *where)

        return [tensor(te, infer_types(self, tuple(types))[0], element, self.name)]

    def flops(self, x: TensorType) -> int:
        """No arithmetic."""
        return 0

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show offsets, steps of both signs, nothing taken, 0-d, a run-time batch, channel blocks, other dtypes."""
        x = TensorType((2, 9, 6, 7))
        yield Example(cls((0, 2, 1, 0), (2, 3, 4, 7), (1, 1, 1, 1)), (x,))
        yield Example(cls((1, 8, 0, 6), (2, 3, 3, 7), (-1, -4, 2, -1)), (x,))
        yield Example(cls((0, 0, 0, 0), (2, 9, 0, 7), (1, 1, 1, 1)), (x,))
        yield Example(cls((), (), ()), (TensorType(()),))
        batch = Dim.symbol("n", 3)
        yield Example(cls((0, 1), (batch, 2), (1, 1)), (TensorType((batch, 4)),))
        blocked = x.with_layout(Layout("NCHW4c"))
        yield Example(cls((1, 0, 1, 6), (1, 9, 2, 4), (1, 1, 3, -2)), (blocked,))
        yield Example(cls((0, 4, 0, 0), (2, 4, 6, 7), (1, 1, 1, 1)), (blocked,))
        yield Example(cls((0, 4, 0, 0), (2, 5, 6, 7), (1, 1, 1, 1)), (blocked,))
        for dtype in (DType.F16, DType.I64, DType.BOOL):
            yield Example(cls((1, 2), (2, 2), (1, -2)), (TensorType((3, 4), dtype),))


def slice_axes(
    x: Value, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None, steps: Sequence[int] | None
) -> Value:
    """Slice as Python and ONNX write it: ends exclusive, negative ones from the end, everything clipped to x.

    Raises `ShapeError` for a step of 0, an axis named twice, and lists of different lengths.
    """
    rank = x.type.rank
    chosen = [normal_axis("slice", a, rank) for a in (range(len(starts)) if axes is None else axes)]
    by = [1] * len(starts) if steps is None else list(steps)
    if not len(starts) == len(ends) == len(chosen) == len(by):
        raise ShapeError(
            f"slice: {len(starts)} starts, {len(ends)} ends, {len(chosen)} axes, {len(by)} steps; they must pair up"
        )
    if len(set(chosen)) != len(chosen):
        raise ShapeError(f"slice: axes {list(axes or ())} name one axis twice")
    start_of, size_of, step_of = [0] * rank, list(x.shape), [1] * rank
    for axis, start, end, step in zip(chosen, starts, ends, by, strict=True):
        if step == 0:
            raise ShapeError(f"slice: the step of axis {axis} is 0")
        whole = x.shape[axis]
        if isinstance(whole, int):
            taken = range(whole)[start:end:step]
            start_of[axis], size_of[axis], step_of[axis] = (taken.start if taken else 0), len(taken), taken.step
        elif start != 0 or step != 1 or end < whole.upper:
            raise ShapeError(
                f"slice: axis {axis} of x : {x.type} has a run-time size; it can only be taken whole,"
                f" not {start}:{end}:{step}"
            )
    if size_of == list(x.shape) and not any(start_of) and all(step == 1 for step in step_of):
        return x
    return call(Slice(tuple(start_of), tuple(size_of), tuple(step_of)), x)


# ONNX


@onnx("Slice")
def _slice(
    node: ForeignNode,
    x: Value,
    starts: Value | None = None,
    ends: Value | None = None,
    axes: Value | None = None,
    steps: Value | None = None,
) -> Value:
    if node.opset < 10:
        first, last, chosen = node.attr("starts"), node.attr("ends"), node.attr("axes")
        by = None
    else:
        first, last, chosen, by = (None if v is None else integers(node.const(v)) for v in (starts, ends, axes, steps))
    if first is None or last is None:
        raise node.invalid("starts or ends are missing")
    return slice_axes(x, first, last, chosen, by)
