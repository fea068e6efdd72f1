"""ResNet-50 as a library in a C program: no Python, the same numbers, eight threads at once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

import cnnc
from cnnc.frontends.dsl import load_network

pytestmark = pytest.mark.slow

RESNET = Path(__file__).parents[2] / "examples" / "resnet.py"
STRICT = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic")

ONE_RUN = """
#include <stdio.h>
#include "resnet50.h"

static float x[3 * 224 * 224], y[1000];

int main(int argc, char **argv) {
  const void *inputs[] = {x};
  void *outputs[] = {y};
  resnet50_context *context = NULL;
  FILE *file = argc > 2 ? fopen(argv[1], "rb") : NULL;
  int error;
  if (!file || fread(x, sizeof x, 1, file) != 1) return 1;
  fclose(file);
  error = resnet50_create(1, &context);
  if (!error) error = resnet50_run(context, inputs, outputs);
  if (error) fprintf(stderr, "%s\\n", resnet50_error_text(error));
  resnet50_destroy(context);
  file = fopen(argv[2], "wb");
  if (!file || fwrite(y, sizeof y, 1, file) != 1) return 1;
  fclose(file);
  return error != 0;
}
"""

EIGHT_THREADS = """
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include "resnet50.h"

static float x[3 * 224 * 224], y[8][1000];

static void *work(void *result) {
  const void *inputs[] = {x};
  void *outputs[] = {result};
  resnet50_context *context = NULL;
  int error = resnet50_create(1, &context), i;
  for (i = 0; i < 3 && !error; i++) error = resnet50_run(context, inputs, outputs);
  resnet50_destroy(context);
  return error ? result : NULL;
}

int main(void) {
  pthread_t threads[8];
  int i, bad = 0;
  for (i = 0; i < 3 * 224 * 224; i++) x[i] = (float)(i % 255) / 255.0f;
  for (i = 0; i < 8; i++) bad |= pthread_create(&threads[i], NULL, work, y[i]) != 0;
  for (i = 0; i < 8; i++) {
    void *failed = NULL;
    pthread_join(threads[i], &failed);
    bad |= failed != NULL;
  }
  for (i = 1; i < 8; i++) bad |= memcmp(y[0], y[i], sizeof y[0]) != 0;
  return bad || y[0][0] == 0.0f;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, cnnc.Module]:
    path = tmp_path_factory.mktemp("resnet50") / "resnet50.so"
    module = cnnc.compile(load_network(f"{RESNET}:resnet50").init(seed=1).graph())
    module.save(path)
    return path, module


def build(source: str, library: Path) -> Path:
    """Compile a program against the library with every warning an error."""
    program = library.parent / "program"
    (library.parent / "program.c").write_text(source)
    command = ["cc", *STRICT, "program.c", "resnet50.so", "-lpthread", "-Wl,-rpath,$ORIGIN", "-o", str(program)]
    subprocess.run(command, cwd=library.parent, check=True)
    return program


def test_thirty_lines_of_c_give_the_same_numbers(library: tuple[Path, cnnc.Module]):
    path, module = library
    assert len(ONE_RUN.strip().splitlines()) <= 30
    x = np.random.default_rng(8).standard_normal((1, 3, 224, 224)).astype(np.float32)
    x.tofile(path.parent / "x.bin")
    program = build(ONE_RUN, path)
    subprocess.run([program, path.parent / "x.bin", path.parent / "y.bin"], check=True, env={})
    y = np.fromfile(path.parent / "y.bin", np.float32).reshape(1, 1000)
    np.testing.assert_array_equal(y, module(x))


def test_eight_threads_at_once_are_bit_equal(library: tuple[Path, cnnc.Module]):
    subprocess.run([build(EIGHT_THREADS, library[0])], check=True, env={})


def test_library_needs_the_c_library_only(library: tuple[Path, cnnc.Module]):
    listed = subprocess.run(["ldd", library[0]], capture_output=True, text=True, check=True).stdout
    needed = {line.split()[0].split("/")[-1] for line in listed.splitlines()}
    assert needed <= {"linux-vdso.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}
