"""fold_pad: zeros into convolutions and average pools, never into a max pool."""

from __future__ import annotations

import pytest

from cnnc.ir.build import call
from cnnc.ir.text import print_graph
from cnnc.ops import AveragePool, Conv, MaxPool, Pad
from cnnc.passes.fold_pad import FoldPad
from tests.passes.graphs import check, conv, graph_of, image, operators, weights

FOLD = FoldPad()
ZEROS = (0, 0, 1, 2, 0, 0, 0, 3)


def pool(pad: tuple[int, ...] = (0, 0, 0, 0), *, ceil: bool = False, counted: bool = False) -> AveragePool:
    return AveragePool((3, 2), (2, 1), pad, (1, 1), ceil, counted)


def test_golden(rng, golden):
    graph = graph_of(conv(call(Pad(ZEROS), image(1, 3, 6, 6)), weights(rng, 2, 3, 3, 3), pad=1))
    golden("fold_pad", print_graph(graph) + print_graph(check(FOLD, graph, rng)))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_into_conv(rng, rank):
    pads = (0, 0, *(1, 2, 0)[:rank], 0, 0, *(0, 1, 2)[:rank])
    y = conv(call(Pad(pads), image(2, 3, *(6, 5, 4)[:rank])), weights(rng, 4, 3, *(3, 3, 3)[:rank]), weights(rng, 4))
    done = check(FOLD, graph_of(y), rng)
    assert operators(done) == ["conv"]
    assert isinstance(done.outputs[0].op, Conv)
    assert done.outputs[0].op.pad == pads[2 : 2 + rank] + pads[4 + rank :]


def test_a_pad_with_other_readers_is_read_less(rng):
    padded = call(Pad(ZEROS), image(1, 3, 6, 6))
    done = check(FOLD, graph_of(conv(padded, weights(rng, 2, 3, 3, 3)), padded), rng)
    assert sorted(operators(done)) == ["conv", "pad"]
    assert done.outputs[0].inputs[0].op.name == "input"


@pytest.mark.parametrize(
    "pad",
    [
        Pad(ZEROS, value=1.0),
        Pad(ZEROS, "edge"),
        Pad(ZEROS, "reflect"),
        Pad((0, 1, 0, 0, 0, 0, 0, 0)),
        Pad((0, 0, 2, 0, 0, 0, -1, 0)),
    ],
)
def test_other_pads_stay(rng, pad):
    x = image(1, 3, 6, 6)
    channels = 3 + pad.pads[1]
    graph = graph_of(conv(call(pad, x), weights(rng, 2, channels, 3, 3)))
    assert operators(check(FOLD, graph, rng)) == ["pad", "conv"]


def test_into_average_pool(rng):
    padded = call(Pad((0, 0, 1, 1, 0, 0, 0, 1)), image(1, 3, 6, 6))
    assert operators(check(FOLD, graph_of(call(pool(), padded)), rng)) == ["average_pool"]
    assert operators(check(FOLD, graph_of(call(pool((1, 0, 0, 0), counted=True), padded)), rng)) == ["average_pool"]


@pytest.mark.parametrize("op", [pool((1, 0, 0, 0)), pool(ceil=True), pool(counted=True, ceil=True)])
def test_average_pools_that_count_otherwise_stay(rng, op):
    padded = call(Pad((0, 0, 1, 1, 0, 0, 0, 1)), image(1, 3, 6, 6))
    assert operators(check(FOLD, graph_of(call(op, padded)), rng)) == ["pad", "average_pool"]


def test_a_window_of_nothing_but_padding_stays(rng):
    padded = call(Pad((0, 0, 4, 0, 0, 0, 0, 0)), image(1, 3, 6, 6))
    assert operators(check(FOLD, graph_of(call(pool(), padded)), rng)) == ["pad", "average_pool"]


def test_never_into_max_pool(rng):
    padded = call(Pad((0, 0, 1, 1, 0, 0, 0, 1)), image(1, 3, 6, 6))
    graph = graph_of(call(MaxPool((3, 2), (2, 1), (0,) * 4, (1, 1)), padded))
    assert operators(check(FOLD, graph, rng)) == ["pad", "max_pool"]
