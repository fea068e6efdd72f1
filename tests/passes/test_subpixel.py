"""subpixel: transposed convolutions become convolutions, with the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.ir.build import call
from cnnc.ir.interp import run
from cnnc.ir.text import print_graph
from cnnc.ops import ConvTranspose, graph_input
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


def test_infinities_reach_the_same_pixels(rng):
    graph = graph_of(transposed(rng, (4, 4), (2, 2), (1, 1, 1, 1)))
    x = np.zeros((2, 3, 5, 4), np.float32)
    x[0, 1, 2, 3] = np.inf
    with np.errstate(invalid="ignore"):
        (before,), (after,) = run(graph, [x]), run(check(Subpixel(), graph, rng), [x])
    np.testing.assert_array_equal(np.isinf(before), np.isinf(after))


@pytest.mark.parametrize(
    "fields",
    [
        {"kernel": (3, 3), "stride": (2, 2)},
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
