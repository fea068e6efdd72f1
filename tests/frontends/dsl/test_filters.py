"""The classical filters against plain loops, and what tells correlation from convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cnnc.frontends.dsl import (
    Network,
    Tensor,
    box,
    convolve,
    correlate,
    gaussian,
    gaussian_kernel,
    load_network,
    network,
    prewitt,
    sharpen,
    sobel,
)
from cnnc.ir.interp import evaluate

SOBEL_X = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
PREWITT_X = np.array([[-1, 0, 1], [-1, 0, 1], [-1, 0, 1]])
SHARPEN = np.array([[-1, -1, -1], [-1, 17, -1], [-1, -1, -1]]) / 9


def filtered(layer: Any, x: np.ndarray) -> np.ndarray:
    """Apply a layer to a picture in float64."""

    @network(x=x.shape[1:])
    def one(x: Tensor) -> Tensor:
        return x >> layer

    net: Network = one(batch=x.shape[0])
    return evaluate(net.graph(), {"x": x}, precise=True)["output"]


def correlated(picture: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate a picture with an odd kernel, zeros outside, by plain loops."""
    result = np.zeros_like(picture)
    centre = np.array(kernel.shape) // 2
    for place in np.ndindex(*picture.shape):
        for tap in np.ndindex(*kernel.shape):
            where = tuple(np.array(place) + np.array(tap) - centre)
            if all(0 <= w < size for w, size in zip(where, picture.shape, strict=True)):
                result[place] += picture[where] * kernel[tap]
    return result


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [
        (box(3), np.full((3, 3), 1 / 9)),
        (gaussian(5, 1.4), gaussian_kernel(5, 1.4)),
        (sharpen, SHARPEN),
        (sobel, SOBEL_X),
        (sobel(axis=-2), SOBEL_X.T),
        (prewitt(), PREWITT_X),
        (prewitt(axis=0), PREWITT_X.T),
        (correlate(np.arange(15).reshape(3, 5)), np.arange(15).reshape(3, 5)),
        (convolve(np.arange(15).reshape(3, 5)), np.arange(15)[::-1].reshape(3, 5)),
    ],
)
def test_a_filter_works_on_each_channel_by_itself(layer: Any, kernel: np.ndarray) -> None:
    x = np.random.default_rng(20).standard_normal((2, 3, 7, 6))
    got = filtered(layer, x)
    for n, c in np.ndindex(2, 3):
        np.testing.assert_allclose(got[n, c], correlated(x[n, c], kernel.astype(float)), rtol=1e-6, atol=1e-6)


def test_convolution_is_numpys_and_correlation_its_mirror() -> None:
    signal, kernel = np.random.default_rng(20).standard_normal(20), np.array([1.0, 2.0, -4.0, 0.5, 0.25])
    x = signal.reshape(1, 1, 20)
    np.testing.assert_allclose(filtered(convolve(kernel), x)[0, 0], np.convolve(signal, kernel, "same"), rtol=1e-12)
    np.testing.assert_allclose(filtered(correlate(kernel), x)[0, 0], np.correlate(signal, kernel, "same"), rtol=1e-12)
    valid = filtered(convolve(kernel, pad="valid"), x)[0, 0]
    np.testing.assert_allclose(valid, np.convolve(signal, kernel, "valid"), rtol=1e-12)


def test_convolution_commutes_and_correlation_does_not() -> None:
    a, b = np.random.default_rng(20).standard_normal((2, 3, 3))
    impulse = np.zeros((1, 1, 9, 9))
    impulse[0, 0, 4, 4] = 1
    np.testing.assert_allclose(
        filtered(convolve(a) >> convolve(b), impulse), filtered(convolve(b) >> convolve(a), impulse), atol=1e-6
    )
    np.testing.assert_allclose(filtered(convolve(a), impulse)[0, 0, 3:6, 3:6], a, atol=1e-6)
    np.testing.assert_allclose(filtered(correlate(a), impulse)[0, 0, 3:6, 3:6], a[::-1, ::-1], atol=1e-6)


def test_a_gaussian_sums_to_one_and_separates() -> None:
    for size, sigma in ((3, 0.5), (5, 1.0), (8, 2.0)):
        kernel, line = gaussian_kernel(size, sigma), gaussian_kernel(size, sigma, rank=1)
        assert kernel.sum() == pytest.approx(1)
        np.testing.assert_allclose(kernel, np.outer(line, line))
        assert line[0] / line[1] == pytest.approx(
            np.exp((((size - 3) / 2) ** 2 - ((size - 1) / 2) ** 2) / (2 * sigma**2))
        )


def test_edges_of_a_step_are_where_it_is(example_path: Callable[[str], str]) -> None:
    step = np.zeros((1, 1, 16, 16))
    step[..., 8:] = 1
    found = load_network(example_path("filters.py:edges"), x=(1, 16, 16))
    edges = evaluate(found.graph(), {"x": step}, precise=True)["output"][0, 0, 5:11, :13]
    assert set(edges.argmax(axis=1)) <= {7, 8}
    np.testing.assert_allclose(edges[:, 3:5], 0, atol=1e-6)
    bank = evaluate(load_network(example_path("filters.py:filters"), x=(1, 16, 16)).graph(), {"x": step}, precise=True)
    inner = (0, 0, slice(2, 14), slice(2, 14))
    np.testing.assert_allclose(bank["sobel_y"][inner], 0, atol=1e-6)
    assert bank["sobel_x"][inner].max() == pytest.approx(4)
    assert bank["prewitt_x"][inner].max() == pytest.approx(3)
    flat = evaluate(load_network(example_path("filters.py:emboss"), x=(1, 16, 16)).graph(), {"x": step}, precise=True)
    np.testing.assert_allclose(flat["correlated"][inner] + flat["convolved"][inner], 2 * step[inner], atol=1e-6)
