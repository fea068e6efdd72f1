"""Reshape, transpose, expand, tile and their ONNX forms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cnnc.errors import LimitError, ModelError, ShapeError
from cnnc.ir.build import infer_types
from cnnc.ir.layout import Layout
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.reshape import Expand, Reshape, Tile, Transpose, expand, flatten, reshape, squeeze, unsqueeze
from cnnc.ops.source import graph_input
from tests.ops.kernels import run_compute
from tests.ops.onnx_nodes import assert_agrees, imported, one_node

RNG = np.random.default_rng(20240505)
N = Dim.symbol("n", 8)


def random_reshape(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Group the same prime factors in two ways."""
    factors = rng.choice([1, 2, 2, 3, 5], rng.integers(1, 6)).tolist()
    shapes = []
    for _ in range(2):
        cuts = sorted(rng.integers(0, len(factors) + 1, rng.integers(0, 4)).tolist())
        edges = [0, *cuts, len(factors)]
        shapes.append([int(np.prod(factors[a:b])) for a, b in pairwise(edges)])
        factors = rng.permutation(factors).tolist()
    return shapes[0], shapes[1]


@pytest.mark.parametrize("seed", range(12))
def test_random_reshapes(seed: int) -> None:
    rng = np.random.default_rng([20240505, seed])
    before, after = random_reshape(rng)
    x = rng.random(before).astype(np.float32)
    op = Reshape(tuple(after))
    np.testing.assert_array_equal(op.reference(x), x.reshape(after))
    np.testing.assert_array_equal(run_compute(op, [TensorType(tuple(before))], [x])[0], x.reshape(after))


@pytest.mark.parametrize(
    ("shape", "wanted", "result"),
    [
        ((2, 3, 4), (-1,), (24,)),
        ((2, 3, 4), (4, -1), (4, 6)),
        ((N, 3, 4), (N, -1), (N, 12)),
        ((N, 3, 4), (-1, 12), (N, 12)),
        ((N, 3, 4), (-1, 6), (N * 2, 6)),
        ((N, 4), (2, N, -1), (2, N, 2)),
        ((0, 3), (3, -1), (3, 0)),
        ((1,), (), ()),
    ],
)
def test_minus_one_is_what_is_left(shape: Any, wanted: Any, result: Any) -> None:
    assert reshape(graph_input("x", shape), wanted).shape == result


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((-1, -1), "more than one -1"),
        ((-5, 2), "has the entry -5; only -1 is special"),
        ((5, -1), "does not divide"),
        ((0, -1), "does not divide"),
        ((7, 3), r"x : f32\[2,3,4\] has 24 elements, shape \[7,3\] has 21"),
        ((N, 3), r"has 24 elements, shape \[\{n<=8\},3\] has"),
    ],
)
def test_reshapes_that_do_not_fit(wanted: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        reshape(graph_input("x", (2, 3, 4)), wanted)


def test_counts_are_compared_exactly() -> None:
    # 7 * 2635249153387078912 is 768 modulo 2**64.
    with pytest.raises(ShapeError, match="has 768 elements, shape"):
        reshape(graph_input("x", (768,)), (7, 2635249153387078912))
    with pytest.raises(ModelError, match="7,2635249153387078912"):
        imported(one_node("Reshape", [np.zeros(768, np.float32), np.array([7, 2635249153387078912])], constants=[1]))


@pytest.mark.parametrize(
    ("op", "shape", "named"),
    [
        (Reshape((6,)), (1, 6, 1, 1), "reshape"),
        (Transpose((0, 2, 3, 1)), (1, 6, 2, 2), "transpose"),
        (Expand((2, 6, 2, 2)), (1, 6, 2, 2), "expand"),
    ],
)
def test_blocked_layouts_are_refused(op: Any, shape: tuple[int, ...], named: str) -> None:
    with pytest.raises(ShapeError, match=f"{named}: input 0 is in layout NCHW4c"):
        infer_types(op, (TensorType(shape, DType.F32, Layout("NCHW4c")),))


def test_functions_that_reshape() -> None:
    x = graph_input("x", (N, 1, 4, 1))
    assert flatten(x).shape == (N, 4)
    assert flatten(x, 3).shape == (N * 4, 1)
    assert flatten(x, 0).shape == (1, N * 4)
    assert squeeze(x).shape == (N, 4)
    assert squeeze(x, [-1]).shape == (N, 1, 4)
    assert unsqueeze(x, [0, -1]).shape == (1, N, 1, 4, 1, 1)
    assert expand(x, (3, 1, 5)).shape == (N, 3, 4, 5)
    with pytest.raises(ShapeError, match=r"squeeze: axis 2 of x .* has size 4, not 1"):
        squeeze(x, [2])
    with pytest.raises(ShapeError, match=r"unsqueeze: axes .* name one axis twice"):
        unsqueeze(x, [1, 1])


def test_errors() -> None:
    x = TensorType((2, 3))
    with pytest.raises(ShapeError, match=r"transpose: perm \[0, 0\] is no permutation"):
        infer_types(Transpose((0, 0)), (x,))
    with pytest.raises(ShapeError, match=r"expand: shapes .* do not broadcast"):
        infer_types(Expand((2, 4)), (x,))
    with pytest.raises(ShapeError, match="does not broadcast to"):
        infer_types(Expand((1, 3)), (x,))
    with pytest.raises(ShapeError, match=r"tile: repeats \[2\] must be 2 numbers >= 0"):
        infer_types(Tile((2,)), (x,))
    with pytest.raises(ShapeError, match="tile: repeats"):
        infer_types(Tile((2, -1)), (x,))
    with pytest.raises(LimitError, match="more than 2\\*\\*62 elements"):
        infer_types(Tile((2**31, 2**31)), (x,))


def test_rank_generic_transposes() -> None:
    x = RNG.random((2, 3, 4, 5)).astype(np.float32)
    for _ in range(6):
        perm = tuple(RNG.permutation(4).tolist())
        np.testing.assert_array_equal(Transpose(perm).reference(x), x.transpose(perm))
        np.testing.assert_array_equal(run_compute(Transpose(perm), [TensorType(x.shape)], [x])[0], x.transpose(perm))


@pytest.mark.parametrize(
    ("op_type", "shape", "second", "opset", "attributes"),
    [
        ("Reshape", (2, 3, 4), [0, -1], 13, {}),
        ("Reshape", (2, 3, 4), [4, 0, -1], 13, {}),
        ("Reshape", (0, 3), [3, 0], 14, {"allowzero": 1}),
        ("Flatten", (2, 3, 4), None, 13, {}),
        ("Flatten", (2, 3, 4), None, 13, {"axis": -1}),
        ("Flatten", (2, 3, 4), None, 13, {"axis": 0}),
        ("Flatten", (2, 3, 4), None, 13, {"axis": 3}),
        ("Squeeze", (1, 3, 1), None, 13, {}),
        ("Squeeze", (1, 3, 1), [-1], 13, {}),
        ("Squeeze", (1, 3, 1), None, 11, {"axes": [0]}),
        ("Unsqueeze", (3, 4), [0, -1], 13, {}),
        ("Unsqueeze", (3, 4), None, 11, {"axes": [0, 3]}),
        ("Transpose", (2, 3, 4), None, 13, {}),
        ("Transpose", (2, 3, 4), None, 13, {"perm": [1, 2, 0]}),
        ("Expand", (3, 1), [2, 1, 4], 13, {}),
        ("Expand", (3, 4), [1, 1], 13, {}),
        ("Tile", (2, 3), [2, 3], 13, {}),
        ("Tile", (2, 3), [0, 1], 13, {}),
        ("Identity", (2, 3), None, 13, {}),
    ],
)
def test_onnx(
    op_type: str, shape: Sequence[int], second: list[int] | None, opset: int, attributes: dict[str, Any]
) -> None:
    x = RNG.random(shape).astype(np.float32)
    inputs = [x] if second is None else [x, np.array(second)]
    assert_agrees(op_type, inputs, opset=opset, constants=[1], rtol=0, atol=0, **attributes)


@pytest.mark.parametrize(
    ("op_type", "shape", "second", "attributes"),
    [
        ("Reshape", (2, 3), [0, 0, 0], {}),
        ("Reshape", (2, 3), [-1, -1], {}),
        ("Reshape", (2, 3), [4], {}),
        ("Reshape", (0, 3), [0, -1], {"allowzero": 1}),
        ("Squeeze", (2, 3), [0], {}),
        ("Unsqueeze", (2, 3), [0, 0], {}),
        ("Unsqueeze", (2, 3), [7], {}),
        ("Expand", (2, 3), [4, 3], {}),
        ("Tile", (2, 3), [1], {}),
        ("Tile", (2, 3), [1, -1], {}),
        ("Transpose", (2, 3), None, {"perm": [0, 2]}),
    ],
)
def test_onnx_that_means_nothing(
    op_type: str, shape: Any, second: list[int] | None, attributes: dict[str, Any]
) -> None:
    x = np.zeros(shape, np.float32)
    inputs = [x] if second is None else [x, np.array(second)]

    with pytest.raises(ModelError):
        imported(one_node(op_type, inputs, opset=14, constants=[1], **attributes))
