"""Winograd's matrices, exactly, and what the transformed weights of a convolution may be."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ops import Conv, WinogradWeight, constant, graph_input
from cnnc.ops.winograd import POINTS, spatial_weight, transform


@pytest.mark.parametrize("tile", POINTS)
def test_the_matrices_filter_exactly(rng: np.random.Generator, tile: int) -> None:
    matrices = transform(tile)
    w = [Fraction(int(v)) for v in rng.integers(-9, 10, 3)]
    x = [Fraction(int(v)) for v in rng.integers(-9, 10, tile + 2)]
    u = [sum((a * b for a, b in zip(row, w, strict=True)), Fraction(0)) for row in matrices.weight]
    v = [sum((a * b for a, b in zip(row, x, strict=True)), Fraction(0)) for row in matrices.data]
    products = [a * b for a, b in zip(u, v, strict=True)]
    y = [sum((a * b for a, b in zip(row, products, strict=True)), Fraction(0)) for row in matrices.output]
    assert y == [sum((x[i + k] * w[k] for k in range(3)), Fraction(0)) for i in range(tile)]


@pytest.mark.parametrize("tile", POINTS)
def test_data_and_output_matrices_are_exact_in_float32(tile: int) -> None:
    for row in (*transform(tile).data, *transform(tile).output):
        assert [Fraction(float(np.float32(float(c)))) for c in row] == list(row)


@pytest.mark.parametrize("tile", POINTS)
def test_transformed_weights_come_back(rng: np.random.Generator, tile: int) -> None:
    w = rng.standard_normal((5, 3, 3, 3))
    np.testing.assert_allclose(spatial_weight(WinogradWeight(tile).reference(w), tile), w, rtol=0, atol=1e-13)


def test_only_3x3_weights_of_known_tiles_are_transformed() -> None:
    with pytest.raises(ShapeError, match="must have 3x3 kernels"):
        call(WinogradWeight(4), constant(np.zeros((4, 4, 5, 5), np.float32)))
    with pytest.raises(ShapeError, match="tile=3 is not known; use one of 2, 4"):
        call(WinogradWeight(3), constant(np.zeros((4, 4, 3, 3), np.float32)))


def test_winograd_convolutions_take_transformed_weights_and_stride_1() -> None:
    x = graph_input("x", (1, 4, 9, 9))
    u = call(WinogradWeight(4), constant(np.zeros((4, 4, 3, 3), np.float32)))
    op = Conv((1, 1), (1, 1, 1, 1), (1, 1), algorithm="winograd4")
    assert call(op, x, u).shape == (1, 4, 9, 9)
    with pytest.raises(ShapeError, match=r"transformed by winograd_weight\{tile=4\}, 6x6"):
        call(op, x, constant(np.zeros((4, 4, 3, 3), np.float32)))
    with pytest.raises(ShapeError, match="takes stride, dilation and groups of 1"):
        call(Conv((2, 2), (1, 1, 1, 1), (1, 1), algorithm="winograd4"), x, u)


def test_flops_are_those_of_the_convolution() -> None:
    x, w = graph_input("x", (1, 4, 9, 9)), constant(np.zeros((8, 4, 3, 3), np.float32))
    direct = Conv((1, 1), (1, 1, 1, 1), (1, 1))
    fast = Conv((1, 1), (1, 1, 1, 1), (1, 1), algorithm="winograd2")
    assert fast.flops(x.type, call(WinogradWeight(2), w).type) == direct.flops(x.type, w.type)
