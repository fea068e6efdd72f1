"""Every example against its published model: parameter counts, names, shapes, and outputs equal to PyTorch's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnc.frontends.dsl import Network
from cnnc.ir.graph import Graph
from cnnc.ir.interp import evaluate

NETWORKS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "networks.json").read_text())
PUBLISHED = [name for name, facts in NETWORKS.items() if facts["published"]]
QUICK = (
    "resnet18",
    "squeezenet1_1",
    "mobilenet_v2",
    "shufflenet_v2_x1_0",
    "googlenet",
    "densenet121",
    "efficientnet_b0",
)
Engine = Callable[[Graph, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def compiled(graph: Graph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compile for this machine's CPU and run."""
    import cnnc

    return dict(cnnc.compile(graph, threads=1).run(feeds))


def digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Hash names and shapes."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shapes_of(module: Any) -> dict[str, tuple[int, ...]]:
    """Give the names and shapes of a module's state, less what only training reads."""
    state = module.state_dict().items()
    return {name: tuple(t.shape) for name, t in state if not name.endswith("num_batches_tracked")}


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """Give the relative error in the 2-norm."""
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_counts_are_the_published_ones(example: Callable[..., Network], name: str) -> None:
    assert example(name).parameter_count == NETWORKS[name]["parameters"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(example: Callable[..., Network], name: str) -> None:
    parameters = {key: type_.static_shape for key, type_ in example(name).parameters.items()}
    assert digest(parameters) == NETWORKS[name]["digest"]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_docstring_gives_the_right_count(example: Callable[..., Network], name: str) -> None:
    source = (Path(__file__).parents[2] / "examples" / NETWORKS[name]["file"]).read_text()
    assert f"{NETWORKS[name]['parameters']:,}" in source


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recorded_digest_is_the_installed_librarys(published: Callable[[str], Any], name: str) -> None:
    module = published(name)
    assert digest(shapes_of(module)) == NETWORKS[name]["digest"]
    assert sum(p.numel() for p in module.parameters()) == NETWORKS[name]["parameters"]


def check_outputs(net: Network, module: Any, shape: tuple[int, ...], engine: Engine) -> None:
    """Compare with PyTorch on the same parameters: an error of at most 1e-5, or three times PyTorch's own."""
    import torch

    parameters = {name: torch.from_numpy(array) for name, array in net.weights.items()}
    left_out = module.load_state_dict(parameters, strict=False)
    assert not left_out.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in left_out.missing_keys)
    x = np.random.default_rng(20).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        theirs = module(torch.from_numpy(x)).numpy()
        exact = module.double()(torch.from_numpy(x).double()).numpy()
    ours = engine(net.graph(), {"x": x})["output"]
    assert ours.dtype == np.float32
    assert relative(ours, exact) <= max(1e-5, 3 * relative(theirs, exact))


ENGINES = pytest.mark.parametrize("engine", [evaluate, compiled], ids=["interpreter", "compiled"])


@ENGINES
@pytest.mark.parametrize("name", QUICK)
def test_outputs_equal_pytorch(
    example: Callable[..., Network], published: Callable[[str], Any], name: str, engine: Engine
) -> None:
    size = tuple(NETWORKS[name]["small"])
    check_outputs(example(name, x=size, batch=2).init(seed=3), published(name), (2, *size), engine)


@pytest.mark.slow
@ENGINES
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in QUICK])
def test_outputs_of_the_large_equal_pytorch(
    example: Callable[..., Network], published: Callable[[str], Any], name: str, engine: Engine
) -> None:
    size = tuple(NETWORKS[name]["small"])
    check_outputs(example(name, x=size).init(seed=4), published(name), (1, *size), engine)


@pytest.mark.slow
@ENGINES
@pytest.mark.parametrize("name", PUBLISHED)
def test_outputs_in_full_size_equal_pytorch(
    example: Callable[..., Network], published: Callable[[str], Any], name: str, engine: Engine
) -> None:
    net = example(name).init(seed=5)
    check_outputs(net, published(name), net.inputs[0].type.static_shape, engine)


def test_every_network_of_the_examples_is_tested() -> None:
    folder = Path(__file__).parents[2] / "examples"
    written = {
        name
        for path in folder.glob("*.py")
        for name in re.findall(r"^@network\(.*\)\ndef (\w+)", path.read_text(), re.MULTILINE)
    }
    assert written == set(NETWORKS) | {"filters", "edges", "emboss", "cross"}
