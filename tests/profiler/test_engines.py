"""Each engine, called as the worker calls it, against ONNX's own reference; those not installed here are left out."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cnnc.cli.main import run as run_cnnc
from cnnc.errors import EnvironmentProblem, UnsupportedError, UsageError
from cnnc.profiler import engines
from cnnc.profiler.accuracy import relative_error
from cnnc.profiler.engines import CNNC, ENGINES, Engine, Opened, Task, convert_for_ncnn

TORCH_NETWORK = """
import torch

class Network(torch.nn.Module):
    def forward(self, x, u):
        return torch.sigmoid(u), torch.relu(x) * 3

def network():
    return Network()
"""


@pytest.fixture
def feeds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    x = rng.standard_normal((1, 3, 9, 8)).astype(np.float32)
    return {"x": x, "u": rng.standard_normal((1, 7)).astype(np.float32)}


def make_model(rng: np.random.Generator, folder: Path, batch: int | str = 1) -> Path:
    """Write a network of two inputs and two outputs, not in the order of the inputs."""
    weight = rng.standard_normal((8, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("Sigmoid", ["u"], ["s"]),
    ]
    shapes = {"x": [batch, 3, 9, 8], "u": [batch, 7], "s": [batch, 7], "z": [batch, 8, 9, 8]}
    x, u, s, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    graph = helper.make_graph(nodes, "two", [x, u], [s, z], [numpy_helper.from_array(weight, "w")])
    path = folder / "two.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def open_with(engine: Engine, model: str, feeds: dict[str, np.ndarray], folder: Path, threads: int = 1) -> Opened:
    library = importlib.import_module(engine.package)
    if engine.convert:
        model = engine.convert(model, feeds, folder, 300.0)
    module, _, function = engine.opener.partition(":")
    opened: Opened = getattr(importlib.import_module(module), function)(
        library, Task(model, threads, feeds, ("s", "z"))
    )
    return opened


def check(opened: Opened, wanted: dict[str, np.ndarray]) -> None:
    """Compare two runs with the reference; half precision anywhere would be off by about 1e-3."""
    for _ in range(2):
        got = opened.read(opened.run())
        assert list(got) == list(wanted)
        for name, array in wanted.items():
            assert got[name].shape == array.shape
            assert relative_error(got[name], array) < 1e-6


@pytest.mark.parametrize("batch", [1, "n"])
@pytest.mark.parametrize("name", ["cnnc", "onnxruntime", "openvino", "ncnn"])
def test_engine_gives_the_numbers_of_the_reference(
    name: str, batch: int | str, feeds: dict[str, np.ndarray], rng: np.random.Generator, tmp_path: Path
) -> None:
    engine = CNNC if name == "cnnc" else ENGINES[name]
    for package in engine.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    path = make_model(rng, tmp_path, batch)
    model = str(path)
    if engine.reads == "so":
        model = str(path.with_suffix(".so"))
        assert run_cnnc(["compile", str(path), "-o", model]) == 0
    results: Any = ReferenceEvaluator(str(path)).run(None, feeds)
    check(open_with(engine, model, feeds, tmp_path), dict(zip(("s", "z"), results, strict=True)))


@pytest.mark.parametrize("kind", ["function", "exported program"])
def test_torch_runs_what_it_is_given(kind: str, feeds: dict[str, np.ndarray], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = tmp_path / "net.py"
    file.write_text(TORCH_NETWORK)
    model = f"{file}:network"
    if kind == "exported program":
        scope: dict[str, Any] = {}
        exec(TORCH_NETWORK, scope)
        model = str(tmp_path / "net.pt2")
        torch.export.save(torch.export.export(scope["network"](), tuple(map(torch.from_numpy, feeds.values()))), model)
    wanted = {"s": 1 / (1 + np.exp(-feeds["u"].astype(np.float64))), "z": 3 * np.maximum(feeds["x"], 0)}
    opened = engines.open_torch(_single_threaded(torch), Task(model, 1, feeds, ("s", "z")))
    check(opened, wanted)
    opened = engines.open_torch(_single_threaded(torch), Task(model, 1, feeds, ("s",)))
    with pytest.raises(UsageError, match="gives 2 outputs, wanted are s"):
        opened.read(opened.run())


def _single_threaded(torch: Any) -> Any:
    """Hide what may be set only once in a process; a worker opens only once."""

    class Torch:
        set_num_interop_threads = staticmethod(lambda count: None)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    return Torch()


@pytest.mark.parametrize("name", list(ENGINES))
def test_missing_packages_are_named_with_their_cure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda package: None)
    needs = " ".join(ENGINES[name].needs)
    with pytest.raises(EnvironmentProblem, match=f"not installed; pip install {needs}"):
        ENGINES[name].require()


def test_pnnx_that_fails_or_dawdles_is_told_of(
    feeds: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(engines, "find_spec", lambda package: Spec)
    pnnx = tmp_path / "pnnx"
    for script, message in (
        ("echo no such operator >&2; exit 9", "status 9: no such operator"),
        ("exit 0", "status 0: no message"),
        ("exec sleep 1000", "not done after 0.5 s"),
    ):
        pnnx.write_text(f"#!/bin/sh\n{script}\n")
        pnnx.chmod(0o755)
        with pytest.raises(UnsupportedError, match=message):
            convert_for_ncnn("net.onnx", feeds, tmp_path, 0.5)


def test_pnnx_is_asked_for_f32_and_these_shapes(
    feeds: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(engines, "find_spec", lambda package: Spec)
    pnnx = tmp_path / "pnnx"
    pnnx.write_text('#!/bin/sh\necho "$@" >asked\ntouch made.param net.bin net.py\n')
    pnnx.chmod(0o755)
    assert convert_for_ncnn("/a/net.onnx", feeds, tmp_path, 60.0) == str(tmp_path / "net.param")
    asked = (tmp_path / "asked").read_text().split()
    assert asked[0] == "/a/net.onnx"
    assert {"fp16=0", "inputshape=[1,3,9,8]f32,[1,7]f32"} <= set(asked)
