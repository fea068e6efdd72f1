"""Runs kernels in this process: compiles, links, and calls the slices out of order on poisoned memory."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cnnc.backends.cpu.codegen import KernelObject
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.op import Op
from cnnc.ir.types import TensorType
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input

POISON = 0xA5


def aligned(array: np.ndarray) -> np.ndarray:
    """Copy an array to memory at a multiple of 64 bytes."""
    array = np.asarray(array)
    raw = np.full(array.nbytes + 128, POISON, np.uint8)
    start = -raw.ctypes.data % 64
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def poisoned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Make aligned memory that holds no number anyone would compute."""
    result = aligned(np.zeros(shape, dtype))
    if result.size:
        result.reshape(-1).view(np.uint8)[...] = POISON
    return result


def link(kernels: Sequence[KernelObject], folder: Path) -> ctypes.CDLL:
    """Link kernels into a library and load it."""
    # A path that was loaded before would give the old library again.
    folder = Path(tempfile.mkdtemp(dir=folder))
    files = []
    for kernel in kernels:
        file = folder / f"{kernel.symbol}.o"
        file.write_bytes(kernel.code)
        files.append(file)
    library = folder / "kernels.so"
    subprocess.run(["gcc", "-shared", "-o", library, *files, "-lm"], check=True)
    return ctypes.CDLL(str(library))


def run(library: ctypes.CDLL, kernel: KernelObject, arrays: Sequence[np.ndarray], pieces: int = 3) -> None:
    """Call a kernel on aligned arrays, its slices in `pieces` parts, the last first, as a thread may that helps."""
    scratch = [poisoned((kernel.scratch_bytes,), np.dtype(np.uint8))] if kernel.scratch_bytes else []
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*arrays, *scratch)]
    bounds = sorted({kernel.slices * i // pieces for i in range(pieces + 1)})
    last = -1
    for low, high in reversed(list(pairwise(bounds))):
        assert getattr(library, kernel.symbol)(*pointers, last, low, high) == 0
        last = high - 1


def run_fused(
    library: ctypes.CDLL, kernel: KernelObject, fused: Fused, arrays: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Run a kernel on logical arrays; asserts that pad lanes of the outputs hold 0."""
    inputs = []
    for value, array in zip(fused.body.inputs, arrays, strict=True):
        layout = value.type.layout
        inputs.append(aligned(array if layout is None else layout.pack(array)))
    types = [value.type for value in fused.body.outputs]
    outputs = [poisoned(type_.physical_shape, type_.dtype.numpy) for type_ in types]
    run(library, kernel, [*inputs, *outputs])
    return [unpacked(type_, output) for type_, output in zip(types, outputs, strict=True)]


def unpacked(type_: TensorType, output: np.ndarray) -> np.ndarray:
    """Give the logical array; asserts that pad lanes hold 0."""
    if type_.layout is None:
        return output
    logical = type_.layout.unpack(output, type_.static_shape)
    assert np.array_equal(type_.layout.pack(logical).view(np.uint8), output.view(np.uint8)), "pad lanes are not 0"
    return logical


def fused_op(op: Op, types: Sequence[TensorType]) -> Fused:
    """Make the kernel of one operator."""
    inputs = tuple(call(Input(f"x{i}", type_)) for i, type_ in enumerate(types))
    return Fused(Graph("kernel", inputs, call(op, *inputs).node.values), op.name)


def assert_close(result: np.ndarray, wanted: Any, tolerance: float | None = None) -> None:
    """Hold a result against a reference: equal integers, floats within a few units of their precision."""
    wanted = np.asarray(wanted)
    assert (result.dtype, result.shape) == (wanted.dtype, wanted.shape)
    if result.dtype.kind in "biu":
        np.testing.assert_array_equal(result, wanted)
        return
    bound = {"float32": 2e-5, "float64": 1e-10, "float16": 2e-3, "bfloat16": 2e-2}[str(result.dtype)]
    bound = bound if tolerance is None else tolerance
    np.testing.assert_allclose(result.astype(np.float64), wanted.astype(np.float64), rtol=bound, atol=bound)
