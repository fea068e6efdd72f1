"""`cnnc bench` from outside: tables, JSON, peers that fail, mistakes of the caller."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cnnc.cli.main import run
from cnnc.profiler.engines import ENGINES
from tests.profiler.fake_engines import fake

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--duration", "0.02", "--rounds", "3", "--warmup-ms", "0"]


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("distorts", "crashes", "raises_at_open"):
        monkeypatch.setitem(ENGINES, name, fake(name))


def make_model(path: Path, channels: int, batch: int | str = 1) -> str:
    """Write a 1x1 convolution with a ReLU."""
    weight = np.random.default_rng(channels).standard_normal((channels, 3, 1, 1)).astype(np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 4, 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, channels, 4, 5])
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]
    graph = helper.make_graph(nodes, "net", [x], [y], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return make_model(tmp_path / "net.onnx", 4)


def bench(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert run(["bench", *arguments, *QUICK, "--json"]) == code
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_each_engine_has_a_row_for_each_thread_count(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(capsys, model, "--against", "onnxruntime", "--threads", "1,2")
    rows = report["results"]
    assert [(row["threads"], row["engine"]) for row in rows] == [
        (1, "cnnc"),
        (1, "onnxruntime"),
        (2, "cnnc"),
        (2, "onnxruntime"),
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert row["version"]
        assert 0 < row["error"] < 1e-6
        assert len(row["round_medians"]) == 3
        assert row["minimum"] <= row["median"]
        assert row["peak_bytes"] > row["startup"]["empty_bytes"] > 0
    ours, theirs = rows[:2]
    assert ours["ratio"] is None
    quotients = [t / o for o, t in zip(ours["round_medians"], theirs["round_medians"], strict=True)]
    assert theirs["ratio"]["median"] == pytest.approx(np.median(quotients))
    assert report["standings"][0] == {
        "model": model,
        "threads": 1,
        "best_peer": "onnxruntime",
        "ratio": theirs["ratio"],
    }
    assert report["error_against"] == "float64"
    assert report["machine"]["cpus"] >= 1


def test_peers_that_fail_or_lie_are_told_of_and_win_nothing(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(capsys, model, "--against", "distorts,raises_at_open,onnxruntime")
    rows = {row["engine"]: row for row in report["results"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "cnnc": "ok",
        "distorts": "wrong",
        "raises_at_open": "failed",
        "onnxruntime": "ok",
    }
    assert rows["distorts"]["ratio"] is None
    assert "median" not in rows["distorts"]
    assert rows["distorts"]["error"] > 1e-2
    assert report["standings"][0]["best_peer"] == "onnxruntime"
    assert {mean["engine"] for mean in report["geometric_means"]} == {"best", "onnxruntime"}


def test_errors_against_cnnc_find_the_liar_too(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(capsys, model, "--against", "distorts", "--error", "cnnc")
    ours, liar = report["results"]
    assert (ours["status"], ours["error"]) == ("ok", 0)
    assert liar["status"] == "wrong"
    assert report["geometric_means"] == []


def test_the_table_of_one_network_says_what_went_wrong(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", model, "--against", "onnxruntime,raises_at_open", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "against cnnc" in out
    assert "note: raises_at_open on net.onnx, 1 thread: failed: ValueError: a model of unknown make" in out


def test_many_networks_have_one_table_and_a_geometric_mean(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other.onnx", 6)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    models = [model, str(broken), other]
    assert run(["bench", *models, "--against", "onnxruntime", *QUICK]) == 3
    out = capsys.readouterr().out
    assert len(re.findall(r"best peer +ratio", out)) == 1
    assert re.search(r"geometric mean over networks, 1 thread: [\d.]+x the best peer \(2 of 3\), ", out)
    assert "note: cnnc on broken.onnx, 1 thread: failed: " in out
    report = bench(capsys, *models, "--against", "onnxruntime", "--threads", "1,2", code=3)
    standings = report["standings"]
    assert [(row["threads"], row["ratio"] is None) for row in standings] == [
        *((1, False), (2, False)),
        *((1, True), (2, True)),
        *((1, False), (2, False)),
    ]
    product = standings[0]["ratio"]["median"] * standings[4]["ratio"]["median"]
    assert report["geometric_means"][0]["models"] == 2
    assert report["geometric_means"][0]["ratio"] == pytest.approx(product**0.5)


def test_a_binary_is_compared_through_its_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "net.onnx", 4, batch="n")
    binary = str(tmp_path / "net.so")
    assert run(["compile", model, "--batch", "3", "-o", binary]) == 0
    capsys.readouterr()
    report = bench(capsys, binary, "--onnx", model, "--against", "onnxruntime")
    assert [row["status"] for row in report["results"]] == ["ok", "ok"]
    assert max(row["error"] for row in report["results"]) < 1e-6


def test_a_binary_of_another_network_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "net.onnx", 4)
    binary = str(tmp_path / "net.so")
    assert run(["compile", model, "-o", binary]) == 0
    stored = onnx.load(model)
    stored.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w"))
    onnx.save(stored, model)
    capsys.readouterr()
    report = bench(capsys, binary, "--onnx", model, "--against", "onnxruntime", code=1)
    assert [row["status"] for row in report["results"]] == ["wrong", "ok"]
    assert report["standings"][0]["ratio"] is None


def test_without_peers_nothing_but_time_is_measured(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(capsys, model)
    (row,) = report["results"]
    assert row["error"] is None
    assert report["error_against"] is None
    assert report["geometric_means"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--against", "guesswork"], "--against 'guesswork' is not known"),
        (["{model}", "--against", "torch"], "torch cannot read {model}; give a net.pt2 or file.py:function"),
        (["{folder}/net.py:net", "--against", "onnxruntime"], "give an ONNX file of it with --onnx"),
        (["{model}", "{model}", "--onnx", "{model}"], "--onnx is given 1 times for 2 models"),
        (["{model}", "--threads", "0"], "--threads '0' cannot be read"),
        (["{binary}", "--error", "float64"], "give --onnx FILE, or --error cnnc"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    arguments: list[str],
    message: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a peer would read is asked for whether or not it is installed here.
    monkeypatch.setitem(ENGINES, "torch", replace(ENGINES["torch"], needs=()))
    binary = str(tmp_path / "net.so")
    if "{binary}" in arguments:
        assert run(["compile", model, "-o", binary]) == 0
    places = {"model": model, "folder": str(tmp_path), "binary": binary}
    assert run(["bench", *(argument.format(**places) for argument in arguments), *QUICK]) == 2
    assert message.format(**places) in capsys.readouterr().err
