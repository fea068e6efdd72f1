"""local_unpool: values go back without indices where the pool's windows do not overlap, and with them elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.ir.build import call
from cnnc.ir.interp import run
from cnnc.ir.text import print_graph
from cnnc.ops import MaxPool, MaxUnpool, Relu
from cnnc.passes.local_unpool import LocalUnpool
from tests.passes.graphs import check, graph_of, image, operators

NONE, ONE = (0, 0, 0, 0), (1, 1)


def pool(kernel=(2, 2), stride=(2, 2), pad=NONE, dilation=ONE, ceil_mode=False, column_major=False):
    return MaxPool(kernel, stride, pad, dilation, ceil_mode, with_indices=True, column_major=column_major)


def unpooled(op, x, size=None, both=False):
    maxima, indices = call(op, x).node.values
    values = call(Relu(), maxima) if both else call(Relu(), image(*maxima.shape, label="v"))
    return call(MaxUnpool(tuple(x.shape[2:]) if size is None else size), values, indices)


def test_golden(rng, golden):
    graph = graph_of(unpooled(pool(), image(1, 3, 4, 6), both=True))
    golden("local_unpool", print_graph(graph) + print_graph(check(LocalUnpool(), graph, rng)))


@pytest.mark.parametrize(("kernel", "stride"), [((2, 2), (2, 2)), ((3, 2), (3, 2)), ((1, 2), (2, 3)), ((2, 1), (2, 1))])
@pytest.mark.parametrize("size", [(6, 6), (7, 8), (3, 2)])
def test_windows_that_do_not_overlap(rng, kernel, stride, size):
    graph = graph_of(unpooled(pool(kernel, stride), image(2, 3, *size)))
    assert sorted(operators(check(LocalUnpool(), graph, rng))) == ["arg_max_pool", "relu", "tap_unpool"]


def test_the_first_of_equals_gets_the_value(rng):
    graph = graph_of(unpooled(pool(), image(2, 3, 6, 4)))
    done = check(LocalUnpool(), graph, rng)
    for x in (np.zeros((2, 3, 6, 4)), rng.integers(0, 2, (2, 3, 6, 4)), np.full((2, 3, 6, 4), -np.inf)):
        inputs = [x.astype(np.float32), rng.random((2, 3, 3, 2), np.float32) + 1]
        inputs = inputs if done.input_names[0] == "x" else inputs[::-1]
        np.testing.assert_array_equal(run(done, inputs)[0], run(graph, inputs)[0])


@pytest.mark.parametrize(
    ("op", "size"),
    [
        (pool((3, 3), (2, 2)), (7, 7)),
        (pool(pad=(1, 1, 1, 1)), (6, 6)),
        (pool(dilation=(2, 2)), (6, 6)),
        (pool(ceil_mode=True), (7, 7)),
        (pool(column_major=True), (6, 6)),
    ],
)
def test_other_pools_keep_their_indices(rng, op, size):
    graph = graph_of(unpooled(op, image(1, 2, *size)))
    assert "max_unpool" in operators(check(LocalUnpool(), graph, rng))


def test_indices_through_another_shape_stay(rng):
    graph = graph_of(unpooled(pool(), image(1, 2, 6, 6), size=(8, 8)))
    assert "max_unpool" in operators(check(LocalUnpool(), graph, rng))


def test_indices_that_are_an_output_stay(rng):
    maxima, indices = call(pool(), image(1, 2, 6, 6)).node.values
    graph = graph_of(call(MaxUnpool((6, 6)), call(Relu(), maxima), indices), indices)
    done = check(LocalUnpool(), graph, rng)
    assert sorted(operators(done)) == ["arg_max_pool", "max_pool", "relu", "tap_unpool"]
    assert done.outputs[1].op == pool()
