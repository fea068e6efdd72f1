"""What a compile returns and what loading a binary returns: a network that can be run, timed and saved."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cnnc.errors import UsageError

if TYPE_CHECKING:
    from cnnc.backends.host.library import Context, KernelInfo, LoadedModel, LoadedVariant
    from cnnc.backends.host.program import Port, Variant
    from cnnc.backends.lower.build import Build

V = TypeVar("V", bound="Variant | LoadedVariant")


@dataclass(frozen=True)
class KernelTiming:
    """Mean time of one kernel call in the network; `layers` are the user's own names."""

    index: int
    symbol: str
    layers: tuple[str, ...]
    algorithm: str
    schedule: str
    flops: int
    bytes: int
    nanoseconds: float


def load(path: str | os.PathLike[str], *, threads: int = 1) -> Module:
    """Load a binary made by `Module.save`; raises `CheckFailed` for a damaged file or a CPU that lacks a feature."""
    from cnnc.backends.host.library import SharedModel

    model = SharedModel(path)
    return Module(lambda: model, threads=threads)


class Module:
    """A compiled network.

    `m.run({"x": x})["y"]` runs by name, `m(x)` in order.  A module may be used by several threads at once:
    each gets a context of its own.  numpy arrays go in without a copy where they are 64-byte aligned.

    One compiled for several batch sizes runs the one its inputs have; `inputs`, `outputs` and `kernels` are for the
    first of them.
    """

    def __init__(
        self, load: Callable[[], LoadedModel], *, threads: int = 1, build: Build | None = None, batch: int | None = None
    ) -> None:
        self._load = cache(load)
        self._build = build
        self._batch = batch
        self._contexts = threading.local()
        self.threads = threads

    @property
    def _model(self) -> LoadedModel:
        """The code in memory; loaded when first needed, which a compile that only writes a file never does."""
        return self._load()

    @property
    def _variants(self) -> Sequence[Variant | LoadedVariant]:
        return (self._build.program if self._build else self._model).variants

    @property
    def _variant(self) -> Variant | LoadedVariant:
        """What `inputs` and `outputs` are of."""
        return _pick(self._variants, self._batch)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes it runs, in the order asked for; empty where none was asked for."""
        sizes = (self._variant.batch,) if self._batch is not None else (v.batch for v in self._variants)
        return tuple(size for size in sizes if size)

    @property
    def inputs(self) -> Sequence[Port]:
        """The inputs: name, dtype, shape."""
        return self._variant.inputs

    @property
    def outputs(self) -> Sequence[Port]:
        """The outputs: name, dtype, shape."""
        return self._variant.outputs

    @property
    def meta(self) -> dict[str, Any]:
        """What the binary says of itself: versions, target, options, hash of the model."""
        found: dict[str, Any] = json.loads((self._build.program if self._build else self._model).meta or "{}")
        return found

    @property
    def target(self) -> str:
        """What it was compiled for, as it was named: `cpu`, `cpu:x86-64-v3`, `cuda:sm_90`; empty if it does not say."""
        return str(self.meta.get("options", {}).get("target", ""))

    @property
    def kernels(self) -> Sequence[KernelInfo]:
        """The kernel calls, in order."""
        return _pick(self._model.variants, self._batch).kernels

    @property
    def build(self) -> Build | None:
        """The program and the objects it was made of; None for a loaded binary."""
        return self._build

    def __repr__(self) -> str:
        ports = ", ".join(f"{p.name}: {p.dtype}{list(p.shape)}" for p in (*self.inputs, *self.outputs))
        others = "".join(f", {size}" for size in self.batches[1:])
        return f"<compiled network: {ports}" + (f"; batch sizes {self.batches[0]}{others}>" if others else ">")

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

    def batch_of(self, feeds: Mapping[str, np.ndarray]) -> int:
        """Give the batch size that inputs by name are of; 0 where none was asked for at compile time."""
        variant, _ = self._model.accept([feeds[port.name] for port in self.inputs], self._batch)
        return variant.batch

    def with_threads(self, threads: int) -> Module:
        """Give the same network run by another number of threads (weights are shared)."""
        return Module(self._load, threads=threads, build=self._build, batch=self._batch)

    def with_batch(self, batch: int) -> Module:
        """Give the same network held to one of its batch sizes (weights are shared).

        Raises `UsageError` for a batch size it was not compiled for.
        """
        from cnnc.backends.host.library import batch_refusal

        for variant in self._variants:
            # Where none was asked for, the shapes say what it is for.
            fits = bool(variant.inputs) and all(port.shape[:1] == (batch,) for port in variant.inputs)
            if variant.batch == batch or (variant.batch == 0 and fits):
                return Module(self._load, threads=self.threads, build=self._build, batch=variant.batch)
        name = (self._build.program if self._build else self._model).name
        if not self.batches:
            raise UsageError(f"{name}: compiled for the shapes {self!r} alone; compile it with --batch {batch}")
        raise UsageError(f"{name}: {batch_refusal([batch], self.batches)}")

    def profile(self, feeds: Mapping[str, np.ndarray], repeats: int = 20) -> list[KernelTiming]:
        """Run `repeats` times with the kernels' clocks on and give the mean time of each kernel call."""
        arrays = [feeds[port.name] for port in self.inputs]
        context = self._context()
        variant, arrays = self._model.accept(arrays, self._batch)
        context.run(arrays)
        context.profile(True)
        try:
            for _ in range(repeats):
                context.run(arrays)
            times = context.kernel_times(variant)
        finally:
            context.profile(False)
        return [
            KernelTiming(
                index, k.symbol, k.layers, k.algorithm, k.schedule, k.flops, k.bytes, time.ns / max(time.calls, 1)
            )
            for index, (k, time) in enumerate(zip(variant.kernels, times, strict=True))
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
        return self._context().run(arrays, self._batch)

    def _context(self) -> Context:
        """Give this thread's context, made when first needed."""
        context: Context | None = getattr(self._contexts, "context", None)
        if context is None:
            context = self._model.create(self.threads)
            self._contexts.context = context
        return context


def _pick(variants: Sequence[V], batch: int | None) -> V:
    """Give the variant for a batch size, the first for None."""
    return variants[0] if batch is None else next(v for v in variants if v.batch == batch)
