"""A small model assembled by hand: kernels written in C, compiled here, called by our driver."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.host.program import KernelCall, Port, Program, Slot

KERNELS = r"""
#include <stdint.h>
#include <math.h>
enum { K = 32, N = 20 };
int32_t matmul(const float *x, const float *w, float *t, double *sum, int32_t last, int32_t lo, int32_t hi) {
  for (int m = lo; m < hi; m++) {
    for (int n = 0; n < N; n++) {
      sum[n] = 0;
      for (int k = 0; k < K; k++) sum[n] += (double)x[m * K + k] * w[k * N + n];
    }
    for (int n = 0; n < N; n++) t[m * N + n] = (float)sum[n];
  }
  return 0;
}
int32_t bias_exp(const float *t, const float *b, float *y, int32_t last, int32_t lo, int32_t hi) {
  for (int m = lo; m < hi; m++)
    for (int n = 0; n < N; n++) y[m * N + n] = expf(t[m * N + n] + b[n]);
  return 0;
}
int32_t argmax(const float *y, int32_t *best, int32_t last, int32_t lo, int32_t hi) {
  for (int m = lo * 12; m < hi * 12; m++) {
    best[m] = 0;
    for (int n = 1; n < N; n++) if (y[m * N + n] > y[m * N + best[m]]) best[m] = n;
  }
  return 0;
}
int32_t gather(const float *x, const int32_t *index, float *y, int32_t last, int32_t lo, int32_t hi) {
  for (int i = lo; i < hi; i++) {
    if (index[i] < 0) return -1;
    if (index[i] >= 8) return 1;
    y[i] = x[index[i]];
  }
  return 0;
}
int32_t halve(const float *x, float *y, int32_t last, int32_t lo, int32_t hi) {
  for (int i = lo; i < hi; i++) y[i] = x[i] * 0.5f;
  return 0;
}
int32_t nothing(void *p, int32_t last, int32_t lo, int32_t hi) {
  (void)p;
  return lo > hi;
}
int32_t spin(float *y, int32_t last, int32_t lo, int32_t hi) {
  for (int i = lo; i < hi; i++) {
    volatile double x = 1;
    for (int j = 0; j < 40000000; j++) x = x * 1.0000001;
    y[i] = (float)x;
  }
  return 0;
}
int32_t needs_missing(float *y, int32_t last, int32_t lo, int32_t hi) {
  extern int32_t no_such_function(float *, int32_t, int32_t, int32_t);
  return no_such_function(y, last, lo, hi);
}
"""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what the tests compile out of the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("CNNC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def compile_c(source: str, folder: Path) -> bytes:
    (folder / "kernels.c").write_text(source)
    flags = ["-O2", "-fPIC", "-ffp-contract=off", "-ffunction-sections"]
    subprocess.run(["cc", *flags, "-c", "kernels.c", "-o", "kernels.o"], cwd=folder, check=True)
    return (folder / "kernels.o").read_bytes()


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """All kernels but the one that cannot be linked, as one object."""
    source = KERNELS[: KERNELS.index("int32_t needs_missing")]
    return compile_c(source, tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def broken_kernels(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return compile_c(KERNELS, tmp_path_factory.mktemp("broken"))


class Small:
    """exp(x @ w + b) and the index of its greatest entry in each row: three kernels, scratch, two outputs."""

    def __init__(self, seed: int = 0, name: str = "small") -> None:
        rng = np.random.default_rng(seed)
        self.w = (rng.standard_normal((32, 20)) / 6).astype(np.float32)
        self.b = rng.standard_normal(20).astype(np.float32)
        weights = (self.w.tobytes(), self.b.tobytes())
        self.program = Program(
            name=name,
            inputs=(Port("x", "f32", (12, 32)),),
            outputs=(Port("y", "f32", (12, 20)), Port("best", "i32", (12,))),
            calls=(
                KernelCall(
                    "matmul",
                    (Slot("input", 0), Slot("weights", 0), Slot("arena", 0), Slot("scratch", 64)),
                    slices=12,
                    layers=("fc1", "fc1/MatMul"),
                    flops=2 * 12 * 32 * 20,
                    bytes=4 * (12 * 32 + 32 * 20 + 12 * 20),
                    algorithm="gemm",
                    schedule="rows",
                ),
                KernelCall(
                    "bias_exp", (Slot("arena", 0), Slot("weights", 2560), Slot("output", 0)), 12, ("fc1/Add", "exp")
                ),
                KernelCall("argmax", (Slot("output", 0), Slot("output", 1)), 1, ("argmax",)),
            ),
            arena_bytes=960,
            scratch_bytes=64 + 160,
            weights=weights,
            features=("sse2",),
            meta='{"made_by": "a test"}',
        )

    def inputs(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((12, 32)).astype(np.float32)

    def expected(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y = np.exp(x.astype(np.float64) @ self.w.astype(np.float64) + self.b)
        return y, y.argmax(axis=1)


@pytest.fixture(scope="session")
def small() -> Small:
    return Small()


@pytest.fixture(scope="session")
def make_small() -> type[Small]:
    return Small
