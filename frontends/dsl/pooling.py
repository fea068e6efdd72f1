"""Pooling: maximum, minimum and average over windows, over everything, or to a given size."""

from __future__ import annotations

from typing import TypeAlias

from cnnc.frontends.dsl.layer import Site, layer
from cnnc.frontends.dsl.options import Padding, Sizes, check_rank, per_axis, read_pad
from cnnc.frontends.dsl.shaping import crop
from cnnc.frontends.dsl.tensor import Tensor
from cnnc.ops.concat import Concat
from cnnc.ops.pool import AveragePool, MaxPool, MinPool
from cnnc.ops.reduce import ReduceMax, ReduceMean

_Window: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@layer
def max_pool(
    at: Site,
    x: Tensor,
    kernel: Sizes,
    *,
    stride: Sizes | None = None,
    pad: Padding = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    name: str = "",
) -> Tensor:
    """Take the maximum of each window; the stride is the kernel's size unless given."""
    return at.call(MaxPool(*_window(at, x, kernel, stride, pad, dilation), ceil_mode), x)


@layer
def min_pool(
    at: Site,
    x: Tensor,
    kernel: Sizes,
    *,
    stride: Sizes | None = None,
    pad: Padding = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    name: str = "",
) -> Tensor:
    """Take the minimum of each window; the stride is the kernel's size unless given."""
    return at.call(MinPool(*_window(at, x, kernel, stride, pad, dilation), ceil_mode), x)


@layer
def avg_pool(
    at: Site,
    x: Tensor,
    kernel: Sizes,
    *,
    stride: Sizes | None = None,
    pad: Padding = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    name: str = "",
) -> Tensor:
    """Take the mean of each window, padding counted as zeros unless `count_include_pad=False`.

    The stride is the kernel's size unless given.
    """
    window = _window(at, x, kernel, stride, pad, 1)
    return at.call(AveragePool(*window, ceil_mode, count_include_pad), x)


@layer
def global_avg_pool(at: Site, x: Tensor, *, name: str = "") -> Tensor:
    """Take the mean over all spatial axes: [N,C,...] -> [N,C,1,...] (Lin et al., 2013, section 3.2)."""
    return at.call(ReduceMean(_spatial_axes(at, x), True), x)


@layer
def global_max_pool(at: Site, x: Tensor, *, name: str = "") -> Tensor:
    """Take the maximum over all spatial axes: [N,C,...] -> [N,C,1,...]."""
    return at.call(ReduceMax(_spatial_axes(at, x), True), x)


@layer
def adaptive_avg_pool(at: Site, x: Tensor, size: Sizes, *, name: str = "") -> Tensor:
    """Take means over windows chosen so that the output has this spatial size.

    Output o covers the inputs floor(o * in / size) to ceil((o + 1) * in / size), as in PyTorch.
    """
    return _adaptive(at, x, size, AveragePool, ReduceMean)


@layer
def adaptive_max_pool(at: Site, x: Tensor, size: Sizes, *, name: str = "") -> Tensor:
    """Take maxima over windows chosen so that the output has this spatial size, as `adaptive_avg_pool` does."""
    return _adaptive(at, x, size, MaxPool, ReduceMax)


def _window(at: Site, x: Tensor, kernel: Sizes, stride: Sizes | None, pad: Padding, dilation: Sizes) -> _Window:
    """Give kernel, stride, pad and dilation as operators take them."""
    rank = check_rank(at, x)
    kernels = per_axis(at, kernel, rank, "kernel")
    strides = kernels if stride is None else per_axis(at, stride, rank, "stride")
    dilations = per_axis(at, dilation, rank, "dilation")
    return kernels, strides, read_pad(at, pad, x, kernels, strides, dilations), dilations


def _spatial_axes(at: Site, x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, 2 + check_rank(at, x)))


def _adaptive(
    at: Site, x: Tensor, size: Sizes, pool: type[AveragePool | MaxPool], reduce: type[ReduceMean | ReduceMax]
) -> Tensor:
    """Pool one axis after the other: means (and maxima) over boxes are those over rows of those over columns."""
    rank = check_rank(at, x)
    sizes = per_axis(at, size, rank, "size")
    inputs = [size for size in x.spatial if isinstance(size, int)]
    if len(inputs) != rank or min(sizes) < 1 or min(inputs) < 1:
        raise at.error(f"wants sizes of at least 1, known now, got {x.type} and size {sizes}")
    if all(i % o == 0 for i, o in zip(inputs, sizes, strict=True)):
        kernel = tuple(i // o for i, o in zip(inputs, sizes, strict=True))
        if max(kernel) == 1:
            return x
        return at.call(pool(kernel, kernel, (0,) * (2 * rank), (1,) * rank), x)
    for axis, (have, wanted) in enumerate(zip(inputs, sizes, strict=True), start=2):
        bins = [(o * have // wanted, -(-(o + 1) * have // wanted)) for o in range(wanted)]
        parts = [at.call(reduce((axis,), True), crop.define(at, x, axis, *ends)) for ends in bins]
        x = at.call(Concat(axis), *parts) if len(parts) > 1 else parts[0]
    return x
