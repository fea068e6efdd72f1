"""The C runtime by itself: warnings, races and leaks under the sanitizers, with a model written in C."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cnnc.backends.host.toolchain import DEVICE_SOURCES, FLAGS, LIBRARY_SOURCES, PROGRAM_SOURCES, RUNTIME

ALL_SOURCES = sorted({*LIBRARY_SOURCES, *DEVICE_SOURCES, *PROGRAM_SOURCES})

# Each kernel adds one, and reads both neighbours, which other lanes have written; some are serial, some have
# few slices, some are slow, some fail.  Runs change between batch sizes of ten, one and four kernels.
MODEL = r"""
#define _GNU_SOURCE
#include "cnnc_rt.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <xmmintrin.h>

enum { WIDTH = 64, VARIANTS = 3 };

static const int counts[VARIANTS] = {10, 1, 4};

typedef struct note {
  int32_t index; /* for one slice */
  int32_t kernel;
  int32_t value;
  int32_t last;
} note;

static void dawdle(int k);

/* What slice `last` of this kernel noted is what the scratch memory still holds. */
static bool is_kept(const note *scratch, int k, int32_t value, int32_t last) {
  return last < 0 || (scratch->kernel == k && scratch->value == value && scratch->last == last);
}

static int32_t step(const cnnc_rt_bases *bases, int k, int width, note *scratch, int32_t last, int32_t first,
                    int32_t end) {
  int32_t *buffers[2];
  int32_t status = 0;
  buffers[0] = (int32_t *)(void *)bases->arena;
  buffers[1] = buffers[0] + WIDTH;
  const int32_t *from = k % 100 == 0 ? bases->inputs[0] : buffers[k % 2];
  int32_t *to = k % 100 == counts[k / 100] - 1 ? bases->outputs[0] : buffers[(k + 1) % 2];
  const int32_t lo = first * width, hi = end * width;
  const bool kept = is_kept(scratch, k, from[lo], last);
  dawdle(k);
  for (int32_t i = lo; i < hi; i++) {
    int32_t left = from[(i + WIDTH - 1) % WIDTH];
    int32_t right = from[(i + 1) % WIDTH];
    scratch->index = i;
    if (left < 0) {
      status = left == -1 ? 1 : -1;
    }
    /* Kernels run with denormals, rounding to nearest, whatever the caller has. */
    bool good = left == right && kept && scratch->index == i && (_mm_getcsr() & 0xffc0) == 0x1f80;
    to[i] = good ? left + 1 : 1000000;
  }
  scratch->kernel = k;
  scratch->value = from[lo];
  scratch->last = end - 1;
  if (lo == 0 && from[0] % 97 == 0) {
    /* Longer than the others spin. */
    const struct timespec pause = {0, 400000};
    nanosleep(&pause, NULL);
  }
  return status;
}

#define STEP(v, k, slices) \
  static int32_t step_##v##_##k(const cnnc_rt_bases *bases, void *scratch, int32_t last, int32_t lo, int32_t hi) { \
    return step(bases, v * 100 + k, WIDTH / slices, scratch, last, lo, hi); \
  }
#define END
#define ALL \
  STEP(0, 0, 64) STEP(0, 1, 64) STEP(0, 2, 64) STEP(0, 3, 1) STEP(0, 4, 2) \
  STEP(0, 5, 64) STEP(0, 6, 1) STEP(0, 7, 1) STEP(0, 8, 2) STEP(0, 9, 4) END \
  STEP(1, 0, 32) END \
  STEP(2, 0, 2) STEP(2, 1, 64) STEP(2, 2, 1) STEP(2, 3, 64) END
ALL
#undef STEP
#undef END
#define STEP(v, k, slices) {step_##v##_##k, slices},
#define END {NULL, 1},
static const cnnc_rt_step steps[] = {ALL};

static const int64_t dims[1] = {WIDTH};
static const cnnc_rt_tensor port = {"x", 7, 1, dims, WIDTH * 4};
static const cnnc_rt_kernel kernels[10];
static const cnnc_rt_variant variants[VARIANTS] = {
    {&port, &port, kernels, 1, 10, 0},
    {&port, &port, kernels, 2, 1, 11},
    {&port, &port, kernels, 3, 4, 13},
};
const cnnc_rt_model cnnc_rt_the_model = {
    .name = "stress",
    .meta = "{}",
    .variants = variants,
    .steps = steps,
    .arena_bytes = WIDTH * 8,
    .scratch_bytes = 64,
    .input_count = 1,
    .output_count = 1,
    .variant_count = VARIANTS,
    .step_count = sizeof steps / sizeof *steps,
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
  const int variant = abs(value) % 7 % VARIANTS;
  cnnc_rt_profile(context, abs(value) % 5 == 2);
  int code = cnnc_rt_run_batch(context, variant + 1, in, out);
  if (_mm_getcsr() != mode) {
    return 1;
  }
  if (value < 0) {
    return code != (value == -1 ? CNNC_RT_ERROR_VALUE : CNNC_RT_ERROR_KERNEL);
  }
  for (int i = 0; i < WIDTH; i++) {
    code += y[i] != value + counts[variant];
  }
  return code != 0;
}

"""

MANY_USERS = r"""
static void dawdle(int k) { (void)k; }

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


# Helpers begin only after all runs, as on a machine that has no CPU for them.
ABSENT_HELPERS = r"""
static void dawdle(int k) { (void)k; }

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

typedef struct beginning {
  void *(*function)(void *);
  void *argument;
} beginning;

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*function)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*function)(void *), void *argument);

static void *begin(void *argument) {
  beginning what = *(beginning *)argument;
  free(argument);
  pthread_mutex_lock(&gate);
  pthread_mutex_unlock(&gate);
  return what.function(what.argument);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*function)(void *), void *argument) {
  beginning *what = malloc(sizeof *what);
  what->function = function;
  what->argument = argument;
  return __real_pthread_create(thread, how, begin, what);
}

int main(void) {
  cnnc_rt_context *context;
  int wrong = 0;
  pthread_mutex_lock(&gate);
  wrong += cnnc_rt_create(5, &context);
  for (int i = 0; i < 100; i++) {
    wrong += once(context, i);
    wrong += once(context, -1 - i % 2);
  }
  pthread_mutex_unlock(&gate);
  for (int i = 0; i < 100; i++) {
    wrong += once(context, i);
  }
  wrong += cnnc_rt_destroy(context);
  printf("%d wrong\n", wrong);
  return wrong != 0;
}
"""


# Whichever lane is slow, another does some of its share.
SLOW_LANE = r"""
static pthread_t caller;
static bool helper_is_slow;
static _Atomic int by_caller, by_helper;

static void dawdle(int k) {
  const struct timespec pause = {0, 2000000};
  bool helps = !pthread_equal(pthread_self(), caller);
  (void)k;
  atomic_fetch_add(helps ? &by_helper : &by_caller, 1);
  if (helps == helper_is_slow) {
    nanosleep(&pause, NULL);
  }
}

int main(void) {
  cnnc_rt_context *context;
  int wrong = cnnc_rt_create(2, &context);
  caller = pthread_self();
  for (int turn = 0; turn < 2; turn++) {
    bool relieved = false;
    helper_is_slow = turn == 1;
    for (int i = 0; i < 50 && !relieved; i++) {
      by_caller = by_helper = 0;
      wrong += once(context, 1); /* one kernel of 32 slices: 16 pieces for each lane */
      relieved = helper_is_slow ? by_caller > 16 : by_helper > 16;
    }
    wrong += !relieved;
  }
  wrong += cnnc_rt_destroy(context);
  printf("%d wrong\n", wrong);
  return wrong != 0;
}
"""


# A kernel that is slow for the helper, then one of 32 pieces of 20 us: what the helper does of them while the caller
# wakes up is time of that kernel.
TIMES = r"""
static pthread_t caller;

static void dawdle(int k) {
  const struct timespec pause = {0, 2000000};
  if (k == 200 && !pthread_equal(pthread_self(), caller)) {
    nanosleep(&pause, NULL);
  }
  for (int64_t start = cnnc_rt_clock(); k == 201 && cnnc_rt_clock() - start < 20000;) {
  }
}

int main(void) {
  cnnc_rt_context *context;
  int wrong = cnnc_rt_create(2, &context);
  caller = pthread_self();
  for (int i = 0; i < 50; i++) {
    wrong += cnnc_rt_profile(context, 0) + cnnc_rt_profile(context, 1);
    wrong += once(context, 37); /* timed, the batch size of four kernels */
    uint64_t calls;
    wrong += cnnc_rt_batch_kernel_ns(context, 3, 1, &calls) < 16 * 20000 || calls != 1;
  }
  wrong += cnnc_rt_destroy(context);
  printf("%d wrong\n", wrong);
  return wrong != 0;
}
"""


def build(folder: Path, source: str, *flags: str) -> Path:
    (folder / "stress.c").write_text(source)
    sources = [RUNTIME / name for name in LIBRARY_SOURCES]
    command = ["cc", "-std=c11", "-g", *flags, "-I", RUNTIME, folder / "stress.c", *sources, "-lpthread"]
    subprocess.run([str(part) for part in [*command, "-o", folder / "stress"]], check=True)
    return folder / "stress"


def check_runs(program: Path, rounds: int, cpus: set[int] | None = None) -> None:
    done = subprocess.run(
        [program, str(rounds)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus) if cpus else None,
    )
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done.stderr[-3000:]


@contextmanager
def busy_machine() -> Iterator[None]:
    """Two programs that never rest, for each CPU."""
    with ExitStack() as stack:
        for _ in range(2 * len(os.sched_getaffinity(0))):
            program = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(program.kill)
        yield


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_many_users_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    flags = ["-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    check_runs(build(tmp_path, MODEL + MANY_USERS, *flags), rounds=6)


@pytest.mark.parametrize("crowded", [False, True])
def test_a_busy_machine_stops_nobody(tmp_path: Path, crowded: bool) -> None:
    cpus = os.sched_getaffinity(0)
    program = build(tmp_path, MODEL + MANY_USERS, "-O2")
    with busy_machine():
        check_runs(program, rounds=3, cpus={min(cpus)} if crowded else cpus)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_helpers_that_get_no_cpu_hold_nobody_up(tmp_path: Path, sanitizer: str) -> None:
    flags = ["-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-Wl,--wrap=pthread_create"]
    check_runs(build(tmp_path, MODEL + ABSENT_HELPERS, *flags), rounds=1)


def test_a_slow_lane_is_relieved(tmp_path: Path) -> None:
    check_runs(build(tmp_path, MODEL + SLOW_LANE, "-O2"), rounds=1)


def test_a_timed_run_counts_what_helpers_do_as_time_of_that_kernel(tmp_path: Path) -> None:
    check_runs(build(tmp_path, MODEL + TIMES, "-O2"), rounds=1)


@pytest.mark.parametrize("compiler", [name for name in ("gcc", "clang") if shutil.which(name)])
@pytest.mark.parametrize("name", ALL_SOURCES)
def test_no_warnings(compiler: str, name: str, tmp_path: Path) -> None:
    strict = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-Wshadow", "-Wvla", "-Wstrict-prototypes"]
    subprocess.run([compiler, *FLAGS, *strict, "-c", RUNTIME / name, "-o", tmp_path / "x.o"], check=True)


def test_every_runtime_file_is_built() -> None:
    assert sorted(path.name for path in RUNTIME.glob("*.c")) == ALL_SOURCES
