"""`--weights f16|bf16` from outside: the size of files, the errors that are printed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import cnnc
from cnnc.cli.main import run
from cnnc.cli.precision import BUDGET
from cnnc.driver import Report, load_graph
from cnnc.errors import UsageError
from cnnc.ir.interp import evaluate
from cnnc.ir.parse import parse_graph
from cnnc.ir.text import print_graph, weights_of
from cnnc.profiler.accuracy import relative_error

NETWORK = """
from cnnc.frontends.dsl import *

@network(x=(3, 21, 19))
def net(x):
    x = x >> conv(24, 5, pad=2, stride=2, name="stem") >> batch_norm >> relu
    y = x >> conv(24, 3, pad=1, groups=24, name="depthwise") >> relu >> conv(40, 1, name="pointwise") >> batch_norm
    y = y >> relu >> conv(33, 3, pad=1, name="conv3") >> relu
    return y >> flatten >> linear(200, name="fc1") >> relu >> linear(11, name="fc2")
"""

WEIGHTS = 24 * 3 * 25 + 24 * 9 + 40 * 24 + 33 * 40 * 9 + 200 * 33 * 11 * 10 + 11 * 200


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(NETWORK.replace("import *", "import Tensor, batch_norm, conv, flatten, linear, network, relu"))
    return f"{path}:net"


@pytest.mark.parametrize("stored", ["f16", "bf16"])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_whole_network_stays_within_its_bound(model: str, stored: str, level: int):
    report = Report()
    module = cnnc.compile(model, weights=stored, level=level, records=False, report=report)
    graph = load_graph(model)
    x = np.random.default_rng(level).standard_normal((1, 3, 21, 19)).astype(np.float32)
    feeds = {graph.input_names[0]: x}
    got = module.run(feeds)
    for name, wanted in evaluate(graph, feeds, precise=True).items():
        assert 1e-5 < relative_error(got[name], wanted) < {"f16": 2e-3, "bf16": 1.5e-2}[stored]
    # Beyond the rounding of its weights the binary adds nothing: it is what its own graph says.
    assert module.build is not None
    for name, wanted in evaluate(module.build.graphs[0], feeds, precise=True).items():
        assert relative_error(got[name], wanted) < 5e-6
    assert report.stored is not None
    assert report.stored.narrow == 6
    assert report.stored.kept == ()


def test_files_halve_as_far_as_they_are_weights(model: str, tmp_path: Path):
    sizes, held = {}, {}
    for stored in ("f32", "bf16", "f16"):
        path = tmp_path / f"{stored}.so"
        report = Report()
        cnnc.compile(model, weights=stored, exact=True, records=False, report=report).save(path, emit=("so",))
        sizes[stored], held[stored] = path.stat().st_size, report.weight_bytes
    for stored in ("bf16", "f16"):
        saved = held["f32"] - held[stored]
        # Blocked layouts fill channels up, in either type alike, and each constant begins at a multiple of 64 bytes.
        assert 2 * WEIGHTS <= saved <= 2.2 * WEIGHTS
        assert abs(sizes["f32"] - sizes[stored] - saved) < 40_000


def test_compile_prints_the_measured_error(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "n.so"
    assert run(["compile", model, "-o", str(path), "--weights", "bf16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["stored"]["dtype"] == "bf16"
    assert report["stored"]["narrow"] == 6
    assert report["stored"]["kept"] == []
    assert any("stem" in constant["name"] for constant in report["stored"]["wide"])
    (error,) = report["error"]["relative_l2"].values()
    # The same, measured in another way: against numpy, on other inputs.
    binary, graph = cnnc.load(path), load_graph(model)
    feeds = {graph.input_names[0]: np.random.default_rng(7).standard_normal((1, 3, 21, 19)).astype(np.float32)}
    (name,) = graph.output_names
    exact = relative_error(binary.run(feeds)[name], evaluate(graph, feeds, precise=True)[name])
    assert error == pytest.approx(exact, rel=0.6)

    assert run(["compile", model, "-o", str(path), "--weights", "f16"]) == 0
    text = capsys.readouterr().out
    assert "weights  6 in f16 (" in text
    assert " relative L2 of " in text
    assert ", against f32 weights on 4 random inputs" in text
    assert run(["compile", model, "-o", str(path), "--weights", "f16", "--no-measure-error"]) == 0
    assert "error    not measured: --no-measure-error" in capsys.readouterr().out
    assert run(["compile", model, "-o", str(path)]) == 0
    text = capsys.readouterr().out
    assert "error" not in text
    assert "f16" not in text


def test_a_target_this_machine_cannot_run_measures_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cnnc.target.machine_flags", lambda: frozenset({"avx2"}))
    arguments = ["compile", model, "-o", str(tmp_path / "n.so"), "--weights", "bf16", "--target", "cpu:x86-64-v3"]
    assert run(arguments) == 0
    assert "error    not measured: this machine lacks cx16, popcnt, " in capsys.readouterr().out


@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
def test_verify_knows_what_to_expect(model: str, stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = str(tmp_path / "n.so")
    assert run(["compile", model, "-o", path, "--weights", stored, "--no-measure-error"]) == 0
    capsys.readouterr()
    assert run(["verify", model, path, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tolerance"] == BUDGET[stored]
    assert report["results"][0]["relative_l2"] < BUDGET[stored] / 3
    assert cnnc.load(path).meta["options"]["weights"] == stored
    assert run(["verify", model, path, "--tolerance", "1e-9"]) == 1


def test_weights_too_large_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from cnnc.ir.build import call
    from cnnc.ir.graph import Graph
    from cnnc.ops import Dense, constant, graph_input

    large = np.full((3, 8), 1.5, np.float32)
    large[0, 0] = 1e6
    x = graph_input("x", (1, 8))
    graph = Graph("net", (x,), (call(Dense(), x, constant(large, label="fc.weight")),), ("y",))
    path = tmp_path / "net.ir"
    path.write_text(print_graph(graph))
    np.savez(path.with_suffix(".npz"), **{k: a.reshape(-1).view(np.uint8) for k, a in weights_of(graph).items()})
    assert run(["compile", str(path), "-o", str(tmp_path / "n.so"), "--weights", "f16"]) == 0
    text = capsys.readouterr().out
    assert "in f32   fc.weight : f32[3,8] holds 1e+06, too large for f16" in text
    assert "weights  0 in f16 (0 bytes), 1 other constant in f32 (96 bytes)" in text
    assert "error    0.00e+00" in text


def test_the_ir_beside_the_binary_reads_back(model: str, tmp_path: Path):
    cnnc.compile(model, weights="bf16", records=False).save(tmp_path / "n.so", emit=("so", "ir"))
    arrays = dict(np.load(tmp_path / "n.npz"))
    graph = parse_graph((tmp_path / "n.ir").read_text(), arrays)
    assert " : bf16[" in print_graph(graph)
    assert print_graph(graph) == (tmp_path / "n.ir").read_text()
    x = np.random.default_rng(3).standard_normal((1, 3, 21, 19)).astype(np.float32)
    (wanted,) = evaluate(graph, {graph.input_names[0]: x}).values()
    assert relative_error(cnnc.load(tmp_path / "n.so")(x), wanted) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "f8"], "'f8' is not one of 'f32', 'f16', 'bf16'"),
        (["--weights", "f16", "--target", "cpu:x86-64-v2"], "use bf16, or cpu:x86-64-v3"),
        (["--weights", "bf16", "--passes", "fuse,tile"], "put narrow_weights{dtype=bf16} before fuse into the list"),
    ],
)
def test_mistakes(model: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["compile", model, "-o", str(tmp_path / "n.so"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "n.so").exists()


def test_python_refuses_other_types(model: str):
    with pytest.raises(UsageError, match="weights 'int8' are not known; use f32, bf16, f16"):
        cnnc.compile(model, weights="int8")
