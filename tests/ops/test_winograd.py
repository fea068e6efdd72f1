"""Winograd's matrices, exactly, and what the transformed weights of a convolution may be."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ops import Conv, WinogradWeight, constant, graph_input
from cnnc.ops.winograd import TILES, is_supported, spatial_kernel, spatial_matrices, transform

AXES = [(tile, k, s) for tile in TILES for k in range(1, 8) for s in (1, 2) if is_supported(tile, k, s)]


def product(matrix: tuple[tuple[Fraction, ...], ...], vector: list[Fraction]) -> list[Fraction]:
    return [sum((a * b for a, b in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]


def test_what_is_supported() -> None:
    def supported(tile: int, stride: int) -> list[int]:
        return [k for t, k, s in AXES if (t, s) == (tile, stride)]

    assert supported(2, 1) == [1, 2, 3, 4, 5, 7]
    assert supported(4, 1) == [1, 2, 3, 5]
    assert supported(6, 1) == [1, 3]
    assert supported(2, 2) == [1, 3, 4, 5, 6, 7]
    assert supported(4, 2) == [1, 3, 4, 5, 6]
    assert supported(6, 2) == [1, 6]


@pytest.mark.parametrize(("tile", "kernel", "stride"), AXES)
def test_the_matrices_filter_exactly(rng: np.random.Generator, tile: int, kernel: int, stride: int) -> None:
    axis = transform(tile, kernel, stride)
    assert axis.tile == (1 if kernel == 1 else tile)
    w = [Fraction(int(v)) for v in rng.integers(-9, 10, kernel)]
    x = [Fraction(int(v)) for v in rng.integers(-9, 10, axis.inputs)]
    u = product(axis.weight, w)
    u += u[-1:] * (axis.positions - axis.weights)
    products = [a * b for a, b in zip(u, product(axis.data, x), strict=True)]
    wanted = [sum((x[i * stride + k] * w[k] for k in range(kernel)), Fraction(0)) for i in range(axis.tile)]
    assert product(axis.output, products) == wanted


@pytest.mark.parametrize(("tile", "kernel", "stride"), AXES)
def test_data_and_output_matrices_are_exact_in_float32(tile: int, kernel: int, stride: int) -> None:
    for row in (*transform(tile, kernel, stride).data, *transform(tile, kernel, stride).output):
        assert [Fraction(float(np.float32(float(c)))) for c in row] == list(row)


@pytest.mark.parametrize(("tile", "kernel", "stride"), AXES)
def test_transformed_weights_come_back(rng: np.random.Generator, tile: int, kernel: int, stride: int) -> None:
    w = rng.standard_normal((5, 3, kernel, 3))
    u = WinogradWeight(tile, (stride, 1)).reference(w)
    assert spatial_kernel(tile, u.shape[2:], (stride, 1)) == (kernel, 3)
    rows, columns = spatial_matrices(u.shape, tile, (stride, 1))
    np.testing.assert_allclose(np.einsum("ra,oiab,sb->oirs", rows, u, columns), w, rtol=0, atol=1e-12)


def test_only_weights_with_matrices_are_transformed() -> None:
    def weight(*kernel: int) -> Value:
        return constant(np.zeros((4, 4, *kernel), np.float32))

    with pytest.raises(ShapeError, match=r"no matrices for kernels of f32\[4,4,6,6\] with stride=\(1, 1\)"):
        call(WinogradWeight(4), weight(6, 6))
    with pytest.raises(ShapeError, match=r"no matrices for kernels of f32\[4,4,3,3\] with stride=\(1, 3\)"):
        call(WinogradWeight(4, (1, 3)), weight(3, 3))
    with pytest.raises(ShapeError, match="tile=3 is not known; use one of 2, 4"):
        call(WinogradWeight(3), weight(3, 3))


def test_winograd_convolutions_take_transformed_weights() -> None:
    x = graph_input("x", (1, 4, 9, 9))
    w = constant(np.zeros((4, 4, 3, 3), np.float32))
    op = Conv((1, 1), (1, 1, 1, 1), (1, 1), algorithm="winograd4")
    assert call(op, x, call(WinogradWeight(4), w)).shape == (1, 4, 9, 9)
    strided = replace(op, stride=(2, 2))
    assert call(strided, x, call(WinogradWeight(4, (2, 2)), w)).shape == (1, 4, 5, 5)
    with pytest.raises(ShapeError, match=r"transformed by winograd_weight\{tile=4,stride=\(1, 1\)\}"):
        call(op, x, w)
    with pytest.raises(ShapeError, match="takes two axes, dilation and groups of 1"):
        call(replace(op, dilation=(2, 2)), x, call(WinogradWeight(4), w))


def test_flops_are_those_of_the_convolution() -> None:
    x, w = graph_input("x", (1, 4, 9, 9)), constant(np.zeros((8, 4, 3, 3), np.float32))
    direct = Conv((1, 1), (1, 1, 1, 1), (1, 1))
    fast = Conv((1, 1), (1, 1, 1, 1), (1, 1), algorithm="winograd2")
    assert fast.flops(x.type, call(WinogradWeight(2), w).type) == direct.flops(x.type, w.type)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), 1), ((5, 5), 1), ((1, 7), 1), ((3, 3), 2), ((5, 3), 2)])
def test_transformed_weights_mean_the_algorithm(tile: int, kernel: tuple[int, int], stride: int) -> None:
    """With any transformed weights, rounded ones too: each tile by the formula, written down index by index."""
    if not all(is_supported(tile, taps, stride) for taps in kernel):
        pytest.skip("there are no matrices")
    rng = np.random.default_rng(tile + stride)
    v, h = (transform(tile, taps, stride) for taps in kernel)
    x = rng.standard_normal((2, 3, 11, 10))
    u = rng.standard_normal((4, 3, v.weights, h.weights))
    op = Conv((stride,) * 2, (1, 2, 0, 1), (1, 1), algorithm=f"winograd{tile}")
    got = op.reference(x, u)
    a, b, c, d = (np.array(m, np.float64) for m in (v.output, v.data, h.output, h.data))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 40), (2, 40)))
    for row in range(0, got.shape[2], v.tile):
        for column in range(0, got.shape[3], h.tile):
            top, left = row * stride, column * stride
            seen = padded[:, :, top : top + v.inputs, left : left + h.inputs]
            y = np.zeros((2, 4, v.tile, h.tile))
            for p in range(v.positions):
                for q in range(h.positions):
                    data = np.einsum("r,ncrs,s->nc", b[p], seen, d[q])
                    product = data @ u[:, :, min(p, v.weights - 1), min(q, h.weights - 1)].T
                    y += product[:, :, None, None] * np.outer(a[:, p], c[:, q])
            inside = got[:, :, row : row + v.tile, column : column + h.tile]
            np.testing.assert_allclose(inside, y[:, :, : inside.shape[2], : inside.shape[3]], rtol=0, atol=1e-9)
