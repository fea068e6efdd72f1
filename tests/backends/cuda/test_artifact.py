"""CUDA artifacts as a whole, over a driver that is not there: their numbers, their errors, what they leave behind."""

from __future__ import annotations

import ctypes
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cnnc
import cnnc.backends
from cnnc.backends.host.header import emit_header
from cnnc.backends.host.link import build_shared
from cnnc.errors import EnvironmentProblem
from cnnc.frontends.dsl import (
    Tensor,
    batch_norm,
    conv,
    flatten,
    global_avg_pool,
    linear,
    load_network,
    max_pool,
    network,
    relu,
    scope,
)
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.interp import evaluate
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Add, Gather, Mul, Softmax
from cnnc.ops.source import Input, constant
from tests.backends.cuda.artifacts import FakeGpu, Report
from tests.backends.cuda.emulator import BACKWARD, FORWARD, SHUFFLED, needs_gxx

EXAMPLES = Path(__file__).parents[3] / "examples"

pytestmark = [needs_gxx, pytest.mark.usefixtures("emulating_nvcc")]


@network(x=(3, 32, 32))
def small_resnet(x: Tensor) -> Tensor:
    """ResNet's first stages with 8 and 16 channels: strides, projections, residuals, a pooled end."""
    x = x >> conv(8, 7, stride=2, pad=3, bias=False, name="conv1") >> batch_norm(name="bn1") >> relu
    x = x >> max_pool(3, stride=2, pad=1)
    for stage, width in enumerate((8, 16), start=1):
        for i in range(2):
            with scope(f"layer{stage}", i):
                x = basic(x, width, 2 if stage > 1 and i == 0 else 1)
    return x >> global_avg_pool >> flatten >> linear(10, name="fc")


def basic(x: Tensor, width: int, stride: int) -> Tensor:
    y = x >> conv(width, 3, stride=stride, pad=1, bias=False, name="conv1") >> batch_norm(name="bn1") >> relu
    y = y >> conv(width, 3, pad=1, bias=False, name="conv2") >> batch_norm(name="bn2")
    if stride == 1 and x.channels == width:
        return relu(y + x)
    return relu(y + (x >> conv(width, 1, stride=stride, bias=False, name="down") >> batch_norm(name="down_bn")))


def feeds_of(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(value.type.static_shape).astype(value.dtype.numpy)
        for name, value in zip(graph.input_names, graph.inputs, strict=True)
    }


def build(graph: Graph, folder: Path, target: str = "cuda:sm_90", dtype: str = "f32") -> Path:
    cnnc.compile(graph, target=target, dtype=dtype).save(folder / "net.so")
    return folder / "net.so"


def check_graph(
    graph: Graph,
    gpu: FakeGpu,
    folder: Path,
    dtype: str = "f32",
    bound: float = 1e-5,
    target: str = "cuda:sm_90",
) -> None:
    """Run in several orders of threads; all must agree with the interpreter, and with each other bit for bit."""
    library, feeds = build(graph, folder, target, dtype), feeds_of(graph, 3)
    wanted = evaluate(graph, feeds, precise=True)
    first: dict[str, np.ndarray] = {}
    for order in (FORWARD, BACKWARD, SHUFFLED + 5):
        results, report = gpu.run(library, feeds, f"order={order}", runs=2)
        assert report.launches > 0
        assert (report.alive, report.retained, report.current) == (0, 0, 0)
        for name, reference in wanted.items():
            error = np.linalg.norm(results[name] - reference) / np.linalg.norm(reference)
            assert error <= bound, (name, error)
            assert np.array_equal(results[name], first.setdefault(name, results[name])), f"{name} in order {order}"


@pytest.mark.parametrize(("name", "batch"), [("lenet5", 1), ("simple_cnn", 2)])
def test_small_networks(name: str, batch: int, fake_gpu: FakeGpu, tmp_path: Path) -> None:
    net = load_network(f"{EXAMPLES / name}.py:{name}").with_batch(batch)
    check_graph(net.init(seed=1).graph(), fake_gpu, tmp_path)


def test_a_small_resnet(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    check_graph(small_resnet(batch=2).init(seed=4).graph(), fake_gpu, tmp_path)


@network(x=(64, 28, 28))
def wide_layer(x: Tensor) -> Tensor:
    """A layer large enough for tiles in shared memory."""
    return relu(x >> conv(64, 3, pad=1, name="conv1"))


def test_a_tiled_convolution(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    graph = wide_layer(batch=1).init(seed=5).graph()
    module = cnnc.compile(graph, target="cuda:sm_90", exact=True)
    assert [kernel.algorithm for kernel in module.build.program.calls] == ["conv_gemm"]
    module.save(tmp_path / "net.so")
    feeds = feeds_of(graph, 9)
    (wanted,) = evaluate(graph, feeds, precise=True).values()
    (result,) = fake_gpu.run(tmp_path / "net.so", feeds, f"order={BACKWARD}")[0].values()
    assert np.linalg.norm(result - wanted) / np.linalg.norm(wanted) <= 1e-5


# One small model for what is not about numbers


def softmax_of_columns() -> Graph:
    """Give what takes three launches: only along the last axis is it one."""
    x, y = call(Input("x", TensorType((4, 9)))), call(Input("y", TensorType((4, 9))))
    scale = constant(np.linspace(-1, 2, 9, dtype=np.float32))
    return Graph("rows", (x, y), (call(Softmax(0), call(Mul(), call(Add(), x, y), scale)),), ("z",))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, emulating_nvcc: None) -> Path:
    return build(softmax_of_columns(), tmp_path_factory.mktemp("rows"))


PROGRAM = r"""
#include "net.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static float x[36], y[36], z[36];
static const void *in[2] = {x, y};
static void *out[1] = {z};

static int say(int code) {
  printf("%d %s\n", code, net_error_text(code));
  return code;
}

int main(int count, char **arguments) {
  net_context *a = NULL, *b = NULL;
  uint64_t calls = 0;
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (say(net_create(1, &a)) != 0) {
    return a != NULL;
  }
  if (count > 1 && strcmp(arguments[1], "fork") == 0) {
    pid_t child = fork();
    if (child == 0) {
      say(net_run(a, in, out));
      say(net_create(1, &b));
      say(net_destroy(a));
      fflush(stdout);
      _exit(0);
    }
    waitpid(child, NULL, 0);
    return net_run(a, in, out) + net_destroy(a);
  }
  int code = net_create(4, &b);
  say(code);
  say(net_run(a, in, out));
  if (code == 0) {
    say(net_run(b, in, out));
    say(net_profile(b, 1));
    say(net_run(b, in, out));
    printf("%d ms\n", (int)(net_kernel_ns(b, 1, &calls) / 1000000));
    printf("%d calls, %d threads\n", (int)calls, net_threads(b));
    in[1] = NULL;
    say(net_run(b, in, out));
    say(net_destroy(b));
    say(net_run(b, in, out));
  }
  return net_destroy(a);
}
"""


@pytest.fixture(scope="module")
def user(rows: Path) -> Path:
    """A C program that uses the artifact, and nothing else."""
    module = cnnc.compile(softmax_of_columns(), target="cuda:sm_90", name="net")
    module.save(rows.parent / "net.so")
    (rows.parent / "user.c").write_text(PROGRAM)
    command = ["cc", "-Wall", "-Werror", "user.c", "net.so", "-Wl,-rpath,$ORIGIN", "-o", "user"]
    subprocess.run(command, cwd=rows.parent, check=True)
    return rows.parent / "user"


def test_a_c_program_uses_it(user: Path, fake_gpu: FakeGpu) -> None:
    done = fake_gpu.start([user])
    assert done.returncode == 0, done.stderr
    codes = [line.split()[0] for line in done.stdout.splitlines()]
    assert codes == ["0", "0", "0", "0", "0", "0", "3", "1", "201", "0", "203"]
    assert "3 ms\n1 calls, 4 threads\n" in done.stdout
    assert Report.of(done.stderr) == Report(launches=12, alive=0, retained=0, current=0)


def test_an_object_becomes_part_of_a_program(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    module = cnnc.compile(softmax_of_columns(), target="cuda:sm_90", name="net")
    module.save(tmp_path / "net.o", emit=["obj", "header"])
    (tmp_path / "user.c").write_text(PROGRAM)
    command = ["cc", "-Wall", "-Werror", "user.c", "net.o", "-lm", "-lpthread", "-ldl", "-o", "user"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = fake_gpu.start([tmp_path / "user"])
    assert done.returncode == 0, done.stderr
    assert "3 ms\n1 calls, 4 threads\n" in done.stdout


def test_without_a_driver_it_says_so(user: Path) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has CUDA's driver")
    except OSError:
        pass
    done = subprocess.run([user], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("603 no CUDA driver: libcuda.so.1 cannot be loaded")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("devices=0", "604 no CUDA device"),
        ("fail=cuInit:100:0", "604 no CUDA device"),
        ("fail=cuInit:34:0", "603 no CUDA driver"),
        ("capability=80", "702 the model was compiled for another GPU"),
        ("capability=89", "702 the model was compiled for another GPU"),
        ("capability=75", "702 the model was compiled for another GPU"),
        ("fail=cuModuleLoadData:209:0", "702 the model was compiled for another GPU"),
        ("memory=100", "605 not enough memory on the GPU"),
        ("fail=cuStreamCreate:999:0", "606 the GPU or its driver failed: unknown error (CUDA error 999)"),
    ],
)
def test_what_can_be_missing(user: Path, fake_gpu: FakeGpu, options: str, message: str) -> None:
    done = fake_gpu.start([user], options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(message)
    assert Report.of(done.stderr) == Report(0, 0, 0, 0)


def test_a_newer_gpu_of_the_generation_will_do(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    graph = softmax_of_columns()
    library, feeds = build(graph, tmp_path, "cuda:sm_86"), feeds_of(graph, 8)
    results, _ = fake_gpu.run(library, feeds, "capability=89")
    np.testing.assert_allclose(results["z"], evaluate(graph, feeds)["z"], rtol=1e-5)


@pytest.mark.parametrize(("arch", "capability"), [("sm_90", 100), ("sm_90", 120), ("sm_80", 90), ("sm_86", 90)])
def test_a_gpu_of_a_newer_generation_compiles_the_ptx(
    arch: str, capability: int, fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    graph = softmax_of_columns()
    library, feeds = build(graph, tmp_path, f"cuda:{arch}"), feeds_of(graph, 8)
    results, _ = fake_gpu.run(library, feeds, f"capability={capability}")
    np.testing.assert_allclose(results["z"], evaluate(graph, feeds)["z"], rtol=1e-5)
    assert "or a newer one, whose driver compiles the kernels once" in (tmp_path / "net.h").read_text()


def test_without_ptx_a_newer_gpu_is_refused(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    made = cnnc.compile(softmax_of_columns(), target="cuda:sm_90").build
    assert made.program.device is not None
    program = replace(made.program, device=replace(made.program.device, portable=False))
    build_shared(program, (), tmp_path / "net.so")
    with pytest.raises(AssertionError, match="CheckFailed: rows: the model was compiled for another GPU"):
        fake_gpu.run(tmp_path / "net.so", feeds_of(softmax_of_columns(), 1), "capability=100")
    assert "newer" not in emit_header(program)


def test_a_second_context_may_find_no_memory(user: Path, fake_gpu: FakeGpu) -> None:
    done = fake_gpu.start([user], "fail=cuMemAlloc_v2:2:2")
    assert done.stdout.splitlines() == ["0 no error", "605 not enough memory on the GPU", "0 no error"]
    assert (done.returncode, Report.of(done.stderr).alive) == (0, 0)


FUNCTIONS = re.findall(r'"(cu[A-Z]\w+)"', (Path(cnnc.backends.__path__[0]) / "host/runtime/cuda.h").read_text())
CLEANUP = re.compile("Destroy|Free|Unload|Release|Push|Pop|ErrorString|SetAttribute|EventSynchronize|TensorMap")


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("function", [name for name in FUNCTIONS if not CLEANUP.search(name)])
def test_whatever_fails_nothing_is_left(user: Path, fake_gpu: FakeGpu, function: str, after: int) -> None:
    """Each function of the driver in turn ends in an error, at its first, second or third call."""
    done = fake_gpu.start([user], f"fail={function}:719:{after}")
    assert done.returncode in (0, 1), (done.returncode, done.stderr)
    report = Report.of(done.stderr)
    assert (report.alive, report.retained, report.current) == (0, 0, 0), done.stdout
    codes = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert after > 0 or 606 in codes
    if 606 in codes:
        assert "606 the GPU or its driver failed: unspecified launch failure (CUDA error 719)" in done.stdout


def test_the_child_of_a_fork_is_refused(user: Path, fake_gpu: FakeGpu) -> None:
    done = fake_gpu.start([user, "fork"])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "607", "607", "0"]
    assert "create contexts in the child" in lines[1]
    assert Report.of(done.stderr).alive == 0


def test_needs_no_library_but_libc(rows: Path) -> None:
    listed = subprocess.run(["ldd", rows], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].rpartition("/")[2] for line in listed.splitlines()}
    known = {"linux-vdso.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-x86-64.so.2"}
    assert names <= known


def test_a_program_of_it_runs(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    graph = softmax_of_columns()
    feeds = feeds_of(graph, 2)
    for name, array in feeds.items():
        np.save(tmp_path / f"{name}.npy", array)
    cnnc.compile(graph, target="cuda:sm_90").save(tmp_path / "net", emit=["exe"])
    done = fake_gpu.start([tmp_path / "net", "-o", tmp_path / "z.npy", tmp_path / "x.npy", tmp_path / "y.npy"])
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "z.npy"), evaluate(graph, feeds)["z"], rtol=1e-5)


def test_an_index_outside_ends_in_an_error(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    table, rows = call(Input("table", TensorType((5, 3)))), call(Input("rows", TensorType((4,), DType.I64)))
    graph = Graph("gathered", (table, rows), (call(Gather(0), table, rows),), ("y",))
    library = build(graph, tmp_path)
    feeds = {"table": np.arange(15, dtype=np.float32).reshape(5, 3), "rows": np.array([4, -5, 0, 2])}
    results, _ = fake_gpu.run(library, feeds)
    np.testing.assert_array_equal(results["y"], feeds["table"][feeds["rows"]])
    with pytest.raises(AssertionError, match="a value computed at run time is out of range"):
        fake_gpu.run(library, {**feeds, "rows": np.array([0, 5, 1, 1])})


def test_a_model_in_this_process_meets_the_missing_driver() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has CUDA's driver")
    except OSError:
        pass
    module = cnnc.compile(softmax_of_columns(), target="cuda:sm_90")
    with pytest.raises(EnvironmentProblem, match="rows: no CUDA driver"):
        module.run(feeds_of(softmax_of_columns(), 1))
