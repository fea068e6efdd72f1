"""The C runtime by itself: warnings, races and leaks under the sanitizers, with a model written in C."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cnnc.backends.host.toolchain import FLAGS, LIBRARY_SOURCES, PROGRAM_SOURCES, RUNTIME

# Each kernel adds one, and reads both neighbours, which other lanes have written; some are serial, some have
# few slices, some are slow, some fail.
STRESS = r"""
#define _GNU_SOURCE
#include "cnnc_rt.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <xmmintrin.h>

enum { WIDTH = 64, KERNELS = 10 };

static int32_t step(const cnnc_rt_bases *bases, int k, int32_t *scratch, int32_t lo, int32_t hi) {
  int32_t *buffers[2];
  int32_t status = 0;
  buffers[0] = (int32_t *)(void *)bases->arena;
  buffers[1] = buffers[0] + WIDTH;
  const int32_t *from = k == 0 ? bases->inputs[0] : buffers[k % 2];
  int32_t *to = k == KERNELS - 1 ? bases->outputs[0] : buffers[(k + 1) % 2];
  for (int32_t i = lo; i < hi; i++) {
    int32_t left = from[(i + WIDTH - 1) % WIDTH];
    int32_t right = from[(i + 1) % WIDTH];
    scratch[0] = i;
    if (left < 0) {
      status = left == -1 ? 1 : -1;
    }
    /* Kernels run with denormals, rounding to nearest, whatever the caller has. */
    bool good = left == right && scratch[0] == i && (_mm_getcsr() & 0xffc0) == 0x1f80;
    to[i] = good ? left + 1 : 1000000;
  }
  if (lo == 0 && from[0] % 97 == 0) {
    /* Longer than the others spin. */
    const struct timespec pause = {0, 400000};
    nanosleep(&pause, NULL);
  }
  return status;
}

#define STEP(k, slices) \
  static int32_t step_##k(const cnnc_rt_bases *bases, void *scratch, int32_t lo, int32_t hi) { \
    return step(bases, k, scratch, lo * (WIDTH / slices), hi * (WIDTH / slices)); \
  }
#define ALL \
  STEP(0, 64) STEP(1, 64) STEP(2, 64) STEP(3, 1) STEP(4, 2) STEP(5, 64) STEP(6, 1) STEP(7, 1) STEP(8, 2) STEP(9, 4)
ALL
#undef STEP
#define STEP(k, slices) {step_##k, slices},
static const cnnc_rt_step steps[KERNELS] = {ALL};

static const int64_t dims[1] = {WIDTH};
static const cnnc_rt_tensor port = {"x", 7, 1, dims, WIDTH * 4};
static const cnnc_rt_kernel kernels[KERNELS];
const cnnc_rt_model cnnc_rt_the_model = {
    .name = "stress",
    .meta = "{}",
    .inputs = &port,
    .outputs = &port,
    .kernels = kernels,
    .steps = steps,
    .arena_bytes = WIDTH * 8,
    .scratch_bytes = 64,
    .input_count = 1,
    .output_count = 1,
    .kernel_count = KERNELS,
};

static int once(cnnc_rt_context *context, int32_t value) {
  _Alignas(64) int32_t x[WIDTH];
  _Alignas(64) int32_t y[WIDTH];
  const void *in[1];
  void *out[1];
  in[0] = x;
  out[0] = y;
  for (int i = 0; i < WIDTH; i++) {
    x[i] = value < 0 && i % 9 != 5 ? 5 : value;
  }
  const unsigned mode = 0x1f80 | 0x8040 | 0x4000; /* flush denormals, round up */
  _mm_setcsr(mode);
  int code = cnnc_rt_run(context, in, out);
  if (_mm_getcsr() != mode) {
    return 1;
  }
  if (value < 0) {
    return code != (value == -1 ? CNNC_RT_ERROR_VALUE : CNNC_RT_ERROR_KERNEL);
  }
  for (int i = 0; i < WIDTH; i++) {
    code += y[i] != value + KERNELS;
  }
  return code != 0;
}

static int rounds;

static void *user(void *argument) {
  int id = (int)(intptr_t)argument;
  intptr_t wrong = 0;
  for (int round = 0; round < rounds; round++) {
    cnnc_rt_context *context;
    if (cnnc_rt_create(1 + (id + round) % 5, &context) != 0) {
      return (void *)1;
    }
    for (int i = 0; i < 50; i++) {
      wrong += once(context, i);
      if (i % 7 == 3) {
        wrong += once(context, -1 - i % 2);
      }
    }
    wrong += cnnc_rt_destroy(context) != CNNC_RT_OK;
  }
  return (void *)wrong;
}

int main(int count, char **arguments) {
  pthread_t threads[4];
  intptr_t wrong = 0;
  rounds = count > 1 ? atoi(arguments[1]) : 1;
  for (int i = 0; i < 4; i++) {
    pthread_create(&threads[i], NULL, user, (void *)(intptr_t)i);
  }
  for (int i = 0; i < 4; i++) {
    void *result;
    pthread_join(threads[i], &result);
    wrong += (intptr_t)result;
  }
  printf("%d wrong\n", (int)wrong);
  return wrong != 0;
}
"""


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_many_users_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    (tmp_path / "stress.c").write_text(STRESS)
    sources = [RUNTIME / name for name in LIBRARY_SOURCES]
    flags = ["-std=c11", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-I", RUNTIME]
    command = ["cc", *flags, tmp_path / "stress.c", *sources, "-lpthread", "-o", tmp_path / "stress"]
    subprocess.run([str(part) for part in command], check=True)
    done = subprocess.run([tmp_path / "stress", "6"], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done.stderr[-3000:]


@pytest.mark.parametrize("compiler", [name for name in ("gcc", "clang") if shutil.which(name)])
@pytest.mark.parametrize("name", LIBRARY_SOURCES + PROGRAM_SOURCES)
def test_no_warnings(compiler: str, name: str, tmp_path: Path) -> None:
    strict = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-Wshadow", "-Wvla", "-Wstrict-prototypes"]
    subprocess.run([compiler, *FLAGS, *strict, "-c", RUNTIME / name, "-o", tmp_path / "x.o"], check=True)


def test_every_runtime_file_is_built() -> None:
    assert sorted(path.name for path in RUNTIME.glob("*.c")) == sorted(LIBRARY_SOURCES + PROGRAM_SOURCES)
