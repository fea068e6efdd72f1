"""Linking: what is in a binary, what is not, and what happens when tools or disk fail."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnc.backends.host import elf_data, toolchain
from cnnc.backends.host.driver import exported_symbols
from cnnc.backends.host.elf_data import HUGE_PAGE, stretch_section
from cnnc.backends.host.header import emit_header
from cnnc.backends.host.library import SharedModel
from cnnc.backends.host.link import build_executable, build_object, build_shared
from cnnc.backends.host.program import KernelCall, Program, Slot
from cnnc.errors import EnvironmentProblem, VerifyError


def tool_output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def library(small: Any, kernels: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lib") / "small.so"
    build_shared(small.program, [kernels], path)
    return path


def test_only_libc_and_libm_are_needed(library: Path) -> None:
    dynamic = tool_output("readelf", "-dW", library)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0"}
    undefined = tool_output("nm", "-D", "--undefined-only", library).split()[1::2]
    assert undefined
    assert all("@GLIBC_" in symbol for symbol in undefined), undefined


def test_only_the_public_functions_are_visible(library: Path, small: Any) -> None:
    lines = tool_output("nm", "-D", "--defined-only", library).splitlines()
    assert sorted(line.split()[-1] for line in lines) == list(exported_symbols(small.program))


def test_hardened_and_weights_read_only(library: Path) -> None:
    headers = tool_output("readelf", "-lW", library)
    assert re.search(r"GNU_STACK .* RW +0x", headers)
    assert "GNU_RELRO" in headers
    assert "NOW" in tool_output("readelf", "-dW", library)
    assert not re.search(r"LOAD .* RWE", headers)
    sections = tool_output("readelf", "-SW", library)
    row = next(line for line in sections.splitlines() if ".cnnc_weights" in line)
    assert row.split()[-1] == "4096"
    assert row.split()[-4] == "A"
    assert "build-id" not in sections


def test_weights_fill_a_segment_of_their_own(library: Path, small: Any) -> None:
    weights = b"".join(small.program.weights)
    loads = re.findall(r"LOAD +(\S+) (\S+) \S+ (\S+) (\S+) (R.{2}) ", tool_output("readelf", "-lW", library))
    *_, (offset, address, in_file, in_memory, rights) = loads
    assert (int(in_file, 16), int(in_memory, 16)) == (len(weights), len(weights))
    assert rights == "R  "
    start = int(offset, 16)
    assert library.read_bytes()[start : start + len(weights)] == weights
    fields = re.search(r"\.cnnc_weights +PROGBITS +(\S+) (\S+) (\S+)", tool_output("readelf", "-SW", library))
    assert fields is not None
    assert [int(field, 16) for field in fields.groups()] == [int(address, 16), start, len(weights)]


def test_large_weights_start_a_huge_page(
    small: Any, kernels: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the file as in memory, in segment and section headers; and what is in them is the same."""
    weights = b"".join(small.program.weights)
    monkeypatch.setattr(elf_data, "HUGE_DATA", len(weights))
    library = tmp_path / "small.so"
    build_shared(small.program, [kernels], library)
    loads = re.findall(r"LOAD +(\S+) (\S+) \S+ (\S+) \S+ R {2} +(\S+)", tool_output("readelf", "-lW", library))
    *_, (offset, address, in_file, alignment) = [[int(field, 16) for field in load] for load in loads]
    assert offset > 0
    assert (offset % HUGE_PAGE, address % HUGE_PAGE, alignment) == (0, 0, HUGE_PAGE)
    assert library.read_bytes()[offset : offset + in_file] == weights
    fields = re.search(r"\.cnnc_weights +PROGBITS +(\S+) (\S+) (\S+)", tool_output("readelf", "-SW", library))
    assert fields is not None
    assert [int(field, 16) for field in fields.groups()] == [address, offset, in_file]
    x = small.inputs(3)
    with SharedModel(library).create(2) as context:
        y, _ = context.run([x])
    np.testing.assert_allclose(y, small.expected(x)[0], rtol=1e-5)


@pytest.mark.parametrize("most", [1, 2, 512])
def test_pieces_are_written_one_after_the_other(tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the system takes less at a time than it is given, and where pieces are empty."""
    pieces = [b"abc", b"", memoryview(np.zeros((2, 0), np.float32)), memoryview(np.arange(5, dtype=np.int16)), b"z"]
    monkeypatch.setattr(elf_data, "_MOST_PIECES", most)
    monkeypatch.setattr("os.writev", lambda file, views: os.write(file, b"".join(views)[:2]))
    with (tmp_path / "file").open("wb", buffering=0) as file:
        elf_data._write_all(file.fileno(), pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(bytes(piece) for piece in pieces)


def test_a_linker_that_places_weights_among_the_rest(small: Any, kernels: bytes, tmp_path: Path) -> None:
    build_object(small.program, [kernels], tmp_path / "small.o")
    tool_output("cc", "-shared", "-o", tmp_path / "plain.so", tmp_path / "small.o", "-lm")
    with pytest.raises(EnvironmentProblem, match="a segment of its own"):
        stretch_section(tmp_path / "plain.so", ".cnnc_weights", small.program.weights)
    with pytest.raises(EnvironmentProblem, match="the linker dropped the section"):
        stretch_section(tmp_path / "plain.so", ".other", small.program.weights)


def test_driver_code_runs_on_any_x86_64(small: Any, tmp_path: Path) -> None:
    from cnnc.backends.host.driver import emit_driver

    (tmp_path / "driver.o").write_bytes(emit_driver(small.program))
    for index, data in enumerate(toolchain.runtime_objects()):
        (tmp_path / f"runtime{index}.o").write_bytes(data)
    code = "".join(tool_output("objdump", "-d", path) for path in sorted(tmp_path.glob("*.o")))
    assert "<cnnc_rt_create>" in code
    assert not re.search(r"%[yz]mm|\tv[a-z]", code)


def test_same_bytes_wherever_built(small: Any, kernels: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = {"so": build_shared, "exe": build_executable, "o": build_object}
    made: dict[str, list[bytes]] = {kind: [] for kind in builds}
    for place in ("one", "another/much longer folder"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        monkeypatch.setenv("CNNC_CACHE_DIR", str(folder / "cache"))
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.chdir(folder)
        for kind, build in builds.items():
            build(small.program, [kernels], folder / f"{place[:3]}.{kind}")
            made[kind].append((folder / f"{place[:3]}.{kind}").read_bytes())
    for kind, (first, second) in made.items():
        assert first == second, kind
        assert str(tmp_path).encode() not in first
        assert b"/usr/" not in first.replace(b"/usr/lib64/ld", b"")


C_CALLER = r"""
#include <stdio.h>
#include "small.h"
int main(void) {
  static float x[small_INPUT_0_BYTES / sizeof(float)];
  static float y[small_OUTPUT_0_BYTES / sizeof(float)];
  static int32_t best[small_OUTPUT_1_BYTES / sizeof(int32_t)];
  small_context *context;
  const void *inputs[small_INPUT_COUNT];
  void *outputs[small_OUTPUT_COUNT];
  uint64_t calls = 0;
  int code;
  unsigned i;
  inputs[0] = x;
  outputs[0] = y;
  outputs[1] = best;
  for (i = 0; i < sizeof x / sizeof x[0]; i++) x[i] = (float)i / 100 - 2;
  if (small_abi_version() != small_ABI_VERSION) return 10;
  code = small_create(2, &context);
  if (code == small_OK) code = small_profile(context, 1);
  if (code == small_OK) code = small_run(context, inputs, outputs);
  if (code != small_OK) {
    fprintf(stderr, "%s\n", small_error_text(code));
    return 11;
  }
  if (small_kernel_ns(context, 0, &calls) == 0 || calls != 1) return 12;
  if (small_input(0)->rank != 2 || small_input(0)->dims[1] != 32 || small_input(1) || small_input(-1)) return 13;
  if (small_kernel(1)->layer_count != 2 || small_output(1)->dtype != small_I32 || small_kernel(3)) return 14;
  for (i = 0; i < sizeof y / sizeof y[0]; i++) printf("%.9g\n", (double)y[i]);
  fprintf(stderr, "%s %d %s\n", small_meta(), small_threads(context), small_error_text(small_ERROR_BUSY));
  return small_destroy(context);
}
"""


@pytest.mark.parametrize("kind", ["shared", "object"])
@pytest.mark.parametrize("language", ["-std=c99", "-std=c++11"])
def test_a_c_program_gets_the_same_numbers(
    small: Any, kernels: bytes, tmp_path: Path, kind: str, language: str
) -> None:
    target = tmp_path / ("libsmall.so" if kind == "shared" else "small.o")
    (build_shared if kind == "shared" else build_object)(small.program, [kernels], target)
    (tmp_path / "small.h").write_text(emit_header(small.program))
    source = tmp_path / ("main.c" if "c99" in language else "main.cc")
    source.write_text(C_CALLER)
    compiler = "gcc" if "c99" in language else "g++"
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", language]
    command = [compiler, *flags, source, target, "-lm", "-lpthread", f"-Wl,-rpath,{tmp_path}", "-o", tmp_path / "main"]
    subprocess.run(list(map(str, command)), check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    x = (np.arange(12 * 32, dtype=np.float32) / np.float32(100) - np.float32(2)).reshape(12, 32)
    got = np.array(done.stdout.split(), np.float32).reshape(12, 20)
    build_shared(small.program, [kernels], tmp_path / "again.so")
    np.testing.assert_array_equal(got, SharedModel(tmp_path / "again.so").create().run([x])[0])
    np.testing.assert_allclose(got, small.expected(x)[0], rtol=1e-5)
    assert done.stderr.startswith('{"made_by": "a test"} 2 the context is in use')


@pytest.mark.parametrize("kind", ["shared", "object"])
def test_two_models_in_one_program(make_small: Any, kernels: bytes, tmp_path: Path, kind: str) -> None:
    names = ("first", "second")
    for seed, name in enumerate(names):
        program = make_small(seed, name).program
        target = tmp_path / (f"lib{name}.so" if kind == "shared" else f"{name}.o")
        (build_shared if kind == "shared" else build_object)(program, [kernels], target)
        (tmp_path / f"{name}.h").write_text(emit_header(program))
    calls = "".join(
        f"  {{ {n}_context *c; static float y[240]; static int32_t b[12]; void *out[2] = {{y, b}};\n"
        f"    if ({n}_create(2, &c) || {n}_run(c, in, out) || {n}_destroy(c)) return 1;\n"
        f'    printf("%.9g %s\\n", (double)y[7], {n}_kernel(0)->symbol); }}\n'
        for n in names
    )
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "first.h"\n#include "second.h"\n'
        "int main(void) {\n  static const float x[384] = {1, 2, 3};\n  const void *in[1] = {x};\n"
        + calls
        + "  return 0;\n}\n"
    )
    targets = sorted(tmp_path.glob("*.so" if kind == "shared" else "*.o"))
    command = ["gcc", "-Wall", "-Wextra", "-Werror", "-pedantic", tmp_path / "main.c", *targets, "-lm"]
    subprocess.run(list(map(str, [*command, f"-Wl,-rpath,{tmp_path}", "-o", tmp_path / "main"])), check=True)
    lines = tool_output(tmp_path / "main").splitlines()
    x = np.zeros((12, 32), np.float32)
    x[0, :3] = 1, 2, 3
    wanted = [make_small(seed).expected(x)[0][0, 7] for seed in (0, 1)]
    np.testing.assert_allclose([float(line.split()[0]) for line in lines], wanted, rtol=1e-5)


def test_a_missing_feature_of_this_cpu_is_named(kernels: bytes, tmp_path: Path) -> None:
    import llvmlite.binding as llvm

    here = llvm.get_host_cpu_features()
    names = re.findall(r'FEATURE\("([^"]+)"', (toolchain.RUNTIME / "cpu.c").read_text())
    assert len(names) > 60
    ask: Any = None
    for name in names:
        program = Program("f", (), (), (KernelCall("nothing", (Slot("arena", 0),)),), 64, 0, b"", features=(name,))
        build_shared(program, [kernels], tmp_path / "f.so")
        model = SharedModel(tmp_path / "f.so")
        handle = ctypes.c_void_p()
        code = model.table.create(1, ctypes.byref(handle))
        present = here.get(name, here.get("sahf") if name == "lahf" else None)
        if present is not None:
            assert (code == 0) == present, name
        if code == 0:
            assert model.table.destroy(handle) == 0
        else:
            assert code == 701
            ask = model.table.error_text(701).decode()
            assert f"lacks {name}," in ask
    assert ask is not None, "this CPU has every feature of the table: add the newest ones"


def test_missing_compiler_is_an_environment_problem(
    small: Any, kernels: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for build in (build_shared, build_executable):
        with pytest.raises(EnvironmentProblem, match="no C compiler found: install gcc or clang"):
            build(small.program, [kernels], tmp_path / "out")
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(EnvironmentProblem, match="named by CC is not there: 'no-such-compiler'"):
        build_shared(small.program, [kernels], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_tells_why(
    small: Any, kernels: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "cc --no-such-flag")
    with pytest.raises(EnvironmentProblem, match="no-such-flag"):
        build_shared(small.program, [kernels], tmp_path / "out")


def test_kernels_that_do_not_link_are_our_bug(broken_kernels: bytes, kernels: bytes, tmp_path: Path) -> None:
    call = KernelCall("needs_missing", (Slot("arena", 0),))
    program = Program("p", (), (), (call,), 64, 0, b"")
    with pytest.raises(VerifyError, match="no_such_function"):
        build_shared(program, [broken_kernels], tmp_path / "p.so")
    with pytest.raises(VerifyError, match="needs_missing"):
        build_shared(program, [kernels], tmp_path / "p.so")
    with pytest.raises(VerifyError, match="multiple definition"):
        build_shared(Program("p", (), (), (), 64, 0, b""), [kernels, kernels], tmp_path / "p.so")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(small: Any, kernels: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "none" / "m.so", "No such file"),
        (tmp_path / "file" / "m.so", "Not a directory"),
        (tmp_path / "folder", "it is a folder"),
        (Path("/proc/m.so"), "cannot write /proc/m.so"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(EnvironmentProblem, match=message):
            build_shared(small.program, [kernels], path)


def test_odd_paths_work(small: Any, kernels: bytes, tmp_path: Path) -> None:
    x = small.inputs(0)
    for name in ("with space.so", "quo'te\".so", "new\nline.so", "-o.so", "@file.so", "ümläut.so", "n" * 255):
        folder = tmp_path / "deep folder \n'"
        folder.mkdir(exist_ok=True)
        build_shared(small.program, [kernels], folder / name)
        np.testing.assert_allclose(SharedModel(folder / name).create().run([x])[0], small.expected(x)[0], rtol=1e-5)


BUILD_IN_CHILD = """
import sys
sys.path.insert(0, {root!r})
from cnnc.backends.host.link import build_shared
from cnnc.backends.host.program import KernelCall, Program, Slot
from cnnc.errors import EnvironmentProblem
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
program = Program("p", (), (), (KernelCall("nothing", (Slot("arena", 0),)),), 64, 0, (bytes({size}),))
kernels = open({kernels!r}, "rb").read()
print("ready", flush=True)
{limit}
try:
    build_shared(program, [kernels], {path!r})
except EnvironmentProblem as problem:
    print(problem)
    sys.exit(problem.exit_code)
"""


def child(tmp_path: Path, kernels: bytes, size: int, limit: str = "") -> list[str]:
    (tmp_path / "kernels.o").write_bytes(kernels)
    root = str(Path(__file__).resolve().parents[3])
    source = BUILD_IN_CHILD.format(
        root=root, size=size, limit=limit, path=str(tmp_path / "out" / "p.so"), kernels=str(tmp_path / "kernels.o")
    )
    return [sys.executable, "-c", source]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, kernels: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p.so").write_text("old")
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    command = child(tmp_path, kernels, 8 << 20, limit)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr
    assert "File too large" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["p.so"]
    assert (tmp_path / "out" / "p.so").read_text() == "old"


def test_what_the_disk_reports_once_is_not_lost(
    tmp_path: Path, kernels: bytes, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.so"
    path.write_text("old")
    calls: list[int] = []

    def failing_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing_once)
    with pytest.raises(EnvironmentProblem, match="Input/output error"):
        build_shared(small.program, [kernels], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_killed_at_any_moment_the_path_holds_old_or_new(tmp_path: Path, kernels: bytes) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "p.so").write_text("old")
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        process = subprocess.Popen(child(tmp_path, kernels, 20 << 20), stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        threading.Event().wait(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (out / "p.so").read_bytes() != b"old":
            SharedModel(out / "p.so").create().run([])
    subprocess.run(child(tmp_path, kernels, 100), check=True, capture_output=True)
    assert [path.name for path in out.iterdir()] == ["p.so"]


def test_many_builds_of_one_path(small: Any, kernels: bytes, tmp_path: Path) -> None:
    failures: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(3):
                build_shared(small.program, [kernels], tmp_path / "m.so")
                SharedModel(tmp_path / "m.so")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["m.so"]


def test_a_damaged_cache_entry_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNC_CACHE_DIR", str(tmp_path))
    good = toolchain.runtime_objects()
    entries = sorted((tmp_path / "runtime").iterdir())
    assert len(entries) == len(good)
    for entry in entries:
        data = bytearray(entry.read_bytes())
        data[len(data) // 2] ^= 1
        entry.write_bytes(data[: len(data) - (entry == entries[0])])
    assert toolchain.runtime_objects() == good
    monkeypatch.setenv("CNNC_CACHE_DIR", "/proc/no/cache")
    assert toolchain.runtime_objects() == good


def test_few_open_files_are_enough(small: Any, kernels: bytes, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        build_shared(small.program, [kernels], tmp_path / "m.so")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (tmp_path / "m.so").exists()
