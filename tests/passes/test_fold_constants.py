"""fold_constants: numbers known beforehand, and the limits on how large they may grow."""

from __future__ import annotations

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.layout import Layout
from cnnc.ir.text import print_graph
from cnnc.ir.types import Dim
from cnnc.ops import Add, Constant, Expand, LayoutTransform, Mul, Slice, Split, Transpose, constant, graph_input
from cnnc.passes.fold_constants import FoldConstants
from tests.passes.graphs import TARGET, check, graph_of, image, operators, weights

FOLD = FoldConstants()


def test_golden(rng, golden):
    c = call(Mul(), call(Add(), constant([1.0, 2.0], label="c"), constant(0.5)), constant(2.0))
    graph = graph_of(call(Add(), image(3, 2), c))
    golden("fold_constants", print_graph(graph) + print_graph(check(FOLD, graph, rng)))


def test_every_output_is_folded(rng):
    parts = call(Split(0, (1, 3)), weights(rng, 4, 2)).node.values
    done = check(FOLD, graph_of(call(Add(), image(3, 2), parts[1]), parts[0]), rng)
    assert operators(done) == ["add"]


def test_a_constant_keeps_its_name_and_gets_its_layout(rng):
    w = call(Transpose((1, 0, 2, 3)), weights(rng, 6, 4, 3, 3, label="w"))
    blocked = call(LayoutTransform(Layout("NCHW4c")), w)
    x = call(LayoutTransform(Layout("NCHW4c")), image(4, 6, 3, 3))
    done = check(FOLD, graph_of(call(LayoutTransform(None), call(Add(), x, blocked))), rng)
    (node,) = (n for n in done.nodes if isinstance(n.op, Constant))
    assert (node.op.label, node.types[0].layout) == ("w", Layout("NCHW4c"))


def test_growth_is_limited(rng):
    grown = call(Expand((1 << 20, 64)), constant(1.0))
    shrunk = call(Slice((0, 0), (1, 1), (1, 1)), grown)
    small = FoldConstants(limit=1 << 10)
    assert operators(FOLD.run(graph_of(shrunk), TARGET)) == ["expand", "slice"]
    large = constant(np.zeros((64, 64), np.float32))
    assert operators(check(small, graph_of(call(Add(), large, large)), rng)) == []
    assert operators(check(small, graph_of(call(Expand((64, 64)), constant(1.0))), rng)) == ["expand"]


def test_run_time_sizes_stay(rng):
    n = Dim.symbol("n", 3)
    y = call(Add(), call(Expand((n, 2)), constant(1.0)), graph_input("x", (n, 2)))
    assert operators(FOLD.run(graph_of(y), TARGET)) == ["expand", "add"]


def test_inputs_stay(rng):
    assert operators(check(FOLD, graph_of(call(Add(), image(2), constant(1.0))), rng)) == ["add"]
