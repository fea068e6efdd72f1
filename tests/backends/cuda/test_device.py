"""On a real GPU: every operator, and networks, against the interpreter.  `pytest -m cuda` runs these."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import cnnc
from cnnc.backends.cuda.nvcc import _in_wheel
from cnnc.backends.host.gpu import cuda_driver
from cnnc.backends.host.library import SharedModel
from cnnc.frontends.dsl import Network, load_network
from cnnc.ir.interp import evaluate, run
from cnnc.ir.types import DType
from cnnc.ops.example_graph import TOLERANCE, buildable_examples, draw, graph_of, operator_names, rng_for
from cnnc.profiler.gpu.artifact import DeviceArtifact
from tests.ops.test_examples import assert_close

EXAMPLES = Path(__file__).parents[3] / "examples"


def native_target() -> str | None:
    """Give the target for the first GPU, which is the one that artifacts use; None without one."""
    driver = cuda_driver()
    return driver.gpus[0].target if driver and driver.gpus else None


TARGET = native_target()

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(TARGET is None, reason="there is no GPU that a target is for"),
    pytest.mark.skipif(shutil.which("nvcc") is None and _in_wheel() is None, reason="there is no nvcc"),
]


@pytest.mark.parametrize("name", operator_names())
def test_every_operator(name: str) -> None:
    """All examples of an operator in one model."""
    chosen = buildable_examples(name)
    graph = graph_of(chosen)
    inputs = [a for number, e in enumerate(chosen) for a in draw(e, rng_for(name, 4000 + number))]
    results = cnnc.compile(graph, target=str(TARGET)).run(dict(zip(graph.input_names, inputs, strict=True)))
    for label, wanted in zip(graph.output_names, run(graph, inputs), strict=True):
        assert_close(results[label], wanted, TOLERANCE.get(DType.of(wanted), 0), f"{name} {label}")


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("spec", ["lenet5.py:lenet5", "simple_cnn.py:simple_cnn"])
def test_small_networks(spec: str, batch: int) -> None:
    check(load_network(f"{EXAMPLES}/{spec}", batch=batch))


@pytest.mark.parametrize(
    "spec",
    [
        "resnet.py:resnet18",
        "resnet.py:resnet50",
        "squeezenet.py:squeezenet1_1",
        "efficientnet.py:efficientnet_b0",
        "densenet.py:densenet121",
        "shufflenet_v2.py:shufflenet_v2_x1_0",
    ],
)
def test_networks_on_small_pictures(spec: str) -> None:
    check(load_network(f"{EXAMPLES}/{spec}", x=(3, 64, 64)))


def test_data_on_the_gpu_and_several_batch_sizes(tmp_path: Path) -> None:
    """Runs in a stream over the GPU's own memory give what runs over the host's give, bit for bit."""
    net = load_network(f"{EXAMPLES}/lenet5.py:lenet5").init(seed=6)
    cnnc.compile(net, target=str(TARGET), batch=(1, 8)).save(tmp_path / "net.so")
    model = SharedModel(tmp_path / "net.so")
    x = np.random.default_rng(3).standard_normal((8, 1, 32, 32)).astype(np.float32)
    for variant in model.variants:
        given = [x[: variant.batch]]
        with model.create() as context, DeviceArtifact(model, variant, given) as device:
            (wanted,) = context.run(given)
            for _ in range(3):
                device.start()
            np.testing.assert_array_equal(device.outputs()[0], wanted)
        exact = evaluate(net.with_batch(variant.batch).graph(), {"x": given[0]}, precise=True)["output"]
        assert np.linalg.norm(wanted - exact) / np.linalg.norm(exact) <= 1e-5


def check(net: Network) -> None:
    """Compare on fresh inputs with float64; several runs of one context must agree, bit for bit."""
    graph = net.init(seed=6).graph()
    rng = np.random.default_rng(21)
    feeds = {
        name: rng.standard_normal(value.type.static_shape).astype(np.float32)
        for name, value in zip(graph.input_names, graph.inputs, strict=True)
    }
    module = cnnc.compile(graph, target=str(TARGET))
    first = module.run(feeds)
    for name, wanted in evaluate(graph, feeds, precise=True).items():
        assert np.linalg.norm(first[name] - wanted) / np.linalg.norm(wanted) <= 1e-5, name
    for _ in range(3):
        again = module.run(feeds)
        assert all(np.array_equal(again[name], first[name]) for name in first)
    assert all(timing.nanoseconds > 0 for timing in module.profile(feeds, 2))
