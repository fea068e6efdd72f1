"""subpixel: transposed convolutions become convolutions, with the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

import cnnc
from cnnc.ir.build import call
from cnnc.ir.interp import run
from cnnc.ir.text import print_graph
from cnnc.ops import ConvTranspose, Relu, graph_input
from cnnc.ops.source import constant
from cnnc.passes.subpixel import Subpixel
from tests.passes.graphs import check, graph_of, image, operators, weights


def transposed(rng, kernel, stride, pad=(0, 0, 0, 0), output_pad=(0, 0), bias=False, x=(2, 3, 5, 4), **others):
    op = ConvTranspose(stride, pad, others.pop("dilation", (1, 1)), others.pop("groups", 1), output_pad)
    operands = [image(*x), weights(rng, x[1], 4, *kernel)]
    return call(op, *operands, *([weights(rng, 4)] if bias else []))


def test_golden(rng, golden):
    graph = graph_of(transposed(rng, (4, 4), (2, 2), (1, 1, 1, 1), bias=True))
    golden("subpixel", print_graph(graph) + print_graph(check(Subpixel(), graph, rng)))


@pytest.mark.parametrize("kernel", [(2, 2), (4, 4), (6, 2), (2, 4)])
@pytest.mark.parametrize("pad", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0), (1, 0, 0, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_stride_two(rng, kernel, pad, bias):
    done = check(Subpixel(), graph_of(transposed(rng, kernel, (2, 2), pad, bias=bias)), rng)
    assert operators(done) in (["conv", "depth_to_space"], ["conv", "depth_to_space", "slice"])


@pytest.mark.parametrize("x", [(1, 3, 1, 1), (1, 3, 1, 6), (2, 3, 7, 2)])
def test_thin_images_and_long_strides(rng, x):
    for kernel, stride, pad in (
        ((8, 8), (4, 4), (2, 2, 2, 2)),
        ((3, 6), (3, 3), (1, 0, 0, 2)),
        ((16, 16), (8, 8), (4,) * 4),
    ):
        done = check(Subpixel(), graph_of(transposed(rng, kernel, stride, pad, x=x)), rng)
        assert operators(done)[:2] == ["conv", "depth_to_space"]


def test_a_stride_of_one_turns_the_filters_around(rng):
    for pad in ((0, 0, 0, 0), (1, 2, 2, 1)):
        done = check(Subpixel(), graph_of(transposed(rng, (3, 4), (1, 1), pad, bias=True)), rng)
        assert operators(done) == ["conv"]


def test_output_padding_inside_the_windows(rng):
    done = check(Subpixel(), graph_of(transposed(rng, (4, 4), (2, 2), (1, 1, 1, 1), (1, 1))), rng)
    assert operators(done) == ["conv", "depth_to_space", "slice"]


@pytest.mark.parametrize("kernel", [(3, 3), (5, 4), (4, 3), (5, 3)])
@pytest.mark.parametrize(
    ("pad", "output_pad"),
    [((0, 0, 0, 0), (0, 0)), ((1, 1, 1, 1), (1, 1)), ((1, 1, 1, 1), (0, 0)), ((1, 0, 0, 1), (0, 1))],
)
def test_each_phase_by_itself(rng, kernel, pad, output_pad):
    done = check(Subpixel(), graph_of(transposed(rng, kernel, (2, 2), pad, output_pad, bias=True)), rng)
    assert operators(done)[:6] == ["conv"] * 4 + ["concat", "depth_to_space"]
    assert sum(np.prod(n.inputs[1].shape[2:]) for n in done.nodes if n.op.name == "conv") == np.prod(kernel)


@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "output_pad"),
    [((3, 3), 2, 1, 1), ((3, 3), 2, 0, 0), ((4, 4), 2, 1, 0), ((2, 2), 2, 0, 0), ((5, 5), 3, 1, 2)],
)
def test_compiled_as_the_definition_says(rng, kernel, stride, pad, output_pad):
    y = transposed(rng, kernel, (stride,) * 2, (pad,) * 4, (output_pad,) * 2, bias=True, x=(2, 16, 6, 9))
    graph = graph_of(call(Relu(), y))
    x = (rng.random((2, 16, 6, 9)) * 2 - 1).astype(np.float32)
    (got,) = cnnc.compile(graph).run({"x": x}).values()
    (wanted,) = run(graph, [x], precise=True)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [(3, 3), (4, 4)])
def test_infinities_reach_the_same_pixels(rng, kernel):
    graph = graph_of(transposed(rng, kernel, (2, 2), (1, 1, 1, 1)))
    x = np.zeros((2, 3, 5, 4), np.float32)
    x[0, 1, 2, 3] = np.inf
    with np.errstate(invalid="ignore"):
        (before,), (after,) = run(graph, [x]), run(check(Subpixel(), graph, rng), [x])
    np.testing.assert_array_equal(np.isinf(before), np.isinf(after))


@pytest.mark.parametrize(
    "fields",
    [
        {"kernel": (1, 1), "stride": (2, 2)},
        {"kernel": (3, 3), "stride": (2, 2), "pad": (2, 2, 0, 0)},
        {"kernel": (3, 2), "stride": (2, 2), "pad": (1, 1, 1, 1)},
        {"kernel": (2, 2), "stride": (2, 1)},
        {"kernel": (2, 2), "stride": (2, 2), "dilation": (2, 2)},
        {"kernel": (2, 2), "stride": (2, 2), "pad": (2, 0, 0, 0)},
        {"kernel": (2, 2), "stride": (2, 2), "output_pad": (1, 0)},
    ],
)
def test_others_stay(rng, fields):
    assert operators(check(Subpixel(), graph_of(transposed(rng, **fields)), rng)) == ["conv_transpose"]


def test_groups_and_weights_that_are_no_constants_stay(rng):
    grouped = call(ConvTranspose((2, 2), (0,) * 4, (1, 1), 3), image(1, 3, 4, 4), weights(rng, 3, 2, 2, 2))
    assert operators(check(Subpixel(), graph_of(grouped), rng)) == ["conv_transpose"]
    op = ConvTranspose((2, 2), (0,) * 4, (1, 1))
    given = call(op, image(1, 3, 4, 4), graph_input("w", (3, 2, 2, 2)))
    assert operators(check(Subpixel(), graph_of(given), rng)) == ["conv_transpose"]
    bias = call(op, image(1, 3, 4, 4), constant(np.ones((3, 2, 2, 2), np.float32)), graph_input("b", (2,)))
    assert operators(check(Subpixel(), graph_of(bias), rng)) == ["conv_transpose"]
