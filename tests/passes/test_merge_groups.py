"""merge_groups: until they are whole blocks, and no further."""

from __future__ import annotations

import numpy as np
import pytest

import cnnc
from cnnc.ir.interp import run
from cnnc.ir.text import print_graph
from cnnc.ir.types import DType
from cnnc.ops import constant, graph_input
from cnnc.passes.merge_groups import MergeGroups
from cnnc.passes.pipeline import pipeline
from cnnc.target import Target
from tests.passes.graphs import check, conv, graph_of, image, operators, weights

WIDE, GPU = Target.parse("cpu:x86-64-v4"), Target.parse("cuda:sm_90")


def grouped(rng, groups, inputs, outputs, bias=False, kernel=(3, 3), **options):
    """Make a convolution of groups of so many channels."""
    x = image(2, groups * inputs, 6, 5)
    b = [weights(rng, groups * outputs)] if bias else []
    return graph_of(conv(x, weights(rng, groups * outputs, inputs, *kernel), *b, pad=1, groups=groups, **options))


def merged(rng, graph, target=WIDE, **options):
    """Give the groups after the pass, which has changed no number."""
    done = check(MergeGroups(**options), graph, rng, target=target)
    return done.outputs[0].op.groups


def test_golden(rng, golden):
    graph = grouped(rng, 4, 6, 10, bias=True)
    golden("merge_groups", print_graph(graph) + print_graph(check(MergeGroups(), graph, rng)))


@pytest.mark.parametrize(
    ("groups", "inputs", "outputs", "left"),
    [
        (8, 24, 24, 4),  # two groups are three blocks of 16
        (6, 40, 24, 3),
        (4, 12, 4, 1),  # four of 12 are three blocks, but of 4 one
        (3, 20, 20, 1),  # no number of these but all of them
        (8, 2, 4, 1),
        (3, 24, 24, 1),
        (8, 16, 32, 8),
        (16, 4, 4, 16),  # part of a block
        (64, 1, 1, 64),
        (1, 24, 24, 1),
    ],
)
def test_to_whole_blocks(rng, groups, inputs, outputs, left):
    assert merged(rng, grouped(rng, groups, inputs, outputs)) == left


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("groups", "inputs", "outputs", "parts"), [(17, 24, 24, [8, 1]), (5, 24, 24, [2, 1])])
def test_groups_that_are_left_over_become_one(rng, bias, groups, inputs, outputs, parts):
    done = check(MergeGroups(), grouped(rng, groups, inputs, outputs, bias, stride=2), rng, target=WIDE)
    assert operators(done) == ["slice", "conv", "slice", "conv", "concat"]
    assert [node.op.groups for node in done.nodes if node.op.name == "conv"] == parts


def test_groups_that_never_fit_stay(rng):
    assert merged(rng, grouped(rng, 17, 3, 3)) == 17
    x, b = image(1, 17 * 24, 5, 5), graph_input("b", (17 * 24,))
    computed = graph_of(conv(x, weights(rng, 17 * 24, 24, 3, 3), b, groups=17))
    assert MergeGroups().run(computed, WIDE).outputs[0].op.groups == 17


def test_how_many_and_of_which_blocks_can_be_chosen(rng):
    graph = grouped(rng, 8, 24, 24)
    assert merged(rng, graph, block=8) == 8
    assert merged(rng, grouped(rng, 8, 12, 12), many=3) == 8
    assert merged(rng, graph, target=Target.parse("cpu:x86-64-v3")) == 8
    assert merged(rng, graph, target=GPU) == 8


def test_only_images_of_f32(rng):
    x = image(2, 4 * 24, 9)
    assert merged(rng, graph_of(conv(x, weights(rng, 96, 24, 3), groups=4))) == 4
    wide = graph_input("x", (1, 96, 5, 5), DType.F64)
    w = constant(rng.standard_normal((96, 24, 3, 3)))
    assert MergeGroups().run(graph_of(conv(wide, w, groups=4)), WIDE).outputs[0].op.groups == 4


def test_what_is_not_finite_reaches_the_merged_group_only(rng):
    graph = grouped(rng, 8, 24, 24)
    x = rng.standard_normal((2, 192, 6, 5)).astype(np.float32)
    x[0, 30, 2, 2] = np.inf
    (got,) = run(MergeGroups().run(graph, WIDE), [x])
    lost = ~np.isfinite(got)
    assert lost[0, :48, 1:4, 1:4].all()
    assert not lost[0, 48:].any()
    assert not lost[1].any()


@pytest.mark.parametrize(("options", "present"), [({}, True), ({"exact": True}, False), ({"small": True}, False)])
def test_where_zeros_are_welcome(options, present):
    assert any(isinstance(p, MergeGroups) for p in pipeline(3, **options)) is present


def test_a_kernel_in_blocks_computes_them(rng):
    """As those of RegNet, groups of 24 channels, on vectors of 16 lanes."""
    built = cnnc.compile(grouped(rng, 8, 24, 24), target="cpu:x86-64-v4")
    assert "conv_direct" in [kernel.algorithm for kernel in built.kernels]


@pytest.mark.parametrize(
    ("groups", "channels", "kernel", "stride", "pad"),
    [(17, 24, (3, 3), 1, 1), (5, 12, (1, 1), 3, 0), (8, 20, (2, 3), 2, 1), (3, 40, (5, 1), 1, 2)],
)
def test_merged_kernels_compute_the_same(rng, groups, channels, kernel, stride, pad):
    """On this machine, of a batch of two, against the interpreter in float64."""
    x = image(2, groups * channels, 7, 6)
    w, b = weights(rng, groups * channels, channels, *kernel), weights(rng, groups * channels)
    graph = graph_of(conv(x, w, b, pad=pad, stride=stride, groups=groups))
    data = rng.standard_normal(x.type.static_shape).astype(np.float32)
    (wanted,) = run(graph, [data], precise=True)
    (got,) = cnnc.compile(graph).run({"x": data}).values()
    assert np.linalg.norm(got - wanted) <= 2e-6 * np.linalg.norm(wanted)
