"""Kernels that earlier compiles made."""

from __future__ import annotations

import json

from cnnc.backends.cache import DiskCache
from cnnc.backends.cpu.codegen import KernelObject


class KernelCache:
    """Compiled kernels by key; on disk, or nowhere."""

    def __init__(self, disk: DiskCache | None) -> None:
        self._disk = disk

    def get(self, key: str) -> KernelObject | None:
        """Give the kernel stored under a key, or None."""
        content = self._disk.read(key) if self._disk else None
        return None if content is None else _decode(content)

    def put(self, key: str, kernel: KernelObject) -> None:
        """Store a kernel under a key."""
        if self._disk:
            self._disk.write(key, _encode(kernel))


def _encode(kernel: KernelObject) -> bytes:
    header = {"symbol": kernel.symbol, "slices": kernel.slices, "scratch_bytes": kernel.scratch_bytes}
    return json.dumps(header, sort_keys=True).encode() + b"\n" + kernel.code


def _decode(content: bytes) -> KernelObject:
    head, _, code = content.partition(b"\n")
    header = json.loads(head)
    return KernelObject(header["symbol"], code, int(header["slices"]), int(header["scratch_bytes"]))
