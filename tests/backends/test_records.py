"""Tuned records: found again under what they were made for, kept whole, and never trusted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import cnnc.backends.records as records
from cnnc.backends.cache import DiskCache, ScheduleCache
from cnnc.backends.records import Record, RecordFile, TunedRecords, checked_schedule, record_key, store, tuned_records
from cnnc.errors import EnvironmentProblem
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.layout import Layout
from cnnc.ir.parse import parse_graph
from cnnc.ir.types import TensorType
from cnnc.ops import Conv, Relu
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.source import Input
from cnnc.target import CPUS, Target

TARGET = Target("cpu", "x86-64-v3", CPUS["x86-64-v3"])
SHIPPED = records.SHIPPED
LEGAL = "conv_direct(pixels=6,vectors=2,oc_tiles=1,rows=5,oc_outer=1,width=0,channels=0)"


def kernel(channels: int = 16, label: str = "x", loc: str = "conv1") -> Fused:
    x = call(Input(label, TensorType((1, 8, 5, 7), layout=Layout("NCHW8c"))))
    w = call(Input("w", TensorType((channels, 8, 3, 3), layout=Layout("OIHW8i8o"))))
    y = call(Relu(), call(Conv((1, 1), (1, 1, 1, 1), (1, 1)), x, w, loc=[loc]), loc=[loc])
    return Fused(Graph(f"{label}_kernel", (x, w), (y,)), "conv")


def record(fused: Fused, target: Target = TARGET, schedule: str = LEGAL, seconds: float = 1e-3) -> Record:
    return Record(
        key=record_key(fused, target),
        target=str(target),
        features=target.features,
        block=target.vector_lanes,
        threads=target.threads,
        kernel=records.kernel_text(fused),
        schedule=schedule,
        seconds=seconds,
        default=LEGAL,
        default_seconds=2e-3,
        tried=7,
        complete=True,
        date="2026-01-31",
        cpu="some CPU",
        cnnc="0.1.0",
    )


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")


def test_a_record_is_found_again(tmp_path: Path):
    path = tmp_path / "new" / "records.jsonl"
    store(path, record(kernel()))
    found = tuned_records(path, TARGET)
    assert found(kernel(), TARGET) == Schedule.parse(LEGAL)
    assert RecordFile(path)[record_key(kernel(), TARGET)] == record(kernel())
    assert not found.notes


def test_names_and_places_do_not_matter_but_everything_else_does():
    key = record_key(kernel(), TARGET)
    assert record_key(kernel(label="image", loc="file.py:3"), TARGET) == key
    others = [(kernel(32), TARGET), (kernel(), TARGET.with_threads(2))]
    others += [(kernel(), replace(TARGET, arch="haswell")), (kernel(), replace(TARGET, features=CPUS["x86-64-v4"]))]
    assert len({key, *(record_key(fused, target) for fused, target in others)}) == 5


def test_a_newer_record_takes_the_place_of_the_old_one(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    for fused, seconds in ((kernel(), 3.0), (kernel(32), 5.0), (kernel(), 4.0)):
        store(path, record(fused, seconds=seconds))
    lines = path.read_text().splitlines()
    assert [json.loads(line)["seconds"] for line in lines] == [5.0, 4.0]


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (LEGAL.replace("rows=5", "rows=4"), "no longer has the schedule"),
        (LEGAL.replace("rows", "lines"), "no longer has the schedule"),
        (LEGAL.replace("conv_direct", "conv_magic"), "no template"),
        ("winograd(tiles=1,pixels=1,group=1,oc_slices=1)", "no template"),
        ("conv_direct(pixels=six)", "invalid literal"),
        ("conv_direct(", "no longer has the schedule"),
    ],
)
def test_a_schedule_that_is_not_legal_any_more_is_ignored_with_a_note(tmp_path: Path, schedule: str, reason: str):
    path = tmp_path / "r.jsonl"
    store(path, record(kernel(), schedule=schedule))
    found = tuned_records(path, TARGET)
    assert found(kernel(), TARGET) is None
    (note,) = found.notes
    assert str(path) in note
    assert reason in note


@pytest.mark.parametrize("damage", ["{}", "[]", "null", '{"key": "KEY"}', '{"key": "KEY", "schedule', '{"key": "KEY",'])
def test_damaged_lines_are_ignored(tmp_path: Path, damage: str):
    path = tmp_path / "r.jsonl"
    store(path, record(kernel(32)))
    with path.open("a") as file:
        file.write(damage.replace("KEY", record_key(kernel(), TARGET)))
    found = tuned_records(path, TARGET)
    assert found(kernel(), TARGET) is None
    assert found(kernel(32), TARGET) == Schedule.parse(LEGAL)
    store(path, record(kernel()))
    assert tuned_records(path, TARGET)(kernel(), TARGET) == Schedule.parse(LEGAL)


@pytest.mark.parametrize("field", ["schedule", "features", "seconds"])
def test_fields_of_another_kind_are_ignored(tmp_path: Path, field: str):
    path = tmp_path / "r.jsonl"
    content = json.loads(record(kernel()).line())
    path.write_text(json.dumps({**content, field: {"a": 1} if field != "features" else 7}) + "\n")
    assert tuned_records(path, TARGET)(kernel(), TARGET) in (None, Schedule.parse(LEGAL))


def test_the_users_records_come_before_those_shipped(tmp_path: Path):
    other = LEGAL.replace("rows=5", "rows=3")
    store(tmp_path / "shipped" / "x86-64-v3.jsonl", record(kernel(), schedule=other))
    store(tmp_path / "shipped" / "x86-64-v3.jsonl", record(kernel(32), schedule=other))
    store(tmp_path / "own.jsonl", record(kernel()))
    found = tuned_records(tmp_path / "own.jsonl", TARGET)
    assert found(kernel(), TARGET) == Schedule.parse(LEGAL)
    assert found(kernel(32), TARGET) == Schedule.parse(other)
    assert tuned_records(False, TARGET)(kernel(), TARGET) is None


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_shipped_records_hold(path: Path):
    target = Target("cpu", path.stem, CPUS[path.stem])
    lines = path.read_bytes().splitlines()
    for found in map(Record.parse, lines):
        body = parse_graph(found.kernel)
        fused = Fused(body, max(body.nodes, key=lambda node: node.op.kind).op.name)
        assert record_key(fused, replace(target, threads=found.threads)) == found.key
        assert str(checked_schedule(found, fused, target)) == found.schedule
    assert lines


def test_an_invalid_record_of_the_user_leaves_the_shipped_one(tmp_path: Path):
    store(tmp_path / "shipped" / "x86-64-v3.jsonl", record(kernel()))
    store(tmp_path / "own.jsonl", record(kernel(), schedule="conv_direct(pixels=99)"))
    assert tuned_records(tmp_path / "own.jsonl", TARGET)(kernel(), TARGET) == Schedule.parse(LEGAL)


def test_the_users_file_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CNNC_RECORDS", str(tmp_path / "mine.jsonl"))
    assert tuned_records(True, TARGET)(kernel(), TARGET) is None
    store(records.user_file(), record(kernel()))
    assert tuned_records(True, TARGET)(kernel(), TARGET) == Schedule.parse(LEGAL)


def test_files_are_not_read_before_they_are_asked(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text("")
    found = tuned_records(path, TARGET)
    store(path, record(kernel()))
    assert found(kernel(), TARGET) == Schedule.parse(LEGAL)


def test_a_named_file_must_be_there(tmp_path: Path):
    with pytest.raises(EnvironmentProblem, match=r"none.jsonl: there is no such file of tuned records"):
        tuned_records(tmp_path / "none.jsonl", TARGET)


def test_what_is_no_plain_file_is_noted_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        found = tuned_records(path, TARGET)
        assert found(kernel(), TARGET) is None
        assert str(path) in found.notes[0]


def test_a_folder_that_cannot_be_written_is_an_error_of_the_environment(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot write"):
        store(tmp_path / "file" / "records.jsonl", record(kernel()))


_WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from cnnc.backends.records import Record, store
line = Path(sys.argv[1]).read_bytes()
for number in range(100000):
    store(Path(sys.argv[2]), replace(Record.parse(line), key=f"{number % 50:064x}"))
"""


def test_kill_leaves_whole_records(tmp_path: Path):
    path, one = tmp_path / "records.jsonl", tmp_path / "one"
    one.write_bytes(record(kernel()).line())
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(one), str(path)]) as writer:
            before = path.stat().st_mtime_ns if path.exists() else 0
            while not path.exists() or path.stat().st_mtime_ns == before:
                assert writer.poll() is None
                time.sleep(0.01)
            time.sleep(0.05)
            writer.send_signal(signal.SIGKILL)
        data = path.read_bytes()
        assert data.endswith(b"\n")
        assert all(Record.parse(line).schedule == LEGAL for line in data.splitlines())


@pytest.mark.parametrize("path", sorted((Path(records.__file__).parent / "cpu" / "records").glob("*.jsonl")), ids=str)
def test_every_shipped_record_is_legal_and_under_its_key(path: Path):
    lines = path.read_bytes().splitlines()
    assert lines
    for line in lines:
        found = Record.parse(line)
        fused = Fused(parse_graph(found.kernel), "conv")
        target = Target("cpu", path.stem, CPUS[path.stem], threads=found.threads)
        assert record_key(fused, target) == found.key
        assert checked_schedule(found, fused, target) == Schedule.parse(found.schedule)
        assert found.seconds <= found.default_seconds


def test_several_files_are_asked_in_order(tmp_path: Path):
    store(tmp_path / "b.jsonl", record(kernel()))
    files = [RecordFile(tmp_path / "a.jsonl"), RecordFile(tmp_path / "b.jsonl")]
    assert TunedRecords(files, ScheduleCache(None))(kernel(), TARGET) == Schedule.parse(LEGAL)


def test_only_legal_schedules_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, disk = tmp_path / "r.jsonl", DiskCache(tmp_path / "cache")
    looked: list[str] = []

    def look(found: Record, fused: Fused, target: Target) -> Schedule:
        looked.append(found.schedule)
        return checked_schedule(found, fused, target)

    monkeypatch.setattr(records, "checked_schedule", look)
    illegal = LEGAL.replace("rows=5", "rows=4")
    for schedule, wanted in ((illegal, None), (illegal, None), (LEGAL, LEGAL), (LEGAL, LEGAL)):
        store(path, record(kernel(), schedule=schedule))
        chosen = tuned_records(path, TARGET, disk)(kernel(), TARGET)
        assert chosen == (Schedule.parse(wanted) if wanted else None)
    assert looked == [illegal, illegal, LEGAL]
