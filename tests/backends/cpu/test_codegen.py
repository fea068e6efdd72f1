"""Objects from scheduled TIR: plain C functions, sliced, with their scratch, and nothing undefined."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu.codegen import KernelJob, compile_kernel, compile_kernels, kernel_text
from cnnc.backends.cpu.elf_symbols import read_symbols
from cnnc.backends.load_tvm import load_tvm
from cnnc.errors import VerifyError
from cnnc.target import Target
from tests.backends.running import aligned, link, poisoned, run

load_tvm()

from tvm import s_tir, te, tirx  # noqa: E402  (after load_tvm, which keeps torch out)

TARGET = Target.parse("cpu")
_POINTER = ctypes.c_void_p
ROWS, COLUMNS = 12, 1000


def row_sums(parallel: bool = True, row_buffer: int = COLUMNS) -> Any:
    """y[i,j] = x[i,j]**2 / sum_k x[i,k]**2, the squares kept in a buffer for each row."""
    x = te.placeholder((ROWS, row_buffer), name="x")
    square = te.compute(x.shape, lambda i, j: x[i, j] * x[i, j], name="square")
    k = te.reduce_axis((0, row_buffer), "k")
    total = te.compute((ROWS,), lambda i: te.sum(square[i, k], axis=k), name="total")
    y = te.compute(x.shape, lambda i, j: square[i, j] / total[i], name="y")
    sch = s_tir.Schedule(te.create_prim_func([x, y]))
    row = sch.get_loops(sch.get_sblock("y"))[0]
    if parallel:
        sch.parallel(row)
    sch.compute_at(sch.get_sblock("total"), row)
    sch.compute_at(sch.get_sblock("square"), row)
    return sch.mod["main"]


def wanted(x: np.ndarray) -> np.ndarray:
    return x * x / (x * x).sum(axis=1, keepdims=True)


def drawn(columns: int = COLUMNS) -> np.ndarray:
    return aligned(np.random.default_rng(3).uniform(0.5, 2, (ROWS, columns)).astype(np.float32))


@pytest.mark.parametrize("pieces", [1, 2, 5, ROWS])
def test_slices_together_are_the_whole(pieces: int, tmp_path: Path) -> None:
    kernel = compile_kernel(row_sums(), "kernel", TARGET)
    assert kernel.slices == ROWS
    x, y = drawn(), poisoned((ROWS, COLUMNS), np.dtype(np.float32))
    run(link([kernel], tmp_path), kernel, [x, y], pieces)
    np.testing.assert_allclose(y, wanted(x), rtol=1e-5)


def test_a_slice_writes_its_own_rows_only(tmp_path: Path) -> None:
    kernel = compile_kernel(row_sums(), "kernel", TARGET)
    x, y = drawn(), aligned(np.full((ROWS, COLUMNS), -1, np.float32))
    scratch = poisoned((kernel.scratch_bytes,), np.dtype(np.uint8))
    library = link([kernel], tmp_path)
    library.kernel(*(a.ctypes.data_as(_POINTER) for a in (x, y, scratch)), -1, 3, 5)
    assert np.flatnonzero((y != -1).any(axis=1)).tolist() == [3, 4]


def test_a_kernel_without_a_parallel_loop_is_one_slice(tmp_path: Path) -> None:
    kernel = compile_kernel(row_sums(parallel=False), "kernel", TARGET)
    assert kernel.slices == 1
    x, y = drawn(), aligned(np.full((ROWS, COLUMNS), -1, np.float32))
    scratch = poisoned((kernel.scratch_bytes,), np.dtype(np.uint8))
    library = link([kernel], tmp_path)
    pointers = [a.ctypes.data_as(_POINTER) for a in (x, y, scratch)]
    library.kernel(*pointers, -1, 0, 0)
    library.kernel(*pointers, -1, 1, 2)
    assert (y == -1).all()
    library.kernel(*pointers, -1, 0, 1)
    np.testing.assert_allclose(y, wanted(x), rtol=1e-5)


def test_large_temporaries_are_scratch_and_small_ones_are_not() -> None:
    assert compile_kernel(row_sums(), "kernel", TARGET).scratch_bytes == 4032
    assert compile_kernel(row_sums(row_buffer=64), "kernel", TARGET).scratch_bytes == 0


def test_work_outside_of_the_parallel_loop_makes_one_slice(tmp_path: Path) -> None:
    x = te.placeholder((ROWS, COLUMNS), name="x")
    square = te.compute(x.shape, lambda i, j: x[i, j] * x[i, j], name="square")
    y = te.compute(x.shape, lambda i, j: square[ROWS - 1 - i, j] + 1.0, name="y")
    sch = s_tir.Schedule(te.create_prim_func([x, y]))
    for name in ("square", "y"):
        sch.parallel(sch.get_loops(sch.get_sblock(name))[0])
    kernel = compile_kernel(sch.mod["main"], "kernel", TARGET)
    assert kernel.slices == 1
    arrays = [drawn(), poisoned((ROWS, COLUMNS), np.dtype(np.float32))]
    run(link([kernel], tmp_path), kernel, arrays)
    np.testing.assert_allclose(arrays[1], arrays[0][::-1] ** 2 + 1, rtol=1e-6)


def test_in_place_when_told_that_buffers_overlap(tmp_path: Path) -> None:
    kernel = compile_kernel(elementwise(lambda v: v * v + v), "kernel", TARGET, noalias=False)
    x = drawn()
    expected = x * x + x
    run(link([kernel], tmp_path), kernel, [x, x])
    np.testing.assert_allclose(x, expected, rtol=1e-6)


def elementwise(function: Callable[[Any], Any]) -> Any:
    x = te.placeholder((ROWS, COLUMNS), name="x")
    return te.create_prim_func([x, te.compute(x.shape, lambda i, j: function(x[i, j]), name="y")])


def test_an_unknown_function_is_refused() -> None:
    func = elementwise(lambda v: tirx.call_pure_extern("float32", "no_such_function", v))
    with pytest.raises(VerifyError, match="kernel: the object needs no_such_function, which no library has"):
        compile_kernel(func, "kernel", TARGET)


def test_libm_is_allowed() -> None:
    kernel = compile_kernel(elementwise(lambda v: tirx.call_pure_extern("float32", "sinf", v)), "kernel", TARGET)
    assert read_symbols(kernel.code).undefined == {"sinf"}


def test_kernels_need_nothing() -> None:
    symbols = read_symbols(compile_kernel(row_sums(), "kernel", TARGET).code)
    assert "kernel" in symbols.defined
    assert symbols.undefined == frozenset()


def test_threads_give_the_same_bytes_as_one() -> None:
    jobs = [KernelJob(row_sums(row_buffer=100 + i), f"kernel{i}") for i in range(6)]
    once = compile_kernels(jobs, TARGET, threads=1)
    assert compile_kernels(jobs, TARGET, threads=4) == once
    assert [kernel.symbol for kernel in once] == [job.symbol for job in jobs]


def test_text_forms() -> None:
    func = row_sums()
    assert "def kernel(" in kernel_text(func, "kernel", TARGET, "tir")
    assert "define dllexport" in kernel_text(func, "kernel", TARGET, "ll")
    assert "kernel:" in kernel_text(func, "kernel", TARGET, "s")


def test_llvmlite_reads_the_ir() -> None:
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(kernel_text(row_sums(), "kernel", TARGET, "ll"))
    module.verify()
    assert any(function.name == "kernel" for function in module.functions)


@pytest.mark.parametrize("code", [b"", b"\x7fELF", b"MZ" + bytes(200), b"\x7fELF\x02\x01" + b"\xff" * 100])
def test_what_is_no_object_is_refused(code: bytes) -> None:
    with pytest.raises(VerifyError, match="ELF"):
        read_symbols(code)


def test_other_cpus_use_their_registers() -> None:
    func = elementwise(lambda v: v * 2.0)
    assert "zmm" in kernel_text(func, "kernel", Target.parse("cpu:x86-64-v4"), "s")
    assert "ymm" in kernel_text(func, "kernel", Target.parse("cpu:x86-64-v3"), "s")
    assert "ymm" not in kernel_text(func, "kernel", Target.parse("cpu:x86-64-v2"), "s")
