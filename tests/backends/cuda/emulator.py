"""Runs CUDA source on the CPU: compiles what nvcc would get with g++ and `emulation/`, and launches it from here."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.codegen import CudaSource, Launch
from cnnc.backends.host.device import TensorMap
from cnnc.ir.types import TensorType
from cnnc.ops.fused import Fused
from tests.backends.cuda.fake_nvcc import compile_library
from tests.backends.running import poisoned, unpacked

FORWARD, BACKWARD, SHUFFLED = 0, 1, 2
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of CUDA needs g++")


MAP_BYTES, MAP_ALIGNMENT = 128, 64
_MAP_TYPES = {"f16": 6, "bf16": 9, "u64": 4}
_SWIZZLE_128B = 3


def encoded(library: ctypes.CDLL, described: TensorMap, pointer: int) -> tuple[np.ndarray, int]:
    """Have a library with the driver's two functions make a map; give it, and the error."""
    raw = np.zeros(MAP_BYTES + MAP_ALIGNMENT, np.uint8)
    made = raw[-raw.ctypes.data % MAP_ALIGNMENT :][:MAP_BYTES]
    rank = len(described.shape)

    def array(kind: type, values: Sequence[int]) -> ctypes.Array:
        return (kind * len(values))(*values)

    shape, strides = array(ctypes.c_uint64, described.shape), array(ctypes.c_uint64, described.strides)
    steps = array(ctypes.c_uint32, described.steps or (1,) * rank)
    first = (ctypes.c_void_p(made.ctypes.data), _MAP_TYPES[described.dtype], rank, ctypes.c_void_p(pointer))
    last = (steps, 0, _SWIZZLE_128B if described.swizzled else 0, 0, 0)
    if not described.is_im2col:
        box = array(ctypes.c_uint32, described.box)
        return made, library.cnnc_emulated_encode_tiled(*first, shape, strides, box, *last)
    corners = array(ctypes.c_int, described.lower), array(ctypes.c_int, described.upper)
    return made, library.cnnc_emulated_encode_im2col(*first, shape, strides, *corners, *described.box, *last)


class Emulator:
    """Kernels of one g++ run."""

    def __init__(self, sources: Sequence[CudaSource], folder: Path) -> None:
        # A path that was loaded before would give the old library again.
        folder = Path(tempfile.mkdtemp(dir=folder))
        compile_library([source.text for source in sources], folder, folder / "kernels.so")
        self.path = folder / "kernels.so"
        self._library = ctypes.CDLL(str(self.path))

    def run(self, source: CudaSource, arrays: Sequence[np.ndarray], order: int = FORWARD) -> None:
        """Launch a kernel's functions on its buffers, threads and blocks in the order given."""
        scratch = poisoned((source.scratch_bytes,), np.dtype(np.uint8))
        pointers = [array.ctypes.data for array in arrays]
        for launch in source.launches:
            maps = [self.encode(described, pointers[position]) for position, described in launch.maps]
            arguments = []
            for place in launch.arguments:
                if not isinstance(place, tuple):
                    arguments.append(np.array([pointers[place]], np.uint64))
                elif place[0] == "map":
                    arguments.append(maps[place[1]])
                else:
                    arguments.append(np.array([scratch.ctypes.data + place[1]], np.uint64))
            self._launch(launch, arguments, order)

    def encode(self, described: TensorMap, pointer: int) -> np.ndarray:
        """Make a map of what lies at an address, as the driver does; asserts that it is one it makes."""
        made, error = encoded(self._library, described, pointer)
        assert error == 0, described
        return made

    def _launch(self, launch: Launch, values: Sequence[np.ndarray], order: int) -> None:
        arguments = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
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
