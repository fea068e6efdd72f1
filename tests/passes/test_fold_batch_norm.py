"""fold_batch_norm: into every kind of layer, NaN and infinity as they were, and where it must refuse."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.interp import run
from cnnc.ir.layout import Layout
from cnnc.ir.literal import Literal
from cnnc.ir.rewrite import RewriteLog, recording
from cnnc.ir.text import print_graph
from cnnc.ir.types import DType
from cnnc.ops import (
    Add,
    BatchNorm,
    Constant,
    ConvTranspose,
    Dense,
    Div,
    LayoutTransform,
    Mul,
    Relu,
    Sub,
    constant,
    graph_input,
)
from cnnc.passes.fold_batch_norm import FoldBatchNorm
from tests.passes.graphs import TARGET, batch_norm, check, conv, graph_of, image, operators, weights

FOLD = FoldBatchNorm()


def test_into_conv_golden(rng, golden):
    x = image(1, 3, 6, 6)
    graph = graph_of(batch_norm(rng, conv(x, weights(rng, 4, 3, 3, 3, label="conv.weight"), pad=1)))
    folded = check(FOLD, graph, rng)
    golden("fold_batch_norm", print_graph(graph) + print_graph(folded))
    assert operators(folded) == ["conv"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_into_conv(rng, bias, rank, groups):
    x = image(2, 4, *(7, 5, 6)[:rank])
    w = weights(rng, 6, 4 // groups, *(3, 2, 3)[:rank])
    y = conv(x, w, weights(rng, 6) if bias else None, pad=1, groups=groups)
    assert operators(check(FOLD, graph_of(batch_norm(rng, y)), rng)) == ["conv"]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_into_conv_transpose(rng, groups):
    x = image(2, 4, 5, 6)
    op = ConvTranspose((2, 1), (1, 0, 0, 1), (1, 1), groups, (1, 0))
    y = call(op, x, weights(rng, 4, 12 // groups, 3, 3), weights(rng, 12))
    assert operators(check(FOLD, graph_of(batch_norm(rng, y)), rng)) == ["conv_transpose"]


def test_into_dense(rng):
    y = call(Dense(), image(3, 8), weights(rng, 5, 8))
    assert operators(check(FOLD, graph_of(batch_norm(rng, y)), rng)) == ["dense"]


def test_dense_over_more_axes_has_its_channels_elsewhere(rng):
    y = call(Dense(), image(3, 5, 8), weights(rng, 5, 8))
    assert operators(check(FOLD, graph_of(batch_norm(rng, y)), rng)) == ["dense", "mul", "add"]


def test_across_a_layout_and_with_a_blocked_weight(rng):
    w = call(Constant(Literal(rng.standard_normal((8, 8, 3, 3)).astype(np.float32)), "w", Layout("OIHW4i4o")))
    x = call(LayoutTransform(Layout("NCHW4c")), image(1, 8, 5, 5))
    y = call(LayoutTransform(None), conv(x, w))
    folded = check(FOLD, graph_of(batch_norm(rng, y)), rng)
    assert operators(folded) == ["layout_transform", "conv", "layout_transform"]
    (weight,) = (n for n in folded.nodes if getattr(n.op, "label", "") == "w")
    assert weight.types[0].layout == Layout("OIHW4i4o")


def test_blocked_batch_norm_alone_is_split_in_its_layout(rng):
    x = call(LayoutTransform(Layout("NCHW4c")), image(2, 6, 5, 5))
    folded = check(FOLD, graph_of(call(LayoutTransform(None), batch_norm(rng, x))), rng)
    assert operators(folded) == ["layout_transform", "mul", "add", "layout_transform"]


def scaled(v: Value, c: Value) -> list[Value]:
    return [
        call(Mul(), v, c),
        call(Mul(), c, v),
        call(Add(), v, c),
        call(Add(), c, v),
        call(Sub(), v, c),
        call(Sub(), c, v),
        call(Div(), v, c),
    ]


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1), (1,), (), (1, 1, 1)])
@pytest.mark.parametrize("case", range(7))
def test_scales_and_shifts_of_channels(rng, shape, case):
    y = conv(image(2, 3, 5, 5), weights(rng, 4, 3, 3, 3), weights(rng, 4))
    c = constant((rng.random(shape) + 0.5).astype(np.float32))
    assert operators(check(FOLD, graph_of(scaled(y, c)[case]), rng)) == ["conv"]


@pytest.mark.parametrize(
    "shape", [(5,), (1, 5), (4, 5, 5), (1, 1, 5, 1), (2, 1, 1, 1), (1, 1, 1, 1, 1), (3, 1, 4, 1, 1)]
)
def test_other_constants_stay(rng, shape):
    y = conv(image(2, 3, 7, 7), weights(rng, 4, 3, 3, 3))
    graph = graph_of(call(Add(), y, weights(rng, *shape)))
    assert operators(check(FOLD, graph, rng)) == ["conv", "add"]


def test_a_scale_that_widens_the_output_stays(rng):
    y = conv(image(2, 3, 7, 7), weights(rng, 1, 3, 3, 3))
    assert operators(check(FOLD, graph_of(call(Mul(), y, weights(rng, 4, 1, 1))), rng)) == ["conv", "mul"]


def test_whole_chains_fold(rng):
    y = batch_norm(rng, conv(image(1, 3, 6, 6), weights(rng, 4, 3, 1, 1)))
    y = call(Add(), call(Mul(), y, weights(rng, 4, 1, 1)), weights(rng, 4, 1, 1))
    assert operators(check(FOLD, graph_of(batch_norm(rng, y)), rng)) == ["conv"]


def test_a_layer_with_other_readers_stays(rng):
    y = conv(image(1, 3, 6, 6), weights(rng, 4, 3, 1, 1))
    graph = graph_of(batch_norm(rng, y), call(Relu(), y))
    with recording(RewriteLog()) as log:
        FOLD.run(graph, TARGET)
    assert "the layer's output has other uses" in {m.reason for m in log.missed}
    assert operators(check(FOLD, graph, rng)) == ["conv", "mul", "add", "relu"]


def test_a_layer_that_is_an_output_stays(rng):
    y = conv(image(1, 3, 6, 6), weights(rng, 4, 3, 1, 1))
    assert operators(check(FOLD, graph_of(batch_norm(rng, y), y), rng)) == ["conv", "mul", "add"]


def test_statistics_from_outside_stay(rng):
    x, var = image(2, 4, 3, 3), image(4, label="var")
    y = call(BatchNorm(), x, weights(rng, 4), weights(rng, 4), weights(rng, 4), var)
    assert operators(FOLD.run(graph_of(y), TARGET)) == ["batch_norm"]


def test_weights_from_outside_stay(rng):
    y = conv(image(2, 4, 3, 3), image(4, 4, 1, 1, label="w"))
    assert operators(check(FOLD, graph_of(batch_norm(rng, y)), rng)) == ["conv", "mul", "add"]


def test_negative_variance_is_nan_before_and_after(rng):
    y = batch_norm(rng, conv(image(1, 3, 6, 6), weights(rng, 4, 3, 3, 3), pad=1), var=[1.0, -1.0, 0.5, 2.0])
    folded = check(FOLD, graph_of(y), rng)
    assert operators(folded) == ["conv"]
    (out,) = run(folded, [np.zeros((1, 3, 6, 6), np.float32)])
    assert np.isnan(out[:, 1]).all()
    assert np.isfinite(out[:, [0, 2, 3]]).all()


def test_an_infinite_scale_is_refused(rng):
    y = batch_norm(rng, conv(image(1, 3, 6, 6), weights(rng, 2, 3, 3, 3)), epsilon=0.0, var=[0.0, 1.0])
    graph = graph_of(y)
    assert operators(check(FOLD, graph, rng)) == ["conv", "batch_norm"]


def test_division_by_zero_stays(rng):
    y = conv(image(1, 3, 6, 6), weights(rng, 2, 3, 3, 3))
    graph = graph_of(call(Div(), y, constant(np.zeros((2, 1, 1), np.float32))))
    assert operators(FOLD.run(graph, TARGET)) == ["conv", "div"]


def test_a_weight_that_would_overflow_is_refused(rng):
    y = conv(image(1, 3, 6, 6), constant(np.full((2, 3, 1, 1), 1e30, np.float32)))
    graph = graph_of(call(Mul(), y, constant(np.full((2, 1, 1), 1e20, np.float32))))
    assert operators(FOLD.run(graph, TARGET)) == ["conv", "mul"]


def test_half_precision_alone_is_not_split(rng):
    x = graph_input("x", (1, 2, 3, 3), DType.F16)
    vectors = [constant(rng.uniform(0.5, 1, 2).astype(np.float16)) for _ in range(4)]
    assert operators(check(FOLD, graph_of(call(BatchNorm(), x, *vectors)), rng)) == ["batch_norm"]


def test_locations_of_both_are_kept(rng):
    x = image(1, 3, 6, 6)
    y = call(conv(x, weights(rng, 4, 3, 1, 1)).op, x, weights(rng, 4, 3, 1, 1), loc=["Conv_0"])
    vectors = [constant(rng.uniform(0.5, 1, 4).astype(np.float32)) for _ in range(4)]
    folded = FOLD.run(graph_of(call(BatchNorm(), y, *vectors, loc=["BatchNorm_1"])), TARGET)
    assert folded.outputs[0].node.loc == {"Conv_0", "BatchNorm_1"}
