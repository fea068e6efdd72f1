"""The classical filters of image processing: fixed kernels, each channel by itself.

Correlation slides the kernel as it stands; convolution flips it along every axis first (Gonzalez and Woods,
*Digital Image Processing*, section 3.4).  Symmetric kernels, such as Gaussian and box, are the same in both.
"""

from __future__ import annotations

import math

import numpy as np

from cnnc.frontends.dsl.layer import Site, layer
from cnnc.frontends.dsl.options import Padding, read_pad
from cnnc.frontends.dsl.tensor import Tensor
from cnnc.ops.conv import Conv
from cnnc.ops.source import constant

_DIFFERENCE = np.array([-1.0, 0.0, 1.0])


@layer
def correlate(at: Site, x: Tensor, kernel: np.ndarray, *, pad: Padding = "same", name: str = "") -> Tensor:
    """Slide a kernel over each channel of x[N,C,...] as it stands; `kernel` has an axis for each spatial one."""
    return _correlate(at, x, np.asarray(kernel), pad)


@layer
def convolve(at: Site, x: Tensor, kernel: np.ndarray, *, pad: Padding = "same", name: str = "") -> Tensor:
    """Slide a kernel, flipped along every axis, over each channel of x[N,C,...]: convolution proper."""
    return _correlate(at, x, np.flip(np.asarray(kernel)), pad)


@layer
def box(at: Site, x: Tensor, size: int = 3, *, pad: Padding = "same", name: str = "") -> Tensor:
    """Blur by the mean of size x size neighbours."""
    return _correlate(at, x, box_kernel(size, x.rank - 2), pad)


@layer
def gaussian(
    at: Site, x: Tensor, size: int = 5, sigma: float = 1.0, *, pad: Padding = "same", name: str = ""
) -> Tensor:
    """Blur by a Gaussian of standard deviation `sigma`, cut off at size x size."""
    return _correlate(at, x, gaussian_kernel(size, sigma, x.rank - 2), pad)


@layer
def sharpen(at: Site, x: Tensor, amount: float = 1.0, *, pad: Padding = "same", name: str = "") -> Tensor:
    """Add `amount` times what differs from the mean of the 3x3 neighbours (amount 1: twice the centre less the box)."""
    blurred = box_kernel(3, x.rank - 2)
    centre = np.zeros_like(blurred)
    centre[(1,) * centre.ndim] = 1.0
    return _correlate(at, x, centre + amount * (centre - blurred), pad)


@layer
def sobel(at: Site, x: Tensor, axis: int = -1, *, pad: Padding = "same", name: str = "") -> Tensor:
    """Correlate with Sobel's kernel: the difference along an axis (-1: left to right), smoothed 1 2 1 across it."""
    return _correlate(at, x, _edge_kernel(at, x, axis, np.array([1.0, 2.0, 1.0])), pad)


@layer
def prewitt(at: Site, x: Tensor, axis: int = -1, *, pad: Padding = "same", name: str = "") -> Tensor:
    """Correlate with Prewitt's kernel: the difference along an axis (-1: left to right), smoothed 1 1 1 across it."""
    return _correlate(at, x, _edge_kernel(at, x, axis, np.array([1.0, 1.0, 1.0])), pad)


def box_kernel(size: int, rank: int = 2) -> np.ndarray:
    """Give the kernel of a mean: all entries 1 / size**rank."""
    return np.full((size,) * rank, 1 / size**rank)


def gaussian_kernel(size: int, sigma: float, rank: int = 2) -> np.ndarray:
    """Give a Gaussian sampled at the pixels and scaled to sum 1."""
    steps = np.arange(size) - (size - 1) / 2
    bell = np.exp(-(steps**2) / (2 * sigma**2))
    return _outer([bell / bell.sum()] * rank)


def _edge_kernel(at: Site, x: Tensor, axis: int, smooth: np.ndarray) -> np.ndarray:
    rank = x.rank - 2
    if rank < 1 or not -rank <= axis < rank:
        raise at.error(f"wants one of {max(rank, 0)} spatial axes of {x.type}, got {axis}")
    return _outer([_DIFFERENCE if i == axis % rank else smooth for i in range(rank)])


def _outer(vectors: list[np.ndarray]) -> np.ndarray:
    kernel = np.ones(())
    for vector in vectors:
        kernel = np.multiply.outer(kernel, vector)
    return kernel


def _correlate(at: Site, x: Tensor, kernel: np.ndarray, pad: Padding) -> Tensor:
    if x.rank < 3 or kernel.ndim != x.rank - 2 or math.prod(kernel.shape) < 1:
        raise at.error(f"wants a kernel with an axis for each spatial one of {x.type}, got {kernel.shape}")
    ones = (1,) * kernel.ndim
    weight = np.broadcast_to(kernel, (x.channels, 1, *kernel.shape))
    op = Conv(ones, read_pad(at, pad, x, kernel.shape, ones, ones), ones, groups=x.channels)
    return at.call(op, x, constant(np.ascontiguousarray(weight), x.dtype))
