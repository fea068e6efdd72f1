"""Softmax kernels against float64: lengths beside every vector, infinities, NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu import softmax
from cnnc.backends.cpu.softmax import SoftmaxParams, SoftmaxShape
from cnnc.backends.lower.body import plain_body
from cnnc.ops.softmax import Softmax


def run(call_kernel: Any, x: np.ndarray, rows: int = 2, lanes: int = 8, pieces: int = 1) -> np.ndarray:
    from tvm import te

    shape = SoftmaxShape(x.shape[:-1], x.shape[-1], lanes)
    body = plain_body(
        (x.shape,), x.shape, apply=lambda anchor: te.compute(anchor.shape, lambda *i: anchor(*i) * 2.0, name="doubled")
    )
    return np.asarray(call_kernel(softmax.build(shape, SoftmaxParams(rows), body), [x], x.shape, pieces)) / 2


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("shape", [(5, 197), (2, 3, 7), (1000,), (9, 1), (4, 8), (3, 24), (2, 1, 33)])
def test_sizes(call_kernel: Any, shape: tuple[int, ...], lanes: int) -> None:
    x = (np.random.default_rng(4).standard_normal(shape) * 5).astype(np.float32)
    got = run(call_kernel, x, lanes=lanes, pieces=2)
    np.testing.assert_allclose(got, Softmax(-1).reference(x.astype(np.float64)), rtol=1e-5, atol=1e-30)


def test_large_numbers_infinities_and_nan(call_kernel: Any) -> None:
    x = (np.random.default_rng(4).standard_normal((8, 21)) * 200).astype(np.float32)
    x[1, 3] = x[2, 20] = np.nan
    x[3, :] = -np.inf
    x[4, 2] = x[5, 19] = np.inf
    x[6, :20] = -np.inf
    with np.errstate(invalid="ignore"):
        wanted = Softmax(-1).reference(x.astype(np.float64))
    assert np.isnan(wanted[1:6]).all()
    np.testing.assert_allclose(run(call_kernel, x), wanted, rtol=1e-5, atol=1e-37)
