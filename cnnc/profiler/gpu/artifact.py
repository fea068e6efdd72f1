"""A CUDA artifact as its C interface has it: inputs and outputs on the GPU, runs put into a stream."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from cnnc.backends.host.library import LoadedVariant, SharedModel, aligned_empty
from cnnc.errors import EnvironmentProblem

_NON_BLOCKING = 1


class _Driver:
    """What is needed of CUDA's driver; every call that fails raises `EnvironmentProblem`."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver."""
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise EnvironmentProblem(f"{name} failed (CUDA error {code})")


class DeviceArtifact:
    """One batch size of an artifact, with memory of its own on the first GPU and a stream; used by `with`."""

    name = "cnnc"

    def __init__(self, model: SharedModel, variant: LoadedVariant, inputs: Sequence[np.ndarray]) -> None:
        self._library = ctypes.CDLL(model.path)
        self._prefix = model.prefix
        self._variant = variant
        self._driver = _Driver()
        self._handle = ctypes.c_void_p()
        self._stream = ctypes.c_void_p()
        self._device = ctypes.c_int()
        self._check(self._function("create")(1, ctypes.byref(self._handle)))
        self._enter_context()
        self._inputs = [self._allocate(array.nbytes) for array in inputs]
        self._outputs = [self._allocate(port.nbytes) for port in variant.outputs]
        for place, array in zip(self._inputs, inputs, strict=True):
            data = np.ascontiguousarray(array)
            self._driver.call("cuMemcpyHtoD_v2", place, ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes))
        self._driver.call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)
        self._arguments = (_pointers(self._inputs), _pointers(self._outputs), self._stream)
        several = len(model.variants) > 1
        run = self._function("run_batch_async" if several else "run_async")
        leading = (self._handle, variant.batch) if several else (self._handle,)
        self._run: Callable[[], int] = lambda: run(*leading, *self._arguments)

    def start(self) -> None:
        """Put a run into the stream."""
        self._check(self._run())

    def wait(self) -> None:
        """Return when all runs are done."""
        self._driver.call("cuStreamSynchronize", self._stream)

    def outputs(self) -> list[np.ndarray]:
        """Give the outputs of the last run."""
        self._check(self._function("wait")(self._handle))
        arrays = [aligned_empty(port.shape, port.dtype) for port in self._variant.outputs]
        for place, array in zip(self._outputs, arrays, strict=True):
            where = ctypes.c_void_p(array.ctypes.data)
            self._driver.call("cuMemcpyDtoHAsync_v2", where, place, ctypes.c_size_t(array.nbytes), self._stream)
        self.wait()
        return arrays

    def __enter__(self) -> DeviceArtifact:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a failure of the GPU nothing of it can be given back.
        if error is None:
            self.wait()
            self._check(self._function("destroy")(self._handle))
            for place in (*self._inputs, *self._outputs):
                self._driver.call("cuMemFree_v2", place)
            self._driver.call("cuStreamDestroy_v2", self._stream)
            self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
            self._driver.call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _enter_context(self) -> None:
        context = ctypes.c_void_p()
        self._driver.call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._driver.call("cuCtxPushCurrent_v2", context)

    def _allocate(self, nbytes: int) -> ctypes.c_uint64:
        place = ctypes.c_uint64()
        self._driver.call("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(max(nbytes, 1)))
        return place

    def _function(self, suffix: str) -> Any:
        return getattr(self._library, f"{self._prefix}_{suffix}")

    def _check(self, code: int) -> None:
        if code != 0:
            describe = self._function("error_text")
            describe.restype = ctypes.c_char_p
            raise EnvironmentProblem(f"{self._prefix}: {describe(code).decode()}")


def _pointers(places: Sequence[ctypes.c_uint64]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(places))(*(place.value for place in places))
