"""Layers that move numbers and compute none: flatten, reshape, pad, concat, split, slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

from cnnc.errors import ModelError, ShapeError
from cnnc.frontends.dsl.layer import Branches, Function, Site, as_function, layer
from cnnc.frontends.dsl.lines import trace
from cnnc.frontends.dsl.options import axis_of
from cnnc.frontends.dsl.tensor import Tensor, apply, apply_all
from cnnc.ir.types import Size, format_shape, product
from cnnc.ops.concat import Concat, Split
from cnnc.ops.pad import Pad
from cnnc.ops.reshape import Reshape, Transpose
from cnnc.ops.slice import Slice


@layer
def flatten(at: Site, x: Tensor, start: int = 1, *, name: str = "") -> Tensor:
    """Merge all axes from `start` on into one: [N,C,H,W] -> [N,C*H*W]."""
    start = axis_of(at, x, start)
    return at.call(Reshape((*x.shape[:start], product(x.shape[start:]))), x)


@layer
def reshape(at: Site, x: Tensor, *shape: Size, name: str = "") -> Tensor:
    """Give the numbers another shape, the batch aside: `reshape(7, 7, 30)` makes [N,7,7,30]; one size may be -1."""
    rest, head = list(shape), x.shape[:1]
    if rest.count(-1) == 1:
        known, total = product(size for size in rest if size != -1), product(x.shape[1:])
        if not isinstance(known, int) or not isinstance(total, int) or known < 1 or total % known:
            raise at.error(f"wants a shape of as many elements as {x.type}, got {format_shape((*head, *shape))}")
        rest[rest.index(-1)] = total // known
    return at.call(Reshape((*head, *rest)), x)


@layer
def transpose(at: Site, x: Tensor, *order: int, name: str = "") -> Tensor:
    """Put the axes in another order: `transpose(0, 2, 3, 1)` makes NHWC of NCHW."""
    return at.call(Transpose(tuple(axis_of(at, x, axis) for axis in order)), x)


@layer
def pad(
    at: Site, x: Tensor, widths: int | tuple[int, ...], mode: str = "constant", *, value: float = 0.0, name: str = ""
) -> Tensor:
    """Pad the spatial axes: one width for all, one for each, or (begin..., end...); negative widths crop.

    Modes: "constant" (with `value`), "reflect", "edge", "wrap".
    """
    rank = x.rank - 2
    all_widths = widths if isinstance(widths, tuple) else (widths,) * rank
    if len(all_widths) == rank:
        all_widths *= 2
    if rank < 1 or len(all_widths) != 2 * rank:
        raise at.error(f"wants x[N,C,...] and 1, {rank} or {2 * rank} widths, got {x.type} and {widths}")
    pads = (0, 0, *all_widths[:rank], 0, 0, *all_widths[rank:])
    return at.call(Pad(pads, mode, float(value)), x)


@overload
def concat(first: Tensor, *others: Tensor, axis: int = 1) -> Tensor: ...


@overload
def concat(first: Function, *others: Function, axis: int = 1) -> Branches: ...


def concat(first: Any, *others: Any, axis: int = 1) -> Any:
    """Join tensors along an axis, the channels by default; of layers, make the layer that joins their outputs.

    `concat(a, b)` of tensors is a tensor; `x >> concat(conv(8, 1), conv(8, 3, pad=1))` runs branches side by side.
    """
    parts = (first, *others)
    if all(isinstance(part, Tensor) for part in parts):
        rank = first.rank
        if not -rank <= axis < rank:
            raise ShapeError(f"concat: wants an axis of {first.type}, got {axis}{trace()}")
        return apply(Concat(axis % rank), *parts)
    if any(isinstance(part, Tensor) for part in parts):
        raise ModelError(f"concat: joins tensors or layers, not both together: {parts}{trace()}")
    join: Callable[..., Tensor] = lambda *tensors: concat(*tensors, axis=axis)
    return Branches(tuple(as_function(part) for part in parts), join)


def split(x: Tensor, sizes: int | Sequence[int], axis: int = 1) -> tuple[Tensor, ...]:
    """Cut a tensor along an axis: into that many equal parts, or into parts of these sizes."""
    total = x.shape[axis] if -x.rank <= axis < x.rank else None
    if not isinstance(total, int):
        raise ShapeError(f"split: wants an axis of {x.type} of a size known now, got {axis}{trace()}")
    if not isinstance(sizes, int):
        return apply_all(Split(axis % x.rank, tuple(sizes)), x)
    if sizes < 1 or total % sizes:
        raise ShapeError(f"split: wants a number of parts that divides {total}, got {sizes}{trace()}")
    return apply_all(Split(axis % x.rank, (total // sizes,) * sizes), x)


@layer
def crop(at: Site, x: Tensor, axis: int, start: int, stop: int, *, name: str = "") -> Tensor:
    """Take the positions from `start` to before `stop` along an axis."""
    axis = axis_of(at, x, axis)
    starts, sizes = [0] * x.rank, list(x.shape)
    starts[axis], sizes[axis] = start, stop - start
    return at.call(Slice(tuple(starts), tuple(sizes), (1,) * x.rank), x)
