"""`cnnc bench-gpu`, over stand-ins for nvcc and CUDA's driver: what was built is run, judged and timed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnc.cli.main import run
from cnnc.profiler.gpu.jobs import Manifest
from cnnc.profiler.gpu.turns import ROUNDS, take_turns
from tests.backends.cuda import fake_nvcc
from tests.backends.cuda.artifacts import FakeGpu
from tests.backends.cuda.emulator import needs_gxx

NETWORK = """
from cnnc.frontends.dsl import Tensor, conv, flatten, linear, network, relu

@network(x=(2, 5, 5))
def small(x: Tensor) -> Tensor:
    return relu(x >> conv(3, 3, pad=1, name="conv1")) >> flatten >> linear(7, name="fc")
"""


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> FakeGpu:
    return FakeGpu.build(tmp_path_factory.mktemp("libcuda"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network and two operators, built where no GPU is."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "net.py").write_text(NETWORK)
    nvcc = fake_nvcc.install(tmp_path_factory.mktemp("nvcc"))
    environment = {**os.environ, "PATH": f"{nvcc}{os.pathsep}{os.environ['PATH']}", "CNNC_CACHE_DIR": str(folder)}
    arguments = [f"{folder}/net.py:small", "--prepare", str(folder / "built"), "--target", "cuda:sm_80"]
    arguments += ["--batch", "1,3", "--dtype", "f32", "--operators", "relu,softmax"]
    done = cnnc(arguments, environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 artifacts for cuda:sm_80 in ")
    return folder / "built"


def cnnc(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cnnc.cli.main", "bench-gpu", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def measure(folder: Path, gpu: FakeGpu, *more: str, options: str = "") -> tuple[int, dict[str, Any], str]:
    out = folder / "out.json"
    arguments = ["--from", str(folder), "--out", str(out), "--seconds", "0.02", *more]
    done = cnnc(arguments, gpu.environment(options))
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text()), done.stdout


@needs_gxx
def test_what_was_prepared_is_checked_and_measured(prepared: Path, gpu: FakeGpu) -> None:
    code, report, said = measure(prepared, gpu, options="capability=90")
    assert (code, report["wrong"]) == (0, [])
    assert (report["device"], report["arch"], report["target"]) == ("stand-in 7", "sm_90", "cuda:sm_80")
    assert report["date"].endswith("UTC")
    assert [operator["operator"] for operator in report["operators"]] == ["relu", "softmax"]
    assert all(0 <= error <= 3e-2 for operator in report["operators"] for error in operator["errors"])
    assert [(row["network"], row["dtype"], row["batch"]) for row in report["networks"]] == [
        ("small", "f32", 1),
        ("small", "f32", 3),
    ]
    for row in report["networks"]:
        assert 0 < row["error"] < 1e-5
        ours = row["engines"]["cnnc"]
        assert ours["interval"] > 0
        assert ours["latency"] > 0
        assert set(row["missing"]) == {"torch-eager", "torch-graph", "torch-compile"}
    assert "2 of 2 operators agree with the interpreter" in said
    assert "missing  torch-eager: torch " in said


@needs_gxx
def test_a_wrong_number_is_named(prepared: Path, gpu: FakeGpu, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "built")
    with np.load(folder / "network-small-f32.npz") as stored:
        arrays = dict(stored)
    arrays["y0"].view(np.float32)[9] += 0.01
    np.savez(folder / "network-small-f32.npz", **arrays)
    code, report, said = measure(folder, gpu, "--peers", "none")
    assert code == 1
    (wrong,) = report["wrong"]
    assert wrong.startswith("network small f32: batch 3, output ")
    assert f"WRONG    {wrong}" in said
    # The first image is right, so batch size 1 is; it is measured, and the other is not.
    assert [bool(row["engines"]) for row in report["networks"]] == [True, False]


@needs_gxx
def test_a_failure_of_the_gpu_spoils_nothing_else(prepared: Path, gpu: FakeGpu) -> None:
    """The second graph fails in every process; each job has a process that is whole when it begins."""
    code, report, _ = measure(prepared, gpu, "--peers", "none", options="fail=cuGraphLaunch:719:1")
    assert code == 1
    assert len(report["wrong"]) == 3
    assert all("unspecified launch failure (CUDA error 719)" in sentence for sentence in report["wrong"])
    code, report, _ = measure(prepared, gpu, "--peers", "none", options="capability=75")
    assert code == 1
    assert all("the model was compiled for another GPU" in sentence for sentence in report["wrong"])


@pytest.mark.parametrize("arguments", [[], ["--from", "."]])
def test_without_a_gpu_it_says_so(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnnc.cli.bench_gpu.cuda_driver", lambda: None)
    assert run(["bench-gpu", *arguments]) == 6
    said = capsys.readouterr().err
    assert "there is no CUDA driver on this machine" in said
    assert "cnnc bench-gpu --prepare DIR builds here what a machine with one then runs by --from DIR" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prepare", "a", "--from", "b"], "give one of them"),
        (["--prepare", "a", "--target", "cpu"], "is no GPU; use cuda:ARCH"),
        (["--prepare", "a", "--dtype", "f8"], "--dtype 'f8' is not known; use f32"),
        (["--prepare", "a", "--operators", "gelu,nothing"], "--operators 'nothing' is not known"),
        (["--prepare", "a", "--peers", "jax"], "--peers 'jax' is not known; use torch-eager, torch-graph"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.chdir(tmp_path)
    assert run(["bench-gpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_something_else(tmp_path: Path, gpu: FakeGpu) -> None:
    done = cnnc(["--from", str(tmp_path)], gpu.environment())
    assert done.returncode == 3
    assert "was not made by cnnc bench-gpu --prepare" in done.stderr


@needs_gxx
def test_the_manifest_names_what_is_there(prepared: Path) -> None:
    for job in Manifest.read(prepared).jobs:
        assert (prepared / f"{job.stem}.so").exists()
        assert (prepared / f"{job.stem}.npz").exists()


class Counted:
    """An engine that notes its turns."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name = name
        self.turns = turns

    def start(self) -> None:
        if self.turns[-1:] != [self.name]:
            self.turns.append(self.name)

    def wait(self) -> None:
        pass


def test_engines_take_turns() -> None:
    turns: list[str] = []
    timings = take_turns([Counted("a", turns), Counted("b", turns)], 1e-4)
    assert turns == ["a", "b"] * (ROUNDS + 1)
    assert set(timings) == {"a", "b"}
    assert all(timing.latency > 0 and timing.interval > 0 for timing in timings.values())
