"""Calling compiled kernels from tests."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backends.cpu import tiles


@dataclass(frozen=True)
class TestCpu:
    """A CPU for code generation: the lanes only decide the channel block, as every test machine has AVX2."""

    __test__ = False
    llvm_cpu: str = "x86-64-v3"
    llvm_attrs: tuple[str, ...] = ()


TEST_CPU = TestCpu()


def aligned(array: np.ndarray) -> np.ndarray:
    """Copy an array to memory aligned and padded to 64 bytes, as kernels demand."""
    raw = np.full(array.nbytes + 128, 0xFF, np.uint8)
    start = -raw.ctypes.data % 64
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


KernelCall = Callable[..., np.ndarray]


@pytest.fixture
def call_kernel(tmp_path: Path) -> KernelCall:
    """Compile a PrimFunc and call it: `call_kernel(func, inputs, output_shape, pieces=1, cpu=TEST_CPU)`.

    The range of slices is run in `pieces` parts, the last part first; the output is filled with NaN before.
    """
    from cnnc.backends.cpu.codegen import compile_kernel

    count = 0

    def call(
        func: Any,
        inputs: list[np.ndarray],
        shape: tuple[int, ...],
        pieces: int = 1,
        cpu: Any = TEST_CPU,
        read_once: bool = False,
    ) -> np.ndarray:
        """Run all slices, the last piece first; with `read_once` the first input is there for the first piece only."""
        nonlocal count
        count += 1
        kernel = compile_kernel(func, "kernel", cpu)
        base = tmp_path / f"kernel{count}"
        base.with_suffix(".o").write_bytes(kernel.code)
        library = base.with_suffix(".so")
        subprocess.run(["gcc", "-shared", "-o", library, base.with_suffix(".o"), "-lm"], check=True)
        function = ctypes.CDLL(str(library)).kernel
        output = aligned(np.full(shape, np.nan, np.float32))
        arrays = [aligned(array) for array in inputs]
        scratch = [aligned(np.full(kernel.scratch_bytes, 0xFF, np.uint8))] if kernel.scratch_bytes else []
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*arrays, output, *scratch)]
        bounds = [kernel.slices * i // pieces for i in range(pieces + 1)]
        last = -1
        for low, high in reversed(list(pairwise(bounds))):
            assert function(*pointers, last, low, high) == 0
            last = high - 1
            if read_once:
                arrays[0][...] = np.nan
        return output

    return call


@pytest.fixture(params=["emulated", "real"])
def tile_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give the CPU to compile for, with emulated tile registers, or real ones where there are."""
    if request.param == "emulated":
        tiles.emulate(monkeypatch)
        yield TEST_CPU
    elif tiles.present():
        yield tiles.SAPPHIRE_RAPIDS
    else:
        pytest.skip("this CPU has no tile registers")
