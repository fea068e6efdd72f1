"""Fixtures for the examples: networks by name, and the published PyTorch modules they must equal."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cnnc.frontends.dsl import Network, load_network

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
NETWORKS: dict[str, dict[str, Any]] = json.loads((HERE / "networks.json").read_text())
KEPT: list[Any] = []


@pytest.fixture(scope="session")
def example() -> Callable[..., Network]:
    """Make a network of the examples by its name; keywords are a batch and shapes."""

    def make(name: str, **options: Any) -> Network:
        return load_network(f"{EXAMPLES / NETWORKS[name]['file']}:{name}", **options)

    return make


@pytest.fixture(scope="session")
def example_path() -> Callable[[str], str]:
    """Give the path of a network of the examples, as `file.py:name`."""
    return lambda spec: str(EXAMPLES / spec)


@pytest.fixture(scope="session")
def published() -> Callable[[str], Any]:
    """Make the module that torchvision or timm publishes under a network's name, ready for inference."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)

    def make(name: str) -> Any:
        library = NETWORKS[name]["published"]
        torchvision = import_torchvision()
        if library == "timm":
            return pytest.importorskip("timm").create_model(name).eval()
        options = NETWORKS[name].get("options", {})
        return getattr(torchvision.models, name)(**options).eval()

    return make


def import_torchvision() -> Any:
    """Import torchvision, also where its CUDA build stands beside a PyTorch for the CPU.

    That build cannot load its own operators and then stumbles over their names, so they are declared first.
    """
    import torch

    try:
        return pytest.importorskip("torchvision")
    except RuntimeError:
        for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    KEPT.append(library)
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")
