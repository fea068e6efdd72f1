"""Norm kernels against float64: rows and pixels, lengths beside every vector, numbers far from zero, pad lanes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu import norm
from cnnc.backends.cpu.norm import NormParams, NormShape
from cnnc.backends.lower.body import plain_body
from cnnc.ops.blocked import channel_layout


def run(call_kernel: Any, shape: NormShape, params: NormParams, pieces: int = 1, offset: float = 0.0) -> np.ndarray:
    from tvm import te

    rng = np.random.default_rng(shape.length * 10 + shape.groups)
    logical = (shape.leading[0], shape.length, *shape.leading[1:]) if shape.blocked else (*shape.leading, shape.length)
    axis = 1 if shape.blocked else -1
    x = (rng.standard_normal(logical) + offset).astype(np.float32)
    gamma, beta = (rng.standard_normal(shape.length).astype(np.float32) for _ in range(2))
    layout = channel_layout(len(logical), shape.lanes) if shape.blocked else None
    given = layout.pack(x) if layout else x
    assert given.shape == shape.output_shape
    halved = plain_body(
        (given.shape, gamma.shape, beta.shape),
        given.shape,
        apply=lambda anchor: te.compute(anchor.shape, lambda *i: anchor(*i) * 0.5, name="halved"),
    )
    got = call_kernel(norm.build(shape, params, halved), [given, gamma, beta], given.shape, pieces)
    wide = x.astype(np.float64)
    wanted = (wide - wide.mean(axis, keepdims=True)) / np.sqrt(wide.var(axis, keepdims=True) + shape.epsilon)
    vector = (-1, *(1,) * (len(logical) - 2)) if shape.blocked else (-1,)
    wanted = 0.5 * (wanted * gamma.reshape(vector) + beta.reshape(vector))
    result = layout.unpack(got, logical) if layout else got
    np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=2e-5 * max(1.0, offset))
    if layout:
        np.testing.assert_array_equal(got, layout.pack(result))
    return np.asarray(got)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize(
    ("leading", "length"), [((197,), 192), ((3, 5), 13), ((1,), 1), ((2,), 7), ((1, 9), 8), ((6,), 33)]
)
def test_rows(call_kernel: Any, leading: tuple[int, ...], length: int, lanes: int) -> None:
    shape = NormShape(leading, length, 1e-5, lanes)
    run(call_kernel, shape, NormParams(min(4, shape.groups), min(4, shape.groups)), pieces=2)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize(("leading", "length"), [((1, 7, 7), 40), ((2, 3, 3), 13), ((2, 2, 1), 5), ((1, 1, 6, 2), 24)])
def test_channels_of_blocked_images(call_kernel: Any, leading: tuple[int, ...], length: int, lanes: int) -> None:
    run(call_kernel, NormShape(leading, length, 1e-6, lanes, blocked=True), NormParams(4, 8), pieces=2)


@pytest.mark.parametrize("params", [NormParams(1, 3), NormParams(3, 6), NormParams(4, 4), NormParams(4, 20)])
def test_any_slices(call_kernel: Any, params: NormParams) -> None:
    run(call_kernel, NormShape((17,), 20, 1e-5), params, pieces=3)


def test_numbers_far_from_zero(call_kernel: Any) -> None:
    """What E[x^2] - E[x]^2 would lose."""
    run(call_kernel, NormShape((9,), 64, 1e-5), NormParams(4, 8), offset=300.0)
