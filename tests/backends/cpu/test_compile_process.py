"""The process that compiles kernels beside a compile gives the very same code, or leaves the work to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cnnc
from cnnc.backends.cpu import build, compile_process
from cnnc.backends.cpu.codegen import KernelObject
from cnnc.backends.cpu.compile_process import CompileProcess, request_for
from cnnc.backends.cpu.compile_worker import requested
from cnnc.backends.cpu.generic import Generic
from cnnc.backends.cpu.kernel_cache import KernelCache
from cnnc.backends.lower.identity import kernel_key, kernel_symbol
from cnnc.errors import VerifyError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.op import OPERATORS
from cnnc.ir.types import TensorType
from cnnc.ops import Add, Gelu, Mul, Relu, Sigmoid
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.source import Input, constant
from cnnc.target import Target
from tests.backends.running import fused_op

TARGET = Target.parse("cpu:x86-64-v3", threads=2)
IMAGE = TensorType((2, 3, 5, 7))


def scheduled(kernel: Fused) -> Fused:
    (schedule,) = Generic().space(kernel, TARGET)
    return replace(kernel, schedule=schedule)


def some_kernels() -> dict[str, Fused]:
    x = call(Input("x", IMAGE))
    scaled = call(Mul(), call(Gelu(), x), constant(np.float32(0.1)))
    kernels = [fused_op(Relu(), [IMAGE]), fused_op(Add(), [IMAGE, IMAGE]), Fused(Graph("k", (x,), (scaled,)), "gelu")]
    return {kernel_symbol(kernel, TARGET): kernel for kernel in map(scheduled, kernels)}


def compiled(kernels: Mapping[str, Fused], process: CompileProcess | None) -> dict[str, KernelObject]:
    """Compile as a build does."""
    elsewhere = process.compile if process else build.nowhere
    objects, count = build._kernel_objects(dict(kernels), TARGET, KernelCache(None), lambda *_: None, elsewhere)
    assert count == len(kernels)
    return objects


@pytest.fixture
def process(tmp_path: Path) -> Iterator[CompileProcess]:
    process = CompileProcess(tmp_path)
    yield process
    process.close()


def signalled(process: CompileProcess, number: signal.Signals) -> None:
    process._process.send_signal(number)
    process._process.wait()


def test_its_code_is_the_code_made_here(process: CompileProcess):
    kernels = some_kernels()
    assert {kernel.symbol: kernel for kernel in process.compile(kernels, TARGET)} == compiled(kernels, None)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_arrives_as_it_was(name: str):
    for example in OPERATORS[name].examples():
        kernel = replace(fused_op(example.op, example.types), schedule=Schedule("generic", (("lanes", 8),)))
        arrived, target = requested(json.loads(request_for("symbol", kernel, TARGET)))
        assert (arrived.anchor, arrived.schedule, target) == (kernel.anchor, kernel.schedule, TARGET)
        assert kernel_key(arrived, target) == kernel_key(kernel, TARGET)


def test_what_arrives_changed_is_refused(monkeypatch: pytest.MonkeyPatch):
    kernel = scheduled(fused_op(Relu(), [IMAGE]))
    request = json.loads(request_for("symbol", kernel, TARGET))
    changes = {"schedule": "generic(lanes=3)", "target": "cpu:x86-64-v4", "body": request["body"].replace("5,7", "5,8")}
    for key, value in changes.items():
        with pytest.raises(VerifyError, match="is not what the other process has"):
            requested({**request, key: value})
    # As where the source was edited, and this process began before that.
    monkeypatch.setattr("cnnc.backends.lower.identity.source_digest", lambda: "another")
    with pytest.raises(VerifyError, match="is not what the other process has"):
        requested(request)


def test_what_it_refuses_is_compiled_here(process: CompileProcess, monkeypatch: pytest.MonkeyPatch):
    kernels = some_kernels()
    wanted = compiled(kernels, None)
    monkeypatch.setattr("cnnc.backends.lower.identity.source_digest", lambda: "another")
    assert list(process.compile(kernels, TARGET)) == []
    assert compiled(kernels, process) == wanted


def test_an_error_is_raised_as_it_is_here(process: CompileProcess):
    kernel = replace(scheduled(fused_op(Relu(), [IMAGE])), schedule=Schedule("nothing"))
    with pytest.raises(VerifyError, match="there is no kernel template 'nothing'"):
        compiled({"symbol": kernel}, process)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_rest_is_compiled_here_when_it_is_killed(process: CompileProcess, number: signal.Signals):
    kernels = some_kernels()
    wanted = compiled(kernels, None)

    def killed_on_the_way(some: Mapping[str, Fused], target: Target) -> Iterator[KernelObject]:
        for kernel in process.compile(some, target):
            yield kernel
            signalled(process, number)

    objects, _ = build._kernel_objects(kernels, TARGET, KernelCache(None), lambda *_: None, killed_on_the_way)
    assert objects == wanted
    assert compiled(kernels, process) == wanted


def test_a_crash_is_reported_and_not_repeated(process: CompileProcess):
    process._said.write_text("one line\nLLVM ERROR: out of registers\n")
    signalled(process, signal.SIGSEGV)
    with pytest.raises(VerifyError, match=r"crashed \(SIGSEGV\) while .*gelu_.*; its last words: LLVM ERROR: out"):
        compiled(some_kernels(), process)


@pytest.fixture
def no_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has just begun, on a machine with two CPUs."""
    monkeypatch.delitem(sys.modules, "tvm", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


@pytest.mark.usefixtures("no_tvm")
def test_it_ends_with_the_compile_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    interrupted = []
    with suppress(KeyboardInterrupt), compile_process.compile_process() as process:
        assert process is not None
        assert list(tmp_path.iterdir()) == [process._said.parent]
        interrupted.append(process)
        raise KeyboardInterrupt
    assert [process._process.returncode for process in interrupted] == [-signal.SIGKILL]
    assert list(tmp_path.iterdir()) == []


def test_it_ends_when_the_other_process_is_killed():
    code = """
import os, signal, pathlib, tempfile
from cnnc.backends.cpu.compile_process import CompileProcess
print(CompileProcess(pathlib.Path(tempfile.mkdtemp()))._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    end = time.monotonic() + 60
    while _runs(int(printed)):
        assert time.monotonic() < end
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("no_tvm")
@pytest.mark.parametrize("reason", ["one CPU", "TVM is here", "no interpreter", "no folder", "not wanted"])
def test_there_is_none_where_it_cannot_help(reason: str, monkeypatch: pytest.MonkeyPatch):
    if reason == "one CPU":
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    if reason == "TVM is here":
        monkeypatch.setitem(sys.modules, "tvm", sys)
    if reason == "no interpreter":
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
    if reason == "no folder":
        monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with compile_process.compile_process(wanted=reason != "not wanted") as process:
        assert process is None


def test_a_compile_with_it_gives_the_same_binary(process: CompileProcess, tmp_path: Path):
    x = call(Input("x", IMAGE))
    graph = Graph("net", (x,), (call(Sigmoid(), call(Add(), x, x)),))
    for name, helper in (("alone", None), ("helped", process)):
        cnnc.compile(graph, cache=False, helper=helper).save(tmp_path / name / "net.so")
    assert (tmp_path / "alone" / "net.so").read_bytes() == (tmp_path / "helped" / "net.so").read_bytes()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU has nothing to run it on")
def test_the_command_line_leaves_all_kernels_to_it(tmp_path: Path):
    code = """
import sys
from cnnc.cli.main import run
print(run(sys.argv[1:]), [name for name in ("tvm", "rich") if name in sys.modules])
"""
    model = f"{Path(__file__).parents[3] / 'examples' / 'simple_cnn.py'}:simple_cnn"
    command = [sys.executable, "-c", code, "compile", model, "-o", str(tmp_path / "net.so"), "--no-cache"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "0 []"
    x = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)
    np.testing.assert_array_equal(cnnc.load(tmp_path / "net.so")(x), cnnc.compile(model, cache=False)(x))
