"""Runs put into streams of the user's, with data on the GPU or the host, and several batch sizes in one artifact."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import cnnc
from cnnc.frontends.dsl import Tensor, conv, flatten, linear, network, relu
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.interp import evaluate
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Gather
from cnnc.ops.source import Input
from tests.backends.cuda.artifacts import FakeGpu, Report
from tests.backends.cuda.emulator import BACKWARD, needs_gxx

pytestmark = [needs_gxx, pytest.mark.usefixtures("emulating_nvcc")]


@network(x=(2, 5, 5))
def small(x: Tensor) -> Tensor:
    return relu(x >> conv(3, 3, pad=1, name="conv1")) >> flatten >> linear(7, name="fc")


BATCHES = (1, 3)
NETWORK = small(batch=1).init(seed=3)
PROLOGUE = r"""
#include "net.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

int cuDevicePrimaryCtxRetain(void **context, int device);
int cuDevicePrimaryCtxRelease_v2(int device);
int cuCtxPushCurrent_v2(void *context);
int cuCtxPopCurrent_v2(void **context);
int cuMemAlloc_v2(uint64_t *pointer, size_t bytes);
int cuMemFree_v2(uint64_t pointer);
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes);
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream);
int cuStreamCreate(void **stream, unsigned flags);
int cuStreamSynchronize(void *stream);
int cuStreamDestroy_v2(void *stream);

#define MUST(call) do { int code = (call); if (code != 0) { printf("%s: %d\n", #call, code); exit(1); } } while (0)

static net_context *context;
static void *gpu, *first, *second;
static uint64_t x_there, y_there;
"""
NUMBERS = r"""
enum { X = 50, Y = 7, MOST = 3 };
static float x[MOST * X], y[6][MOST * Y];

static void put(int batch, const void *from, void *to, void *stream) {
  const void *inputs[] = {from};
  void *outputs[] = {to};
  MUST(batch == 1 ? net_run_async(context, inputs, outputs, stream)
                  : net_run_batch_async(context, batch, inputs, outputs, stream));
}

static void run(int batch, const void *from, void *to) {
  const void *inputs[] = {from};
  void *outputs[] = {to};
  MUST(net_run_batch(context, batch, inputs, outputs));
}

int main(void) {
  FILE *file = fopen("x.bin", "rb");
  if (file == NULL || fread(x, sizeof x, 1, file) != 1) {
    return 1;
  }
  fclose(file);
  MUST(net_create(1, &context));
  MUST(cuDevicePrimaryCtxRetain(&gpu, 7));
  MUST(cuCtxPushCurrent_v2(gpu));
  MUST(cuMemAlloc_v2(&x_there, sizeof x));
  MUST(cuMemAlloc_v2(&y_there, sizeof y[0]));
  MUST(cuMemcpyHtoD_v2(x_there, x, sizeof x));
  MUST(cuStreamCreate(&first, 1));
  MUST(cuStreamCreate(&second, 0));

  put(3, (void *)x_there, (void *)y_there, first);
  put(1, x, y[0], second);
  put(3, x, y[1], first);
  MUST(cuMemcpyDtoHAsync_v2(y[2], y_there, sizeof y[2], first));
  printf("%d\n", y[0][0] == 0 && y[1][0] == 0); /* this driver does nothing before it is waited for */
  MUST(cuStreamSynchronize(second));
  printf("%d\n", y[0][0] != 0 && y[1][0] == 0);
  MUST(net_wait(context));
  printf("%d\n", y[1][0] != 0);
  MUST(cuStreamSynchronize(first));

  run(3, (void *)x_there, y[3]);
  put(1, (void *)x_there, y[4], NULL);
  run(3, x, (void *)y_there);
  MUST(cuMemcpyDtoHAsync_v2(y[5], y_there, sizeof y[5], second));
  MUST(cuStreamSynchronize(second));

  const void *none[] = {NULL};
  void *one[] = {y[0]};
  printf("%d %d %d %d\n", net_run_async(context, none, one, first), net_run_async(context, NULL, one, first),
         net_run_batch_async(context, 2, none, one, first), net_run_async(NULL, none, one, first));
  fflush(stdout);
  const void *some[] = {x};
  pid_t child = fork();
  if (child == 0) {
    printf("%d %d\n", net_run_async(context, some, one, first), net_wait(context));
    fflush(stdout);
    _exit(0);
  }
  waitpid(child, NULL, 0);

  for (int i = 0; i < Y; i++) {
    y[0][i] = 0;
  }
  put(1, x, y[0], first);
  MUST(net_destroy(context)); /* waits for the run */
  printf("%d %d\n", net_run_async(context, some, one, first), net_wait(context));
  MUST(cuMemFree_v2(x_there));
  MUST(cuMemFree_v2(y_there));
  MUST(cuStreamDestroy_v2(first));
  MUST(cuStreamDestroy_v2(second));
  MUST(cuCtxPopCurrent_v2(&gpu));
  MUST(cuDevicePrimaryCtxRelease_v2(7));
  file = fopen("y.bin", "wb");
  return fwrite(y, sizeof y, 1, file) != 1 || fclose(file) != 0;
}
"""

Program = Callable[[cnnc.Module, str], Path]


@pytest.fixture
def program(fake_gpu: FakeGpu, tmp_path: Path) -> Program:
    """Build a C program that uses an artifact, and the driver too."""

    def build(module: cnnc.Module, text: str) -> Path:
        module.save(tmp_path / "net.so")
        (tmp_path / "user.c").write_text(PROLOGUE + text)
        command = ["cc", "-Wall", "-Werror", "-Wno-unused-variable", "user.c", "net.so"]
        command += [str(fake_gpu.folder / "libcuda.so.1"), "-Wl,-rpath,$ORIGIN", "-o", "user"]
        subprocess.run(command, cwd=tmp_path, check=True)
        return tmp_path / "user"

    return build


def run(program: Path, gpu: FakeGpu, options: str = "") -> tuple[list[str], Report]:
    done = subprocess.run(
        [program], cwd=program.parent, env=gpu.environment(options), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines(), Report.of(done.stderr)


def test_runs_in_streams(fake_gpu: FakeGpu, program: Program, rng: np.random.Generator) -> None:
    user = program(cnnc.compile(NETWORK, name="net", target="cuda:sm_80", batch=BATCHES), NUMBERS)
    x = rng.standard_normal((3, 2, 5, 5)).astype(np.float32)
    x.tofile(user.parent / "x.bin")
    lines, report = run(user, fake_gpu, f"order={BACKWARD}")
    assert lines == ["1", "1", "1", "201 201 206 201", "607 607", "203 203"]
    assert (report.alive, report.retained, report.current) == (0, 0, 0)
    (wanted,) = evaluate(NETWORK.with_batch(3).graph(), {"x": x}, precise=True).values()
    y = np.fromfile(user.parent / "y.bin", np.float32).reshape(6, 3, 7)
    for number, images in enumerate((1, 3, 3, 3, 1, 3)):
        np.testing.assert_allclose(y[number, :images], wanted[:images], rtol=1e-4, atol=1e-5, err_msg=str(number))
        assert not y[number, images:].any()


def test_several_batch_sizes_in_one_artifact(fake_gpu: FakeGpu, tmp_path: Path, rng: np.random.Generator) -> None:
    """The weights are there once, and any order of batch sizes gives their numbers."""
    cnnc.compile(NETWORK, target="cuda:sm_90", batch=BATCHES).save(tmp_path / "net.so")
    module = cnnc.load(tmp_path / "net.so")
    assert module.batches == BATCHES
    one = cnnc.compile(NETWORK, target="cuda:sm_90", batch=3).build
    assert one is not None
    assert one.program.weight_bytes == module._model.weight_bytes
    for batch in (3, 1, 3):
        feeds = {"x": rng.standard_normal((batch, 2, 5, 5)).astype(np.float32)}
        results, _ = fake_gpu.run(tmp_path / "net.so", feeds, runs=2)
        (wanted,) = evaluate(NETWORK.with_batch(batch).graph(), feeds, precise=True).values()
        np.testing.assert_allclose(*results.values(), wanted, rtol=1e-4, atol=1e-5)


PROFILE = r"""
int main(void) {
  static float x[150], y[21];
  const void *inputs[] = {x};
  void *outputs[] = {y};
  uint64_t calls;
  MUST(net_create(1, &context));
  MUST(net_profile(context, 1));
  MUST(net_run_batch(context, 3, inputs, outputs));
  MUST(net_run_batch(context, 3, inputs, outputs));
  MUST(net_run(context, inputs, outputs));
  for (int i = 0; i < net_batch_kernel_count(3); i++) {
    long ms = (long)(net_batch_kernel_ns(context, 3, i, &calls) / 1000000);
    printf("%ld in %d calls, ", ms, (int)calls);
    ms = (long)(net_kernel_ns(context, i, &calls) / 1000000);
    printf("%ld in %d\n", ms, (int)calls);
  }
  return net_destroy(context);
}
"""


def test_each_batch_size_has_clocks_of_its_own(fake_gpu: FakeGpu, program: Program) -> None:
    """A launch takes a millisecond on the stand-in."""
    module = cnnc.compile(NETWORK, name="net", target="cuda:sm_90", batch=BATCHES)
    lines, report = run(program(module, PROFILE), fake_gpu)
    assert module.build is not None
    one, three = (variant.calls for variant in module.build.program.variants)
    wanted = [f"{2 * len(b.launches)} in 2 calls, {len(a.launches)} in 1" for a, b in zip(one, three, strict=True)]
    assert lines == wanted
    assert report.launches == sum(2 * len(b.launches) + len(a.launches) for a, b in zip(one, three, strict=True))


INDICES = r"""
int main(void) {
  static float table[15], y[12];
  static int64_t good[4] = {4, -5, 0, 2}, bad[4] = {0, 5, 1, 1};
  const void *fine[] = {table, good}, *wrong[] = {table, bad};
  void *outputs[] = {y};
  MUST(net_create(1, &context));
  MUST(cuDevicePrimaryCtxRetain(&gpu, 7));
  MUST(cuCtxPushCurrent_v2(gpu));
  MUST(cuStreamCreate(&first, 1));
  printf("%d\n", net_run_async(context, fine, outputs, first));
  printf("%d\n", net_wait(context));
  printf("%d\n", net_run_async(context, wrong, outputs, first));
  printf("%d\n", net_run_async(context, fine, outputs, first));
  printf("%d\n", net_wait(context));
  printf("%d\n", net_run(context, fine, outputs));
  printf("%d\n", net_run(context, wrong, outputs));
  printf("%d\n", net_wait(context));
  printf("%d\n", net_run(context, fine, outputs));
  MUST(cuStreamDestroy_v2(first));
  MUST(cuCtxPopCurrent_v2(&gpu));
  MUST(cuDevicePrimaryCtxRelease_v2(7));
  return net_destroy(context);
}
"""


def test_an_index_outside_is_told_by_wait(fake_gpu: FakeGpu, program: Program) -> None:
    table, rows = call(Input("table", TensorType((5, 3)))), call(Input("rows", TensorType((4,), DType.I64)))
    graph = Graph("net", (table, rows), (call(Gather(0), table, rows),), ("y",))
    lines, report = run(program(cnnc.compile(graph, target="cuda:sm_90"), INDICES), fake_gpu)
    assert lines == ["0", "0", "0", "0", "301", "0", "301", "0", "0"]
    assert report.alive == 0
