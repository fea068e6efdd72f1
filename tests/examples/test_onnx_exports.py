"""ONNX files of the published networks, from both of PyTorch's exporters, against ONNX Runtime."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cnnc
from cnnc.ir.interp import evaluate
from cnnc.profiler.accuracy import relative_error

NETWORKS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "networks.json").read_text())
PUBLISHED = [name for name, facts in NETWORKS.items() if facts["published"]]
QUICK = ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0")


def export(module: Any, size: tuple[int, ...], path: Path, dynamo: bool) -> None:
    """Write a module as ONNX; the newer exporter puts the weights into a file beside it."""
    import torch

    options: dict[str, Any] = {} if dynamo else {"opset_version": 17}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.randn(1, *size),),
            str(path),
            dynamo=dynamo,
            input_names=["x"],
            output_names=["y"],
            **options,
        )


def check_export(module: Any, size: tuple[int, ...], folder: Path, dynamo: bool) -> None:
    """Compile the export and compare with ONNX Runtime, each measured against float64."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    path = folder / "net.onnx"
    module = liven(module)
    export(module, size, path, dynamo)
    x = np.random.default_rng(20).standard_normal((1, *size)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    theirs = onnxruntime.InferenceSession(str(path), options).run(["y"], {"x": x})[0]
    exact = evaluate(cnnc.load_graph(path), {"x": x}, precise=True)["y"]
    ours = cnnc.compile(path).run({"x": x})["y"]
    assert relative_error(theirs, exact) < 1e-3, "the importer reads another network than ONNX Runtime"
    assert relative_error(ours, exact) <= max(1e-5, 3 * relative_error(theirs, exact))


def liven(module: Any) -> Any:
    """Give batch norms statistics that matter; fresh ones are 0 and 1."""
    import torch

    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.8, 1.2)
    return module


EXPORTERS = pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])


@EXPORTERS
@pytest.mark.parametrize("name", QUICK)
def test_small_exports_equal_onnx_runtime(
    published: Callable[[str], Any], name: str, dynamo: bool, tmp_path: Path
) -> None:
    check_export(published(name), tuple(NETWORKS[name]["small"]), tmp_path, dynamo)


@pytest.mark.slow
@EXPORTERS
@pytest.mark.parametrize("name", PUBLISHED)
def test_exports_equal_onnx_runtime(published: Callable[[str], Any], name: str, dynamo: bool, tmp_path: Path) -> None:
    size = (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    check_export(published(name), size, tmp_path, dynamo)
