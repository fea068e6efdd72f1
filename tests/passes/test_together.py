"""Graphs of one network for several batch sizes: what is decided of a weight is decided for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.text import print_graph
from cnnc.ir.verify import verify
from cnnc.ops import Constant, Conv, Dense, Relu, Reshape, constant, graph_input
from cnnc.passes.assign_layouts import AssignLayouts
from cnnc.passes.choose_algorithm import ChooseAlgorithm
from cnnc.passes.fold_constants import FoldConstants
from cnnc.passes.pack_weights import PackWeights
from cnnc.passes.pipeline import pipeline, run_together, share_constants
from cnnc.passes.registry import Pass
from tests.passes.graphs import TARGET, assert_same_numbers, conv, graph_of, image, weights

SIZES = (1, 64)


def weight_types(graph: Graph) -> list[str]:
    """List how the weights of layers lie, by their operator's algorithm."""
    layers = [node for node in graph.nodes if isinstance(node.op, Conv | Dense)]
    return [f"{getattr(node.op, 'algorithm', '')} {node.inputs[1].type}" for node in layers]


def check_together(step: Pass, graphs: Sequence[Graph], rng: np.random.Generator) -> tuple[Graph, ...]:
    """Check that a pass alone decides differently for each graph, and the same for all; and what holds for any pass."""
    alone = [weight_types(step.run(graph, TARGET)) for graph in graphs]
    assert alone[0] != alone[1], "nothing to decide"
    done = tuple(verify(graph, str(step)) for graph in step.run_together(graphs, TARGET))
    assert len({tuple(weight_types(graph)) for graph in done}) == 1
    assert [weight_types(graph) for graph in step.run_together(graphs[:1], TARGET)] == alone[:1]
    for before, after in zip(graphs, done, strict=True):
        assert_same_numbers(before, after, rng)
    again = step.run_together(done, TARGET)
    assert [print_graph(graph) for graph in again] == [print_graph(graph) for graph in done]
    return done


def made(make: Callable[[int, Callable[..., Value]], Graph], sizes: Sequence[int] = SIZES) -> list[Graph]:
    """Make a graph for each size, with weights that are equal, but not the same objects."""

    def graph(size: int) -> Graph:
        rng = np.random.default_rng(1)
        return make(size, lambda *shape: weights(rng, *shape))

    return [graph(size) for size in sizes]


def small_images(size: int, drawn: Callable[..., Value]) -> Graph:
    """A layer for which Winograd's small tiles are best for one image, its large ones for many."""
    return graph_of(conv(image(size, 64, 4, 4), drawn(64, 64, 3, 3), pad=1))


def few_channels(size: int, drawn: Callable[..., Value]) -> Graph:
    """A layer of seven channels that had better take them in blocks for one image, and plain for many."""
    y = call(Relu(), conv(image(size, 16, 8, 8), drawn(7, 16, 3, 3), pad=1))
    return graph_of(conv(y, drawn(32, 7, 3, 3), pad=1))


def fully_connected(size: int, drawn: Callable[..., Value]) -> Graph:
    return graph_of(call(Dense(), graph_input("x", (size, 8)), drawn(20, 8), drawn(20)))


@pytest.mark.parametrize("order", [1, -1])
def test_one_algorithm_for_a_layer(rng, order):
    check_together(ChooseAlgorithm(), made(small_images)[::order], rng)


def test_transformed_weights_are_bounded_for_all(rng):
    graphs = made(small_images)
    done = ChooseAlgorithm(growth=0.1).run_together(graphs, TARGET)
    assert [weight_types(graph) for graph in done] == [["direct f32[64,64,3,3]"]] * 2


@pytest.mark.parametrize(("order", "layout"), [(1, "OIHW8i8o"), (-1, "OIHW8o")])
def test_the_first_graph_decides_how_weights_lie(rng, order, layout):
    done = check_together(AssignLayouts(), made(few_channels)[::order], rng)
    assert all(weight_types(graph)[1].endswith(layout) for graph in done)


@pytest.mark.parametrize("order", [1, -1])
def test_many_rows_in_one_graph_pack_the_weight_of_all(rng, order):
    done = check_together(PackWeights(), made(fully_connected)[::order], rng)
    assert all("OI16o" in weight_types(graph)[0] for graph in done)


def test_few_rows_in_all_graphs_pack_nothing(rng):
    done = PackWeights().run_together(made(fully_connected, (1, 2)), TARGET)
    assert [weight_types(graph) for graph in done] == [["direct f32[20,8]"]] * 2


def test_layers_of_another_weight_decide_for_themselves(rng):
    other = graph_of(call(Dense(), graph_input("x", (1, 8)), weights(rng, 20, 8)))
    (packed, plain) = PackWeights().run_together([made(fully_connected)[1], other], TARGET)
    assert "OI16o" in weight_types(packed)[0]
    assert "OI16o" not in weight_types(plain)[0]


def test_equal_numbers_are_one_object(rng):
    graphs = share_constants(FoldConstants().run_together(made(few_channels), TARGET))
    first, second = ([n.op.value for n in graph.nodes if isinstance(n.op, Constant)] for graph in graphs)
    assert len(first) == 2
    assert all(a is b for a, b in zip(first, second, strict=True))
    (alone,) = share_constants(graphs[:1])
    assert alone is graphs[0]


def test_graphs_of_other_structure_share_what_they_can(rng):
    """For one image a pipeline may take another way, as here, where one graph has a layer more."""
    (one, many) = made(small_images)
    (y,) = many.outputs
    more = graph_of(call(Relu(), conv(y, constant(np.ones((64, 64, 3, 3), np.float32)), pad=1)))
    done = ChooseAlgorithm().run_together((one, more), TARGET)
    assert weight_types(done[0])[0] == weight_types(done[1])[0]
    for before, after in zip((one, more), done, strict=True):
        assert_same_numbers(before, after, rng)


def test_a_pipeline_keeps_one_set_of_weights(rng, tmp_path):
    def network(size: int, drawn: Callable[..., Value]) -> Graph:
        y = call(Relu(), conv(image(size, 64, 4, 4), drawn(64, 64, 3, 3), drawn(64), pad=1))
        y = conv(conv(y, drawn(7, 64, 3, 3), pad=1), drawn(32, 7, 3, 3), pad=1)
        return graph_of(call(Dense(), call(Reshape((size, 512)), y), drawn(100, 512), drawn(100)))

    graphs = made(network, (1, 8, 64))
    folders = [tmp_path / str(size) for size in (1, 8, 64)]
    steps = [step for step in pipeline(3) if step.name not in ("fuse", "place_concats", "tile")]
    timings: list[tuple[str, float]] = []
    done = run_together(graphs, TARGET, steps, dump_dirs=folders, timings=timings)
    assert [name for name, _ in timings] == [step.name for step in steps]
    sets = [{n.op for n in graph.nodes if isinstance(n.op, Constant) and n.types[0].elements > 100} for graph in done]
    assert sets[0] == sets[1] == sets[2]
    for before, after, folder in zip(graphs, done, folders, strict=True):
        assert_same_numbers(before, after, rng, tolerance=1e-5)
        assert print_graph(before) == (folder / "00-import.txt").read_text()
