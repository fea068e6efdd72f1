"""How layers read their options: axes, and kernel, stride, dilation and padding of windows."""

from __future__ import annotations

from typing import TypeAlias

from cnnc.frontends.dsl.layer import Site
from cnnc.frontends.dsl.tensor import Tensor

Sizes: TypeAlias = int | tuple[int, ...]
"""One number for every spatial axis, or one for each."""
Padding: TypeAlias = int | tuple[int, ...] | str
"""One number, one for each axis, (begin..., end...) of all axes, "same" or "valid"."""


def check_rank(at: Site, x: Tensor, spatial: int | None = None) -> int:
    """Give the number of spatial axes; raises `ShapeError` where x is not [N, C, ...]."""
    if x.rank < 3:
        raise at.error(f"wants x[N,C,...] with at least one spatial axis, got {x.type}")
    if spatial is not None and x.rank != spatial + 2:
        raise at.error(f"wants {spatial} spatial axes, got {x.type}")
    return x.rank - 2


def per_axis(at: Site, value: Sizes, rank: int, what: str) -> tuple[int, ...]:
    """Give one number for each spatial axis; raises `ShapeError` for another count or no integers."""
    values = value if isinstance(value, tuple) else (value,) * rank
    if len(values) != rank or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise at.error(f"wants {what} as one integer or {rank}, got {value!r}")
    return values


def check_count(at: Site, value: int, what: str) -> int:
    """Give a count back; raises `ShapeError` where it is no integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise at.error(f"wants {what} as an integer of at least 1, got {value!r}")
    return value


def read_pad(
    at: Site, pad: Padding, x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    """Give the padding as (begin..., end...).

    "same" makes ceil(size / stride) outputs; where the padding is odd, the end gets the larger part, as in
    TensorFlow (and in PyTorch, which takes stride 1 only).
    """
    rank = len(kernel)
    if pad == "valid":
        return (0,) * (2 * rank)
    if pad == "same":
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        totals = [_same(at, size, r, s) for size, r, s in zip(x.spatial, reach, stride, strict=True)]
        return (*(total // 2 for total in totals), *(total - total // 2 for total in totals))
    if isinstance(pad, str):
        raise at.error(f'wants pad as numbers, "same" or "valid", got {pad!r}')
    if isinstance(pad, tuple) and len(pad) == 2 * rank:
        return per_axis(at, pad, 2 * rank, "pad")
    return per_axis(at, pad, rank, "pad") * 2


def _same(at: Site, size: object, reach: int, stride: int) -> int:
    if not isinstance(size, int):
        raise at.error(f'wants a size known now for pad="same", got {size}')
    if stride < 1:
        raise at.error(f"wants strides of at least 1, got {stride}")
    return max((-(-size // stride) - 1) * stride + reach - size, 0)


def axis_of(at: Site, x: Tensor, axis: int) -> int:
    """Give an axis counted from the front; raises `ShapeError` where x has no such axis."""
    if not -x.rank <= axis < x.rank:
        raise at.error(f"wants an axis of {x.type}, got {axis}")
    return axis % x.rank
