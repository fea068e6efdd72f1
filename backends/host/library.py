"""Use a compiled model in this process: ports and kernels, and contexts to run it with, one for each thread.

This is all that a program which only runs models imports, so it imports little itself.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from cnnc.backends.host.program import ABI, ALIGNMENT, DTYPES, TABLE_SYMBOL, Port
from cnnc.backends.host.seal import check_binary
from cnnc.errors import CheckFailed, CnncError, EnvironmentProblem, LimitError, ModelError, UsageError, VerifyError

Array = npt.NDArray[Any]

_MAGIC = 0x31306C646D636E63
_DTYPE_NAMES = {number: name for name, (number, _) in DTYPES.items()}
_NUMPY: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
    "i16": np.dtype(np.int16),
    "u16": np.dtype(np.uint16),
    "u32": np.dtype(np.uint32),
    "u64": np.dtype(np.uint64),
}
_ERRORS: dict[int, type[CnncError]] = {
    2: UsageError,
    3: ModelError,
    5: LimitError,
    6: EnvironmentProblem,
    7: CheckFailed,
    70: VerifyError,
}
_load_numbers = itertools.count()


@dataclass(frozen=True)
class KernelInfo:
    """One kernel call of a compiled model; `flops` and `bytes` are for one run."""

    symbol: str
    layers: tuple[str, ...]
    slices: int
    flops: int
    bytes: int
    algorithm: str
    schedule: str


@dataclass(frozen=True)
class KernelTime:
    """Nanoseconds and calls of one kernel since profiling was switched on."""

    ns: int
    calls: int


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
        ("bytes", ctypes.c_uint64),
    )


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("symbol", ctypes.c_char_p),
        ("layers", ctypes.POINTER(ctypes.c_char_p)),
        ("layer_count", ctypes.c_int32),
        ("slices", ctypes.c_int32),
        ("flops", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("algorithm", ctypes.c_char_p),
        ("schedule", ctypes.c_char_p),
    )


class _Variant(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.POINTER(_Tensor)),
        ("outputs", ctypes.POINTER(_Tensor)),
        ("kernels", ctypes.POINTER(_Kernel)),
        ("batch", ctypes.c_int32),
        ("kernel_count", ctypes.c_int32),
        ("first_step", ctypes.c_int32),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("prefix", ctypes.c_char_p),
        ("cpu", ctypes.c_char_p),
        ("meta", ctypes.c_char_p),
        ("features", ctypes.POINTER(ctypes.c_char_p)),
        ("variants", ctypes.POINTER(_Variant)),
        ("steps", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("weight_bytes", ctypes.c_uint64),
        ("arena_bytes", ctypes.c_uint64),
        ("scratch_bytes", ctypes.c_uint64),
        ("feature_count", ctypes.c_int32),
        ("input_count", ctypes.c_int32),
        ("output_count", ctypes.c_int32),
        ("variant_count", ctypes.c_int32),
        ("step_count", ctypes.c_int32),
    )


_Create = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
_RunBatch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_Destroy = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_Profile = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_BatchKernelNs = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)
)
_Threads = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_ErrorText = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)


class Table(ctypes.Structure):
    """What `cnnc_model_v1` of a binary points to: `cnnc_rt_table` in the runtime's header."""

    _fields_ = (
        ("magic", ctypes.c_uint64),
        ("abi", ctypes.c_uint32),
        ("table_bytes", ctypes.c_uint32),
        ("model", ctypes.POINTER(_Model)),
        ("create", _Create),
        ("run_batch", _RunBatch),
        ("destroy", _Destroy),
        ("profile", _Profile),
        ("batch_kernel_ns", _BatchKernelNs),
        ("threads", _Threads),
        ("error_text", _ErrorText),
    )


def aligned_empty(shape: Sequence[int], dtype: str) -> Array:
    """Return a new array whose data is aligned to 64 bytes, so that a model writes into it without a copy."""
    kind = _NUMPY[dtype]
    size = math.prod(shape) * kind.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    return np.ndarray(tuple(shape), kind, raw, -raw.ctypes.data % ALIGNMENT)


class Context:
    """What one thread runs a model with: it owns the memory and the worker threads.

    It serves one caller at a time: a second thread that runs it at the same moment gets a UsageError.
    """

    def __init__(self, model: LoadedModel, threads: int) -> None:
        self.model = model
        self._table = model.table
        handle = ctypes.c_void_p()
        self._check(self._table.create(threads, ctypes.byref(handle)))
        self._handle: int = handle.value or 0
        # The finalizer holds the model too: its code must outlive the context.
        self._close = weakref.finalize(self, _destroy, model, self._handle)

    @property
    def threads(self) -> int:
        """The number of threads a run uses, the caller among them."""
        return int(self._table.threads(self._handle))

    def run(self, inputs: Sequence[Array], batch: int | None = None) -> list[Array]:
        """Compute the outputs; an input that is C-contiguous and aligned to 64 bytes is read in place.

        The inputs' shapes choose the batch size, unless it is given.  Raises UsageError when the number, a dtype or a
        shape differs from the ports: nothing is converted silently.
        """
        variant, arrays = self.model.accept(inputs, batch)
        outputs = [aligned_empty(port.shape, port.dtype) for port in variant.outputs]
        self._check(self._table.run_batch(self._handle, variant.batch, _pointers(arrays), _pointers(outputs)))
        return outputs

    def profile(self, on: bool) -> None:
        """Switch the clocks of the kernels on (from zero) or off."""
        self._check(self._table.profile(self._handle, int(on)))

    def kernel_times(self, variant: LoadedVariant | None = None) -> list[KernelTime]:
        """Return time and calls of each kernel since profiling was switched on.

        In the order of the kernels of a variant, by default the first.
        """
        variant = variant or self.model.variants[0]
        calls = ctypes.c_uint64()
        times = []
        for index in range(len(variant.kernels)):
            ns = int(self._table.batch_kernel_ns(self._handle, variant.batch, index, ctypes.byref(calls)))
            times.append(KernelTime(ns, calls.value))
        return times

    def close(self) -> None:
        """Free the memory and end the worker threads; a later run raises UsageError."""
        self._close()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, code: int) -> None:
        if code != 0:
            text = self._table.error_text(code).decode()
            raise _ERRORS.get(code // 100, VerifyError)(f"{self.model.name}: {text}")


def _destroy(model: LoadedModel, handle: int) -> None:
    model.table.destroy(handle)


def _pointers(arrays: Sequence[Array]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


@dataclass(frozen=True)
class LoadedVariant:
    """A compiled model for one batch size, which is 0 where none was asked for."""

    batch: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    kernels: tuple[KernelInfo, ...]


class LoadedModel:
    """A compiled model in memory; `create` makes contexts, from any thread and as many as wanted.

    `inputs`, `outputs` and `kernels` are those of the first of the variants.
    """

    def __init__(self, table: Table) -> None:
        if table.magic != _MAGIC or table.abi != ABI or table.table_bytes < ctypes.sizeof(Table):
            raise CheckFailed(f"made by another version of cnnc (interface {table.abi}, this is {ABI}); build it again")
        self.table = table
        model = table.model.contents
        self.name = _text(model.name)
        self.prefix = _text(model.prefix)
        self.cpu = _text(model.cpu)
        self.meta = _text(model.meta)
        self.features = tuple(_text(model.features[i]) for i in range(model.feature_count))
        self.variants = tuple(_variant(model, model.variants[i]) for i in range(model.variant_count))
        first = self.variants[0]
        self.inputs, self.outputs, self.kernels = first.inputs, first.outputs, first.kernels
        self._by_shapes = {tuple(port.shape for port in v.inputs): v for v in self.variants}
        self.weight_bytes = int(model.weight_bytes)
        self.arena_bytes = int(model.arena_bytes)
        self.scratch_bytes = int(model.scratch_bytes)

    def create(self, threads: int = 1) -> Context:
        """Return a new context with this many threads; 0 takes as many as the process may use.

        Raises CheckFailed when this CPU lacks a feature the kernels need.
        """
        return Context(self, threads)

    def accept(self, inputs: Sequence[Array], batch: int | None = None) -> tuple[LoadedVariant, list[Array]]:
        """Give the variant whose shapes the inputs have, or that for a batch size, and the inputs contiguous.

        Raises UsageError if the inputs do not fit.
        """
        arrays = [np.asarray(given) for given in inputs]
        if len(arrays) != len(self.inputs):
            raise UsageError(f"{self.name}: takes {len(self.inputs)} inputs, got {len(arrays)}")
        if batch is None:
            variant = self._by_shapes.get(tuple(array.shape for array in arrays)) or self._nearest(arrays)
        else:
            variant = next(v for v in self.variants if v.batch == batch)
        for port, array in zip(variant.inputs, arrays, strict=True):
            if array.dtype != _NUMPY[port.dtype] or array.shape != port.shape:
                raise UsageError(
                    f"{self.name}: input {port.name!r} is {port.dtype}{list(port.shape)}, "
                    f"got {array.dtype}{list(array.shape)}"
                )
        # ascontiguousarray would make a scalar a vector.
        return variant, [array if array.flags.c_contiguous else array.copy(order="C") for array in arrays]

    def _nearest(self, arrays: Sequence[Array]) -> LoadedVariant:
        """Give the variant to tell what is wrong with inputs that fit none; raises UsageError if the batch size is."""
        first = self.variants[0]
        ranks = zip(arrays, first.inputs, strict=True)
        if len(self.variants) == 1 or any(array.ndim != len(port.shape) for array, port in ranks):
            return first
        leading = [[port.shape[:1] for port in variant.inputs] for variant in self.variants]
        batched = [i for i in range(len(arrays)) if any(sizes[i] != leading[0][i] for sizes in leading)]
        for variant, sizes in zip(self.variants, leading, strict=True):
            if all(arrays[i].shape[:1] == sizes[i] for i in batched):
                return variant
        asked = sorted({arrays[i].shape[0] for i in batched})
        raise UsageError(f"{self.name}: {batch_refusal(asked, [v.batch for v in self.variants])}")


def batch_refusal(asked: Sequence[int], compiled: Sequence[int]) -> str:
    """Say that a binary has no such batch size, which it has, and the cure."""
    there = ", ".join(map(str, compiled))
    if len(asked) > 1:
        return f"the inputs are of the batch sizes {', '.join(map(str, asked))}; give all the same, one of {there}"
    more = ",".join(map(str, sorted({*asked, *compiled})))
    return f"not compiled for batch size {asked[0]}, only for {there}; compile the model with --batch {more}"


class SharedModel(LoadedModel):
    """A model in a shared library that cnnc built; it stays loaded as long as this object or a context of it lives.

    With `check` the whole file is compared with its digest before any of its code runs (CheckFailed).
    """

    def __init__(self, path: str | os.PathLike[str], check: bool = True) -> None:
        self.path = os.path.abspath(path)
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise EnvironmentProblem(f"cannot open {self.path}: {error.strerror}") from error
        try:
            if check:
                check_binary(descriptor)
            handle = _open_library(descriptor, self.path)
        except CheckFailed as failed:
            raise CheckFailed(f"{self.path}: {failed}") from failed
        finally:
            os.close(descriptor)
        self._unload = weakref.finalize(self, _dlclose, handle)
        library = ctypes.CDLL(None, handle=handle)
        try:
            table = ctypes.POINTER(Table).in_dll(library, TABLE_SYMBOL).contents
        except ValueError as error:
            raise CheckFailed(f"{self.path}: no shared library of cnnc: it has no {TABLE_SYMBOL}") from error
        super().__init__(table)


def _open_library(descriptor: int, path: str) -> int:
    """Load the very file that was checked, even if another takes its place under the same path.

    glibc remembers libraries by the path they were asked for, so each load spells the path in a way of its own.
    """
    flags = os.RTLD_NOW | os.RTLD_LOCAL
    detour = "".join(".//" if bit == "1" else "./" for bit in f"{next(_load_numbers):b}")
    spelling = f"/proc/self/fd/{detour}{descriptor}"
    try:
        return ctypes.CDLL(spelling if os.path.exists(spelling) else path, mode=flags)._handle
    except OSError as error:
        raise CheckFailed(f"cannot be loaded: {error}") from error


def _dlclose(handle: int) -> None:
    import _ctypes

    _ctypes.dlclose(handle)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _port(tensor: _Tensor) -> Port:
    shape = tuple(int(tensor.dims[axis]) for axis in range(tensor.rank))
    return Port(_text(tensor.name), _DTYPE_NAMES[tensor.dtype], shape)


def _variant(model: _Model, variant: _Variant) -> LoadedVariant:
    return LoadedVariant(
        batch=int(variant.batch),
        inputs=tuple(_port(variant.inputs[i]) for i in range(model.input_count)),
        outputs=tuple(_port(variant.outputs[i]) for i in range(model.output_count)),
        kernels=tuple(_kernel(variant.kernels[i]) for i in range(variant.kernel_count)),
    )


def _kernel(kernel: _Kernel) -> KernelInfo:
    return KernelInfo(
        symbol=_text(kernel.symbol),
        layers=tuple(_text(kernel.layers[i]) for i in range(kernel.layer_count)),
        slices=int(kernel.slices),
        flops=int(kernel.flops),
        bytes=int(kernel.bytes),
        algorithm=_text(kernel.algorithm),
        schedule=_text(kernel.schedule),
    )
