"""Einstein summation against numpy and ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import ModelError, UnsupportedError
from tests.ops.onnx_nodes import assert_agrees, imported, one_node, ours

RNG = np.random.default_rng(20240508)

CASES = [
    ("ij,jk->ik", [(3, 4), (4, 5)]),
    ("ij,jk", [(3, 4), (4, 5)]),
    ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
    ("bhid,bhjd->bhij", [(2, 2, 3, 4), (2, 2, 5, 4)]),
    ("bij, bkj -> kbi", [(2, 3, 4), (2, 5, 4)]),
    ("ij->ji", [(3, 4)]),
    ("ij->", [(3, 4)]),
    ("ij->j", [(3, 4)]),
    ("i,j->ij", [(3,), (4,)]),
    ("ij,ij->ij", [(3, 4), (3, 4)]),
    ("ijk,j->i", [(2, 3, 4), (3,)]),
    ("...ij,...jk->...ik", [(2, 6, 3, 4), (2, 6, 4, 5)]),
    ("...ij,jk->...ik", [(2, 6, 3, 4), (4, 5)]),
    ("i...->...", [(3, 2, 4)]),
    ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)]),
    ("nchw,nc->nhw", [(2, 3, 4, 5), (2, 3)]),
    ("i,i->", [(7,), (7,)]),
]


@pytest.mark.parametrize(("equation", "shapes"), CASES, ids=[case[0] for case in CASES])
def test_equals_numpy(equation: str, shapes: list[tuple[int, ...]]) -> None:
    arrays = [RNG.uniform(-1, 1, shape).astype(np.float32) for shape in shapes]
    model = one_node("Einsum", arrays, equation=equation)
    (got,) = ours(model, {f"x{i}": a for i, a in enumerate(arrays)})
    np.testing.assert_allclose(got, np.einsum(equation, *arrays), rtol=1e-5, atol=1e-6)
    assert_agrees("Einsum", arrays, equation=equation)


def test_sizes_of_one_stretch() -> None:
    a, b = RNG.random((3, 1)).astype(np.float32), RNG.random((4, 5)).astype(np.float32)
    (got,) = ours(one_node("Einsum", [a, b], equation="ij,jk->ik"), {"x0": a, "x1": b})
    np.testing.assert_allclose(got, np.broadcast_to(a, (3, 4)) @ b, rtol=1e-6)
    a, b = RNG.random((2, 1, 3, 4)).astype(np.float32), RNG.random((6, 4, 5)).astype(np.float32)
    (got,) = ours(one_node("Einsum", [a, b], equation="...ij,...jk->...ik"), {"x0": a, "x1": b})
    np.testing.assert_allclose(got, a @ b, rtol=1e-6)


@pytest.mark.parametrize("equation", ["ij,jk->iq", "ij,kk", "ij", "i,j->ij", "ij,jk->ii", "ij;jk->ik", "ij,jl,k->i"])
def test_equations_that_mean_nothing(equation: str) -> None:
    model = one_node("Einsum", [np.zeros((3, 4), np.float32), np.zeros((5, 6), np.float32)], equation="ij,kl->ik")
    model.graph.node[0].attribute[0].s = equation.encode()
    with pytest.raises((ModelError, UnsupportedError)):
        imported(model)


def test_sizes_that_contradict() -> None:
    model = one_node("Einsum", [np.zeros((3, 4), np.float32), np.zeros((5, 6), np.float32)], equation="ij,kl->ik")
    model.graph.node[0].attribute[0].s = b"ij,jk->ik"
    with pytest.raises(ModelError, match="axis 'j' has the sizes 4 and 5"):
        imported(model)


def test_diagonals_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="takes a diagonal"):
        imported(one_node("Einsum", [np.zeros((3, 3), np.float32)], equation="ii->i"))
