"""Runs CUDA source on the CPU: compiles what nvcc would get with g++ and `emulation/`, and launches it from here."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.codegen import CudaSource, Launch
from cnnc.ir.types import TensorType
from cnnc.ops.fused import Fused
from tests.backends.running import poisoned, unpacked

HEADERS = Path(__file__).parent / "emulation"
FORWARD, BACKWARD, SHUFFLED = 0, 1, 2
FLAGS = ("-std=c++17", "-O0", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-address")

_FUNCTION = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\([^)]*\) \{')
_PRELUDE = re.compile(r"(?m)^(?:#include|#define|template|//) ?.*\n")

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of CUDA needs g++")


class Emulator:
    """Kernels of one g++ run."""

    def __init__(self, sources: Sequence[CudaSource], folder: Path) -> None:
        self._library = ctypes.CDLL(str(compile_sources([source.text for source in sources], folder)))

    def run(self, source: CudaSource, arrays: Sequence[np.ndarray], order: int = FORWARD) -> None:
        """Launch a kernel's functions on its buffers, threads and blocks in the order given."""
        scratch = poisoned((source.scratch_bytes,), np.dtype(np.uint8))
        pointers = [array.ctypes.data for array in arrays]
        for launch in source.launches:
            places = [
                scratch.ctypes.data + place[1] if isinstance(place, tuple) else pointers[place]
                for place in launch.arguments
            ]
            self._launch(launch, places, order)

    def _launch(self, launch: Launch, places: Sequence[int], order: int) -> None:
        values = (ctypes.c_void_p * len(places))(*places)
        size = ctypes.sizeof(ctypes.c_void_p)
        arguments = (ctypes.c_void_p * len(places))(*(ctypes.addressof(values) + i * size for i in range(len(places))))
        function = getattr(self._library, f"cnnc_emulated_{launch.function}")
        function.restype = ctypes.c_char_p
        dimensions = ctypes.c_uint * 3
        error = function(dimensions(*launch.grid), dimensions(*launch.block), launch.shared_bytes, arguments, order)
        assert error is None, f"{launch.function}: {error.decode()}"

    def run_fused(
        self, source: CudaSource, fused: Fused, arrays: Sequence[np.ndarray], order: int = FORWARD
    ) -> list[np.ndarray]:
        """Run a kernel on logical arrays; asserts that it writes nowhere but into its outputs."""
        inputs = [_fenced(value.type, array) for value, array in zip(fused.body.inputs, arrays, strict=True)]
        outputs = [_fenced(value.type, None) for value in fused.body.outputs]
        self.run(source, [view for _, view in (*inputs, *outputs)], order)
        for (memory, view), array in zip(inputs, arrays, strict=True):
            assert _fences_stand(memory, view)
            assert view.tobytes() == _physical(array, view).tobytes(), "an input was written to"
        assert all(_fences_stand(memory, view) for memory, view in outputs), "written outside of an output"
        types = [value.type for value in fused.body.outputs]
        return [unpacked(type_, view) for type_, (_, view) in zip(types, outputs, strict=True)]


_FENCE, _FENCE_BYTES = 0xC3, 256


def _fenced(type_: TensorType, array: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Give memory with fences around a buffer, and the buffer: an input's numbers, or poison."""
    shape, dtype = type_.physical_shape, type_.dtype.numpy
    start = poisoned(shape, dtype)
    if array is not None:
        start[...] = array if type_.layout is None else type_.layout.pack(array)
    memory = np.full(start.nbytes + 3 * _FENCE_BYTES, _FENCE, np.uint8)
    offset = _FENCE_BYTES + -(memory.ctypes.data + _FENCE_BYTES) % 256
    view = memory[offset : offset + start.nbytes].view(dtype).reshape(shape)
    view[...] = start
    return memory, view


def _physical(array: np.ndarray, view: np.ndarray) -> np.ndarray:
    """Give the bytes an input had: those of the view if it is packed, which `_fenced` made."""
    return np.asarray(array) if np.asarray(array).shape == view.shape else view


def _fences_stand(memory: np.ndarray, view: np.ndarray) -> bool:
    start = view.ctypes.data - memory.ctypes.data
    return bool((memory[:start] == _FENCE).all() and (memory[start + view.nbytes :] == _FENCE).all())


def compile_sources(texts: Sequence[str], folder: Path) -> Path:
    """Compile CUDA sources, as they go to nvcc, into one library."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    (folder / "kernels.cpp").write_text(emulated(texts))
    command = ["g++", *FLAGS, "-I", HEADERS, folder / "kernels.cpp", "-o", folder / "kernels.so"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return folder / "kernels.so"


def emulated(texts: Sequence[str]) -> str:
    """Give the sources as one C++ file, one prelude for all, and a door to each function."""
    headers = ["#include <cuda_fp16.h>\n", "#include <cuda_bf16.h>\n"]
    prelude = next((text[: text.index("extern")] for text in texts if text), "")
    functions = [_PRELUDE.sub("", text) for text in texts]
    doors = [f"CNNC_EMULATED({name})\n" for text in functions for name in _FUNCTION.findall(text)]
    return "".join(['#include "emulation.h"\n', *headers, prelude, *functions, *doors])
