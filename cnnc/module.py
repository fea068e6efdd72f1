"""What a compile returns and what loading a binary returns: a network that can be run, timed and saved."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cnnc.errors import UsageError
from cnnc.ir.types import DType, format_shape

if TYPE_CHECKING:
    from cnnc.backends.cpu.build import Build
    from cnnc.backends.host.program import Port


class Context(Protocol):
    """One thread's way into a loaded model: its own arena and thread pool."""

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run once."""

    def profile(self, on: bool) -> None:
        """Switch the kernels' clocks."""

    def kernel_times(self) -> Sequence[tuple[int, int]]:
        """Give (nanoseconds, calls) of each kernel since the clocks were switched on."""

    def close(self) -> None:
        """Give the arena and the threads back."""


class Model(Protocol):
    """A loaded model, from a shared library or in process."""

    inputs: Sequence[Port]
    outputs: Sequence[Port]
    meta: str

    def create(self, threads: int) -> Context:
        """Make a context."""

    @property
    def kernels(self) -> Sequence[Any]:
        """Describe each kernel call."""


@dataclass(frozen=True)
class KernelTime:
    """Measured time of one kernel call in the network; `layers` are the user's own names."""

    index: int
    symbol: str
    layers: tuple[str, ...]
    algorithm: str
    schedule: str
    flops: int
    bytes: int
    nanoseconds: float


class Module:
    """A compiled network.

    `m.run({"x": x})["y"]` runs by name, `m(x)` in order.  A module may be used by several threads at once:
    each gets a context of its own.  numpy arrays go in without a copy where they are 64-byte aligned.
    """

    def __init__(self, model: Model, *, threads: int = 1, build: Build | None = None, path: Path | None = None) -> None:
        self._model = model
        self._build = build
        self._path = path
        self._contexts = threading.local()
        self.threads = threads

    @property
    def inputs(self) -> Sequence[Port]:
        """The inputs: name, dtype, shape."""
        return self._model.inputs

    @property
    def outputs(self) -> Sequence[Port]:
        """The outputs: name, dtype, shape."""
        return self._model.outputs

    @property
    def meta(self) -> dict[str, Any]:
        """What the binary says of itself: versions, target, options, hash of the model."""
        found: dict[str, Any] = json.loads(self._model.meta or "{}")
        return found

    @property
    def kernels(self) -> Sequence[Any]:
        """The kernel calls, in order."""
        return self._model.kernels

    @property
    def build(self) -> Build | None:
        """The program and the objects it was made of; None for a loaded binary."""
        return self._build

    def __call__(self, *arrays: np.ndarray) -> Any:
        """Run on inputs in order; gives the output, or a tuple of outputs."""
        results = self._run(arrays)
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on inputs by name and give the outputs by name.

        Raises `UsageError` for missing or unknown names and for arrays of another shape or dtype.
        """
        names = [port.name for port in self.inputs]
        missing = [name for name in names if name not in feeds]
        unknown = [name for name in feeds if name not in names]
        if missing or unknown:
            raise UsageError(f"the network takes inputs {names}; missing {missing}, unknown {unknown}")
        results = self._run([feeds[name] for name in names])
        return {port.name: array for port, array in zip(self.outputs, results, strict=True)}

    def with_threads(self, threads: int) -> Module:
        """Give the same network run by another number of threads (weights are shared)."""
        return Module(self._model, threads=threads, build=self._build, path=self._path)

    def profile(self, feeds: Mapping[str, np.ndarray], repeats: int = 20) -> list[KernelTime]:
        """Run `repeats` times with the kernels' clocks on and give the mean time of each kernel call."""
        arrays = self._checked([feeds[port.name] for port in self.inputs])
        context = self._context()
        context.run(arrays)
        context.profile(True)
        try:
            for _ in range(repeats):
                context.run(arrays)
            times = context.kernel_times()
        finally:
            context.profile(False)
        return [
            KernelTime(
                index, k.symbol, tuple(k.layers), k.algorithm, k.schedule, k.flops, k.bytes, time / max(calls, 1)
            )
            for index, (k, (time, calls)) in enumerate(zip(self.kernels, times, strict=True))
        ]

    def save(self, path: str | os.PathLike[str], *, emit: Sequence[str] = ("so", "header")) -> list[Path]:
        """Write the binary, `name.so` and `name.h` beside it; gives the files written.

        `emit` picks among so, header, exe, obj, ir.  Files are replaced whole or not at all.
        """
        from cnnc.artifact import write

        if self._build is None:
            raise UsageError("a loaded binary cannot be saved again; copy its file")
        return write(self._build, Path(path), emit)

    def _run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self._context().run(self._checked(arrays))

    def _checked(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        if len(arrays) != len(self.inputs):
            raise UsageError(f"the network takes {len(self.inputs)} inputs, {len(arrays)} are given")
        checked = []
        for port, array in zip(self.inputs, arrays, strict=True):
            array = np.asarray(array)
            dtype = DType(port.dtype)
            if array.shape != tuple(port.shape) or array.dtype != dtype.numpy:
                wanted = f"{dtype}{format_shape(port.shape)}"
                raise UsageError(f"input {port.name} is {wanted}, the array given is {array.dtype}{list(array.shape)}")
            checked.append(np.ascontiguousarray(array).reshape(array.shape))
        return checked

    def _context(self) -> Context:
        """Give this thread's context, made when first needed."""
        context: Context | None = getattr(self._contexts, "context", None)
        if context is None:
            context = self._model.create(self.threads)
            self._contexts.context = context
        return context
