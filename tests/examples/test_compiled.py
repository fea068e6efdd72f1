"""The examples compiled: the binary computes what the interpreter computes, no other library needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import cnnc
from cnnc.frontends.dsl import Network, load_network
from cnnc.ir.interp import evaluate


def check(net: Network) -> None:
    """Compare on fresh inputs with the interpreter in float64; the bound is three times the interpreter's in f32."""
    graph = net.graph()
    rng = np.random.default_rng(20)
    feeds = {
        name: rng.standard_normal(value.type.static_shape).astype(np.float32)
        for name, value in zip(graph.input_names, graph.inputs, strict=True)
    }
    exact, single = evaluate(graph, feeds, precise=True), evaluate(graph, feeds)
    results = cnnc.compile(graph, threads=1).run(feeds)
    assert set(results) == set(exact)
    for name, wanted in exact.items():
        scale = np.linalg.norm(wanted)
        assert scale > 0
        allowed = max(1e-5, 3 * np.linalg.norm(single[name] - wanted) / scale)
        assert np.linalg.norm(results[name] - wanted) / scale <= allowed, name


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["simple_cnn", "lenet5"])
def test_the_small_ones(example: Callable[..., Network], name: str, batch: int) -> None:
    check(example(name, batch=batch).init(seed=1))


@pytest.mark.parametrize("name", ["filters", "edges", "emboss"])
def test_the_filters(example_path: Callable[[str], str], name: str) -> None:
    check(load_network(example_path(f"filters.py:{name}"), x=(1, 31, 45)))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "shufflenet_v2_x1_0", "efficientnet_b0"])
def test_the_quick_ones(example: Callable[..., Network], name: str) -> None:
    check(example(name, x=(3, 64, 64)).init(seed=2))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("alexnet_2012", (3, 227, 227)), ("googlenet_2014", (3, 64, 96))])
def test_those_with_lrn(example: Callable[..., Network], name: str, size: tuple[int, ...]) -> None:
    check(example(name, x=size).init(seed=4))


def test_a_layer_inside(example: Callable[..., Network]) -> None:
    check(example("resnet18", x=(3, 40, 56)).init(seed=3).cut("layer1", "layer2.0.conv1", "fc"))
