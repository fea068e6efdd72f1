"""Normalisations: numbers against PyTorch and ONNX Runtime, and everything they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from cnnc.errors import CnncError, ModelError, ShapeError, UnsupportedError
from cnnc.ir.build import infer_types
from cnnc.ir.graph import Graph, Value
from cnnc.ir.interp import run
from cnnc.ir.layout import Layout
from cnnc.ir.op import ONNX_READERS, Op
from cnnc.ir.types import DType, TensorType
from cnnc.ops.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, LpNormalize, RmsNorm
from cnnc.ops.source import graph_input
from tests.ops.onnx_nodes import assert_agrees, imported, one_node, ours

torch = pytest.importorskip("torch")
functional = torch.nn.functional


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check(got: np.ndarray, wanted: torch.Tensor) -> None:
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 5), (2, 6, 4, 3), (1, 6, 2, 3, 2)])
def test_equals_pytorch(shape: tuple[int, ...]) -> None:
    x = normal(1, *shape) * 3 + 1
    gamma, beta, mean = (normal(seed, 6) for seed in (2, 3, 4))
    var = np.abs(normal(5, 6)) + 0.1
    t = [torch.from_numpy(a) for a in (x, gamma, beta, mean, var)]
    check(
        BatchNorm(1e-3).reference(x, gamma, beta, mean, var),
        functional.batch_norm(t[0], t[3], t[4], t[1], t[2], eps=1e-3),
    )
    check(GroupNorm(3, 1e-3).reference(x, gamma, beta), functional.group_norm(t[0], 3, t[1], t[2], 1e-3))
    if len(shape) > 2:
        wanted = functional.instance_norm(t[0], weight=t[1], bias=t[2], eps=1e-3)
        check(InstanceNorm(1e-3).reference(x, gamma, beta), wanted)
    weight, bias = normal(6, *shape[1:]), normal(7, *shape[1:])
    tw, tb = torch.from_numpy(weight), torch.from_numpy(bias)
    check(LayerNorm(1, 1e-4).reference(x, weight, bias), functional.layer_norm(t[0], shape[1:], tw, tb, 1e-4))
    check(RmsNorm(1, 1e-4).reference(x, weight), functional.rms_norm(t[0], list(shape[1:]), tw, 1e-4))
    for p in (1, 2):
        check(LpNormalize(1, p).reference(x), functional.normalize(t[0], p, 1))


def test_negative_variance_gives_nan() -> None:
    one = np.ones(1, np.float32)
    y = BatchNorm().reference(np.ones((1, 1, 2), np.float32), one, one, one, -one)
    assert np.isnan(y).all()


def test_large_mean_does_not_cancel() -> None:
    """Variance in two passes: the mean of squares minus the square of the mean would be 0 or negative here."""
    x = (normal(8, 1, 64) * 0.1 + 1000).astype(np.float32)
    wanted = functional.layer_norm(torch.from_numpy(x.astype(np.float64)), [64])
    np.testing.assert_allclose(LayerNorm(1).reference(x, np.ones(64, np.float32)), wanted.numpy(), atol=2e-3)


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_batch_normalization_as_onnxruntime(opset: int) -> None:
    arrays = [normal(1, 2, 3, 4, 5), normal(2, 3), normal(3, 3), normal(4, 3), np.abs(normal(5, 3))]
    assert_agrees("BatchNormalization", arrays, opset=opset, epsilon=1e-3)


@pytest.mark.parametrize("outputs", [1, 3])
def test_batch_normalization_in_training(outputs: int) -> None:
    arrays = [normal(1, 4, 3, 5), normal(2, 3), normal(3, 3), normal(4, 3), np.abs(normal(5, 3))]
    wanted = onnx_reference(
        one_node("BatchNormalization", arrays, opset=15, outputs=outputs, training_mode=1, momentum=0.7), arrays
    )
    got = ours_of(
        one_node("BatchNormalization", arrays, opset=15, outputs=outputs, training_mode=1, momentum=0.7), arrays
    )
    for mine, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def onnx_reference(model: Any, arrays: list[np.ndarray]) -> list[np.ndarray]:
    return list(ReferenceEvaluator(model).run(None, {f"x{i}": a for i, a in enumerate(arrays)}))


def ours_of(model: Any, arrays: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    return ours(model, {f"x{i}": a for i, a in enumerate(arrays)})


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("axis", [-1, 1, 2, -3])
def test_layer_normalization_as_onnxruntime(axis: int, outputs: int) -> None:
    x = normal(1, 2, 3, 4)
    shape = x.shape[axis:]
    assert_agrees(
        "LayerNormalization", [x, normal(2, *shape), normal(3, *shape)], axis=axis, outputs=outputs, epsilon=1e-3
    )
    assert_agrees("LayerNormalization", [x, normal(2, *shape)], axis=axis, outputs=outputs)


def test_layer_normalization_with_a_scale_that_broadcasts() -> None:
    model = one_node("LayerNormalization", arrays := [normal(1, 2, 3, 4), normal(2, 1, 4), normal(3, 4)], axis=1)
    for mine, other in zip(ours_of(model, arrays), onnx_reference(model, arrays), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, 1])
def test_rms_normalization_as_onnxruntime(axis: int) -> None:
    x = normal(1, 2, 3, 4)
    assert_agrees("RMSNormalization", [x, normal(2, *x.shape[axis:])], opset=23, axis=axis, epsilon=1e-3)


def test_instance_and_lp_as_onnxruntime() -> None:
    assert_agrees("InstanceNormalization", [normal(1, 2, 3, 4, 5), normal(2, 3), normal(3, 3)], epsilon=1e-3)
    for p in (1, 2):
        assert_agrees("LpNormalization", [normal(1, 2, 3, 4)], axis=1, p=p)
    assert_agrees("MeanVarianceNormalization", [normal(1, 2, 3, 4, 5)])
    assert_agrees("MeanVarianceNormalization", [normal(1, 2, 3, 4, 5)], axes=[0, 1, 2, 3])


@dataclass
class GroupNode:
    """A GroupNormalization node for its reader alone: ONNX's checker refuses the one of opset 18."""

    opset: int
    op_type: str = "GroupNormalization"
    name: str = "the_node"
    outputs: int = 1

    def attr(self, name: str, default: Any = None) -> Any:
        return {"num_groups": 3, "epsilon": 1e-3}.get(name, default)

    def const(self, value: Value | None) -> np.ndarray | None:
        return None

    def invalid(self, message: str) -> Exception:
        return ModelError(message)

    def unsupported(self, message: str) -> Exception:
        return UnsupportedError(message)


@pytest.mark.parametrize(("opset", "entries"), [(18, 3), (20, 3), (21, 6)])
def test_group_normalization_in_both_meanings(opset: int, entries: int) -> None:
    """Before opset 21 scale and bias are by group, later by channel (PyTorch is the judge)."""
    arrays = [normal(1, 2, 6, 4, 5), normal(2, entries), normal(3, entries)]
    values = tuple(graph_input(f"x{i}", a.shape) for i, a in enumerate(arrays))
    y = ONNX_READERS["", "GroupNormalization"](GroupNode(opset), *values)
    weights = [torch.from_numpy(np.repeat(v, 6 // entries)) for v in arrays[1:]]
    wanted = functional.group_norm(torch.from_numpy(arrays[0]), 3, *weights, 1e-3)
    check(run(Graph("group_norm", values, (y,)), arrays)[0], wanted)
    with pytest.raises(ModelError, match=r"for each of 3 groups|gamma must be a vector of 6"):
        ONNX_READERS["", "GroupNormalization"](
            GroupNode(opset), values[0], graph_input("v", (4,)), graph_input("w", (4,))
        )


X, V = TensorType((2, 6, 4, 4)), TensorType((6,))


@pytest.mark.parametrize(
    ("op", "types", "message"),
    [
        (BatchNorm(), (X, V, V, V, TensorType((5,))), "batch_norm: var must be a vector of 6, one for each channel"),
        (BatchNorm(), (TensorType((6,)), V, V, V, V), "needs axes N and C"),
        (BatchNorm(), (X, V, V, V, V.with_dtype(DType.F64)), "var is f64 but x is f32"),
        (BatchNorm(), (X.with_layout(Layout("NHWC")), V, V, V, V), "is in layout NHWC"),
        (LayerNorm(4), (X, V), "layer_norm: axis 4"),
        (LayerNorm(3), (X, V), r"gamma : f32\[6\] must have the shape \[4\]"),
        (LayerNorm(3), (X, TensorType((4,)), V), r"beta : f32\[6\] must have the shape \[4\]"),
        (RmsNorm(3), (X, V), r"rms_norm: gamma : f32\[6\] must have the shape \[4\]"),
        (GroupNorm(4), (X, V, V), "group_norm: groups=4 must divide the 6 channels"),
        (GroupNorm(0), (X, V, V), "groups=0 must divide"),
        (InstanceNorm(), (X, V, TensorType((4,))), "beta must be a vector of 6"),
        (LpNormalize(1, 0), (X,), "p=0 must be at least 1"),
        (LpNormalize(9), (X,), "lp_normalize: axis 9"),
    ],
)
def test_refuses(op: Op, types: tuple[TensorType, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        infer_types(op, types)


@pytest.mark.parametrize(
    ("op_type", "shapes", "rest", "error", "message"),
    [
        (
            "BatchNormalization",
            [(2, 3), (3,), (3,), (3,), (3,)],
            {"opset": 7, "spatial": 0},
            UnsupportedError,
            "spatial=0",
        ),
        ("BatchNormalization", [(3,), (3,), (3,), (3,), (3,)], {"opset": 15}, UnsupportedError, "no channel axis"),
        (
            "GroupNormalization",
            [(1, 6, 2), (6,), (6,)],
            {"num_groups": 4, "opset": 21},
            ModelError,
            "must divide the 6",
        ),
        ("LayerNormalization", [(2, 3), (3,)], {"stash_type": 10}, UnsupportedError, "statistics in f16"),
        ("LpNormalization", [(2, 3)], {"p": 3}, ModelError, "p=3 is neither 1 nor 2"),
    ],
)
def test_readers_refuse(
    op_type: str, shapes: list[tuple[int, ...]], rest: dict[str, Any], error: type[CnncError], message: str
) -> None:
    with pytest.raises(error, match=message):
        imported(one_node(op_type, [np.ones(s, np.float32) for s in shapes], **rest))
