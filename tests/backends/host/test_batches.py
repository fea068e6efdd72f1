"""Several batch sizes in one binary, with kernels written in C: choosing, switching, threads, copies, a C program."""

from __future__ import annotations

import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnc.backends.host.header import emit_header
from cnnc.backends.host.jit import JitModel
from cnnc.backends.host.library import LoadedModel, SharedModel, aligned_empty
from cnnc.backends.host.link import build_executable, build_shared
from cnnc.backends.host.program import KernelCall, Port, Program, Slot, Variant
from cnnc.errors import UsageError, VerifyError

SIZES = (12, 24, 1)
"""Rows of each batch size of the model in conftest; `argmax` takes twelve rows a slice, so one row goes without."""


def several(small: Any) -> Program:
    """Give the model in conftest for each batch size; that of one row has a kernel less, and an empty second output."""
    others = []
    for rows in SIZES[1:]:
        matmul, bias_exp, argmax = small.program.calls
        calls = [replace(matmul, slices=rows), replace(bias_exp, slices=rows)]
        calls += [replace(argmax, slices=rows // 12)] if rows >= 12 else []
        outputs = (Port("y", "f32", (rows, 20)), Port("best", "i32", (rows if rows >= 12 else 0,)))
        others.append(Variant(rows, (Port("x", "f32", (rows, 32)),), outputs, tuple(calls)))
    return replace(small.program, batch=SIZES[0], others=tuple(others), arena_bytes=24 * 80)


def expected(small: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, best = small.expected(x)
    return y, best if len(x) >= 12 else best[:0]


def check(small: Any, x: np.ndarray, got: list[np.ndarray]) -> None:
    y, best = expected(small, x)
    np.testing.assert_allclose(got[0], y, rtol=1e-5)
    np.testing.assert_array_equal(got[1], best)


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 32)).astype(np.float32)


@pytest.fixture(scope="module", params=["shared", "jit"])
def model(
    request: pytest.FixtureRequest, small: Any, kernels: bytes, tmp_path_factory: pytest.TempPathFactory
) -> LoadedModel:
    program = several(small)
    if request.param == "jit":
        return JitModel(program, [kernels])
    path = tmp_path_factory.mktemp("so") / "small.so"
    build_shared(program, [kernels], path)
    return SharedModel(path)


def test_description_survives_the_binary(model: LoadedModel, small: Any) -> None:
    program = several(small)
    assert [v.batch for v in model.variants] == list(SIZES)
    for loaded, variant in zip(model.variants, program.variants, strict=True):
        assert (loaded.inputs, loaded.outputs) == (variant.inputs, variant.outputs)
        assert [k.symbol for k in loaded.kernels] == [c.symbol for c in variant.calls]
    assert (model.inputs, model.outputs) == (program.inputs, program.outputs)
    assert model.arena_bytes == 24 * 80


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_switching_on_one_context_changes_no_bit(model: LoadedModel, small: Any, threads: int) -> None:
    order = np.random.default_rng(5).choice(SIZES, 60)
    inputs = {size: rows(size, size) for size in SIZES}
    with model.create(threads) as context:
        first = {size: context.run([x]) for size, x in inputs.items()}
        for size in SIZES:
            check(small, inputs[size], first[size])
        for size in order:
            for got, wanted in zip(context.run([inputs[size]]), first[size], strict=True):
                np.testing.assert_array_equal(got, wanted)


def test_eight_threads_with_a_context_each(model: LoadedModel, small: Any) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with model.create(1 + seed % 3) as context:
                for turn in range(30):
                    x = rows(SIZES[(turn + seed) % 3], 100 * seed + turn)
                    check(small, x, context.run([x]))
        except BaseException as error:
            failures.append(error)

    users = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not failures, failures


def test_a_batch_size_that_is_not_there_is_refused(model: LoadedModel) -> None:
    with model.create() as context:
        cure = "compile the model with --batch 1,7,12,24$"
        with pytest.raises(UsageError, match=f"small: not compiled for batch size 7, only for 12, 24, 1; {cure}"):
            context.run([rows(7, 0)])
        with pytest.raises(UsageError, match=r"input 'x' is f32\[24, 32\], got float32\[24, 31\]"):
            context.run([rows(24, 0)[:, :31]])
        with pytest.raises(UsageError, match=r"input 'x' is f32\[12, 32\], got float32\[\]"):
            context.run([np.float32(1)])  # type: ignore[list-item]
        with pytest.raises(UsageError, match=r"input 'x' is f32\[12, 32\], got float64\[12, 32\]"):
            context.run([rows(12, 0).astype(np.float64)])
        y = aligned_empty((12, 20), "f32")
        y[:] = 7
        code = model.table.run_batch(context._handle, 7, None, None)
        text = model.table.error_text(code).decode()
        assert (code, text) == (
            206,
            "the model was not compiled for this batch size: batch_count and batch_at tell for which it was",
        )
        assert (y == 7).all()


def test_misaligned_pointers_of_any_batch_size(model: LoadedModel, small: Any) -> None:
    """The smallest comes first: its copies must be large enough for the others."""
    import ctypes

    with model.create(2) as context:
        for size in (1, 24, 12, 24):
            variant = next(v for v in model.variants if v.batch == size)
            x = rows(size, size)
            memory = [np.zeros(port.nbytes + 128, np.uint8) for port in (*variant.inputs, *variant.outputs)]
            at = [array.ctypes.data + (-array.ctypes.data % 64) + 4 for array in memory]
            ctypes.memmove(at[0], x.ctypes.data, x.nbytes)
            ins, outs = (ctypes.c_void_p * 1)(at[0]), (ctypes.c_void_p * 2)(*at[1:])
            assert model.table.run_batch(context._handle, size, ins, outs) == 0
            y = np.frombuffer(ctypes.string_at(at[1], size * 80), np.float32).reshape(size, 20)
            np.testing.assert_allclose(y, expected(small, x)[0], rtol=1e-5)


def test_kernels_are_timed_for_each_batch_size(model: LoadedModel) -> None:
    twelve, more, one = model.variants
    with model.create() as context:
        context.profile(True)
        for _ in range(3):
            context.run([rows(24, 0)])
        context.run([rows(1, 0)])
        assert [time.calls for time in context.kernel_times(more)] == [3, 3, 3]
        assert [time.calls for time in context.kernel_times(one)] == [1, 1]
        assert [time.calls for time in context.kernel_times(twelve)] == [0, 0, 0]
        assert all(time.ns > 0 for time in context.kernel_times(more))


C_PROGRAM = r"""
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "small.h"

static float x[24 * 32], y[24 * 20], again[24 * 20];
static int32_t best[24];

int main(void) {
  const void *inputs[] = {x};
  void *outputs[2];
  small_context *context = NULL;
  int i, bad = 0;
  for (i = 0; i < 24 * 32; i++) x[i] = (float)(i % 7) / 7.0f;
  outputs[0] = y;
  outputs[1] = best;
  bad |= small_abi_version() != small_ABI_VERSION || small_create(2, &context) != 0;
  bad |= small_batch_count() != small_BATCH_COUNT || small_BATCH_COUNT != 3;
  bad |= small_batch_at(0) != 12 || small_batch_at(1) != 24 || small_batch_at(2) != 1;
  bad |= small_batch_at(3) != 0 || small_batch_at(-1) != 0;
  for (i = 0; i < 3; i++) {
    const int batch = small_batch_at(i);
    const small_tensor_info *in = small_batch_input(batch, 0), *out = small_batch_output(batch, 0);
    bad |= in->dims[0] != batch || out->dims[0] != batch || out->bytes != (uint64_t)batch * 80;
    bad |= small_run_batch(context, batch, inputs, outputs) != 0;
    bad |= i > 0 && memcmp(y, again, 80) != 0;
    memcpy(again, y, sizeof y);
  }
  bad |= small_batch_input(5, 0) != NULL || small_batch_output(24, 2) != NULL || small_batch_kernel(5, 0) != NULL;
  bad |= small_batch_kernel_count(5) != 0 || small_batch_kernel_count(1) != 2 || small_batch_kernel_count(24) != 3;
  bad |= strcmp(small_batch_kernel(1, 0)->symbol, "matmul") != 0 || small_batch_kernel(1, 2) != NULL;
  bad |= small_run_batch(context, 5, inputs, outputs) != small_ERROR_BATCH;
  bad |= small_run_batch(NULL, 24, inputs, outputs) != small_ERROR_NULL;
  bad |= small_input(0)->dims[0] != 12 || small_kernel_count() != 3;
  bad |= small_run(context, inputs, outputs) != 0 || memcmp(y, again, 80) != 0;
  bad |= small_profile(context, 1) != 0 || small_run_batch(context, 1, inputs, outputs) != 0;
  uint64_t calls = 9;
  bad |= small_batch_kernel_ns(context, 1, 0, &calls) == 0 || calls != 1;
  bad |= small_kernel_ns(context, 0, &calls) != 0 || calls != 0;
  bad |= small_batch_kernel_ns(context, 5, 0, &calls) != 0 || calls != 0;
  bad |= small_INPUT_0_BYTES != 12 * 128 || small_BATCH_24_INPUT_0_BYTES != 24 * 128;
  bad |= small_BATCH_1_OUTPUT_0_BYTES != 80 || small_BATCH_12_OUTPUT_1_BYTES != 48;
  bad |= small_destroy(context) != 0;
  for (i = 0; i < 20; i++) bad |= !isfinite(y[i]);
  puts(small_error_text(small_ERROR_BATCH));
  return bad;
}
"""


def test_a_c_program(small: Any, kernels: bytes, tmp_path: Path) -> None:
    program = several(small)
    build_shared(program, [kernels], tmp_path / "small.so")
    (tmp_path / "small.h").write_text(emit_header(program))
    (tmp_path / "main.c").write_text(C_PROGRAM)
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    command = ["cc", *flags, "main.c", "small.so", "-lm", "-Wl,-rpath,$ORIGIN", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=False, env={})
    assert (done.returncode, done.stdout) == (
        0,
        "the model was not compiled for this batch size: batch_count and batch_at tell for which it was\n",
    )


def test_header_tells_the_shapes_of_each_batch_size(small: Any) -> None:
    header = emit_header(several(small))
    assert (
        " * for batch size 12, the first of 12, 24, 1\n"
        " * input 0: x f32[12,32]\n"
        " * output 0: y f32[12,20]\n"
        " * output 1: best i32[12]\n"
        " * for batch size 24\n"
        " * input 0: x f32[24,32]\n" in header
    )


@pytest.fixture(scope="module")
def program(small: Any, kernels: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exe") / "small"
    build_executable(several(small), [kernels], path)
    return path


def run(program: Path, *arguments: object) -> tuple[int, str, str]:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("size", SIZES)
def test_the_executable_takes_the_batch_size_of_its_input(program: Path, small: Any, size: int, tmp_path: Path) -> None:
    x = rows(size, 3)
    np.save(tmp_path / "x.npy", x)
    assert run(program, tmp_path / "x.npy", "-o", tmp_path / "y.npy")[0] == 0
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected(small, x)[0], rtol=1e-5)
    assert run(program, "--batch", size, tmp_path / "x.npy", "-o", tmp_path / "z.npy")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.load(tmp_path / "z.npy"))
    code, out, _ = run(program, "--bench", "3", tmp_path / "x.npy")
    assert code == 0
    assert "3 runs" in out


def test_the_executable_refuses_other_batch_sizes(program: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(7, 3))
    code, _, error = run(program, tmp_path / "x.npy")
    assert (code, error) == (
        3,
        "small: the inputs are of none of the batch sizes 12, 24, 1 (a picture is a batch of one)\n",
    )
    code, _, error = run(program, "--batch", 7, tmp_path / "x.npy")
    assert (code, error) == (2, "small: --batch 7: compiled for batch sizes 12, 24, 1\n")
    code, _, error = run(program, "--batch", 24, tmp_path / "x.npy")
    assert code == 3
    assert "holds '<f4' (7, 32), the model takes f32[24,32]" in error
    assert run(program, "--batch", 0, tmp_path / "x.npy")[0] == 2
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:20])
    code, _, error = run(program, tmp_path / "cut.npy")
    assert code == 3
    assert "not a .npy array of version 1 to 3, or cut" in error
    code, out, _ = run(program, "--help")
    assert code == 0
    assert "--batch N" in out
    assert "(12, 24, 1)" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 24}, r"batch sizes \[24, 24, 1\], wanted are different ones"),
        ({"batch": 0}, "wanted are different ones of at least 1"),
        ({"inputs": (Port("z", "f32", (12, 32)),)}, "other ports for batch size 24 than for 12"),
        ({"outputs": (Port("y", "f32", (12, 20)), Port("best", "i64", (12,)))}, "other ports for batch size 24"),
    ],
)
def test_impossible_programs(small: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        replace(several(small), **change)


def test_slots_of_every_batch_size_are_checked(small: Any) -> None:
    first = small.program
    outside = KernelCall("nothing", (Slot("arena", 4096),))
    with pytest.raises(VerifyError, match="arena 4096 is outside of 960"):
        replace(first, batch=1, others=(Variant(2, first.inputs, first.outputs, (outside,)),))
