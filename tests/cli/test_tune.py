"""`cnnc tune` from outside: records that the next compile uses, that outlive a kill, and that are never wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cnnc.backends.cpu.templates import template
from cnnc.backends.records import Record, RecordFile
from cnnc.cli.main import run
from cnnc.cli.progress import seconds_left
from cnnc.ir.graph import Graph
from cnnc.ops.fused import Fused, Schedule

NETWORK = """
from cnnc.frontends.dsl import conv, linear, flatten, max_pool, network, relu

@network(x=(3, 24, 24))
def tiny(x):
    x = x >> conv(16, 3, pad=1, name="conv1") >> relu >> max_pool(2)
    x = x >> conv(32, 3, pad=1, name="conv2") >> relu
    return x >> flatten >> linear(7, name="fc")
"""
FEW = ["--candidates", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.py"
    path.write_text(NETWORK)
    return f"{path}:tiny"


@pytest.fixture(scope="module", autouse=True)
def _short_comparison() -> Iterator[None]:
    """Compare whole runs no longer than needed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnc.cli.tune._COMPARED_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def tuned(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    """Tune the network, and give the file of records and the report."""
    file, out = tmp_path_factory.mktemp("records") / "new" / "records.jsonl", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(["tune", model, "--records", str(file), *FEW, "--json"]) == 0
    return file.read_bytes(), json.loads(out.getvalue())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


def records(file: Path) -> list[Record]:
    return [Record.parse(line) for line in file.read_bytes().splitlines()]


def schedules(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Give the schedules that a compile chooses."""
    assert run(["profile", *arguments, "--repeats", "1", "--json"]) == 0
    return [kernel["schedule"] for kernel in json.loads(capsys.readouterr().out)["kernels"]]


def test_records_are_written_and_used_by_the_next_compile(
    model: str, tuned: tuple[bytes, dict[str, Any]], file: Path, capsys: pytest.CaptureFixture[str]
):
    content, report = tuned
    file.write_bytes(content)
    assert report["tuned"] == report["distinct"] == len(report["kernels"]) == len(records(file)) == 4
    assert [k["share"] for k in report["kernels"]] == sorted((k["share"] for k in report["kernels"]), reverse=True)
    assert all(0 < k["seconds"] <= k["default_seconds"] and k["complete"] for k in report["kernels"])
    assert set(report["run_seconds"]) == {"untuned", "tuned"}
    untuned = schedules([model, "--no-records"], capsys)
    assert all(record.default in untuned for record in records(file))
    chosen = schedules([model, "--records", str(file)], capsys)
    assert all(record.schedule in chosen for record in records(file))


def test_a_record_that_differs_from_the_default_decides(
    model: str, tuned: tuple[bytes, dict[str, Any]], file: Path, capsys: pytest.CaptureFixture[str]
):
    file.write_bytes(tuned[0])
    old = next(r for r in records(file) if "dense" in r.schedule)
    name, _, value = old.default.rpartition("tiles=")
    other = f"{name}tiles={4 if value == '1)' else 1})"
    file.write_bytes(replace(old, schedule=other).line())
    assert other in schedules([model, "--records", str(file)], capsys)
    assert other not in schedules([model, "--no-records"], capsys)
    assert other not in schedules([model, "--records", str(file), "--threads", "2"], capsys)


def test_a_record_without_a_place_in_the_space_is_noted(
    model: str, tuned: tuple[bytes, dict[str, Any]], file: Path, capsys: pytest.CaptureFixture[str]
):
    file.write_bytes(tuned[0])
    file.write_bytes(b"".join(replace(r, schedule="dense(rows=77)").line() for r in records(file)))
    untuned = schedules([model, "--no-records"], capsys)
    assert run(["profile", model, "--records", str(file), "--repeats", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert [kernel["schedule"] for kernel in json.loads(captured.out)["kernels"]] == untuned
    assert f"{file}: {len(records(file))} tuned record(s) ignored" in captured.err


def test_resume_leaves_complete_records_alone(
    model: str, tuned: tuple[bytes, dict[str, Any]], file: Path, capsys: pytest.CaptureFixture[str]
):
    file.write_bytes(tuned[0])
    first, second, *others = records(file)
    file.write_bytes(first.line() + replace(second, complete=False).line() + b"".join(r.line() for r in others[1:]))
    assert run(["tune", model, "--records", str(file), *FEW, "--resume", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["tuned"], report["left_out"]) == (2, 2)
    assert first in records(file)
    assert all(record.complete for record in records(file))
    assert run(["tune", model, "--records", str(file), *FEW, "--resume"]) == 0
    assert "nothing to tune" in capsys.readouterr().out


def test_the_report_for_people(model: str, file: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["tune", model, "--records", str(file), "--candidates", "2"]) == 0
    out = capsys.readouterr().out
    assert "tuned 4 of 4 kernels" in out
    assert "the untuned choice reaches" in out
    assert str(file) in out


def test_no_time_is_no_records(model: str, file: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["tune", model, "--records", str(file), "--time", "0s"]) == 0
    assert "time ran out" in capsys.readouterr().out
    assert not file.exists()


def test_kill_keeps_what_was_measured_and_resume_goes_on(model: str, file: Path, capsys: pytest.CaptureFixture[str]):
    command = [sys.executable, "-m", "cnnc.cli.main", "tune", model, "--records", str(file), *FEW]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}) as search:
        while not file.exists():
            assert search.poll() is None
            time.sleep(0.005)
        search.send_signal(signal.SIGKILL)
    kept = records(file)
    assert kept
    assert run(["tune", model, "--records", str(file), *FEW, "--resume", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["left_out"] == len(kept)
    assert len(records(file)) == report["distinct"]
    assert all(record in records(file) for record in kept)


class _Wrong:
    """A template that forgets the activation, but for the default schedules."""

    def __init__(self, name: str, defaults: list[str]) -> None:
        self._right = template(name)
        self._defaults = defaults

    def build(self, kernel: Fused, schedule: Schedule, target: Any) -> Any:
        last = kernel.body.outputs[0]
        if last.op.name == "relu" and str(schedule) not in self._defaults:
            kernel = replace(kernel, body=Graph("kernel", kernel.body.inputs, last.node.inputs))
        return self._right.build(kernel, schedule, target)


def test_wrong_numbers_are_a_bug_report_and_no_record(
    model: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    defaults = schedules([model, "--no-records"], capsys)
    monkeypatch.setattr("cnnc.profiler.kernel_bench.template", lambda name: _Wrong(name, defaults))
    assert run(["tune", model, "--records", str(file), *FEW]) == 70
    error = capsys.readouterr().err
    assert "cnnc: bug: conv_direct(" in error
    assert "gives other numbers" in error
    assert "relu(" in error
    convolutions = [record for record in records(file) if "relu(" in record.kernel]
    assert convolutions
    assert all(record.schedule == record.default for record in convolutions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "soon"], "soon"),
        (["--time", "-3s"], "-3s"),
        (["--candidates", "1"], "candidates"),
    ],
)
def test_usage_errors(model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert run(["tune", model, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_records_options_of_a_compile(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    compile_ = ["compile", model, "-o", str(tmp_path / "t.so")]
    assert run([*compile_, "--records", str(tmp_path / "none.jsonl")]) == 6
    assert "none.jsonl" in capsys.readouterr().err
    assert run([*compile_, "--records", str(tmp_path / "none.jsonl"), "--no-records"]) == 2
    assert run(compile_) == 0
    assert run(["tune", str(tmp_path / "t.so")]) == 2
    assert "cannot be tuned" in capsys.readouterr().err


def test_a_damaged_file_of_records_does_not_stop_a_compile(model: str, file: Path, tmp_path: Path):
    file.write_bytes(b'{"key": "' + b"0" * 64 + b'"\xff\x00\n{"key": "\n')
    assert run(["compile", model, "-o", str(tmp_path / "t.so"), "--records", str(file)]) == 0
    assert RecordFile(file).keys == ["0" * 64]


def test_time_left():
    assert seconds_left(0, 10, 5.0, 60.0) == 0.0
    assert seconds_left(5, 10, 20.0, 60.0) == 20.0
    assert seconds_left(5, 10, 50.0, 60.0) == 10.0
    assert seconds_left(5, 10, 70.0, 60.0) == 0.0
    assert seconds_left(5, 10, 20.0, float("inf")) == 20.0


def test_kernels_with_weights_of_16_bits_have_records_of_their_own(
    model: str, tuned: tuple[bytes, dict[str, Any]], file: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["tune", model, "--weights", "bf16", "--records", str(file), *FEW, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tuned"] == report["distinct"] == len(records(file)) == 4
    narrow = [record for record in records(file) if "bf16[" in record.kernel]
    assert len(narrow) == 3
    assert not {record.key for record in narrow} & {json.loads(line)["key"] for line in tuned[0].splitlines()}
    chosen = schedules([model, "--weights", "bf16", "--records", str(file)], capsys)
    assert all(record.schedule in chosen for record in records(file))
