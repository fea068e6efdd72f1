"""The weights of a program in one block of memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from cnnc.backends.host.program import ALIGNMENT
from cnnc.ops.source import Constant


class WeightBlock:
    """The constants of a program in one block of memory, equal ones once, each aligned for vector loads."""

    def __init__(self) -> None:
        self._offsets: dict[Constant, int] = {}
        self._size = 0

    def place(self, constant: Constant) -> int:
        """Give the offset of a constant in bytes."""
        key = replace(constant, label="")
        if key not in self._offsets:
            self._offsets[key] = self._size
            self._size += -(-_nbytes(constant) // ALIGNMENT) * ALIGNMENT
        return self._offsets[key]

    def pieces(self) -> tuple[memoryview, ...]:
        """Give the block in pieces, every constant packed in its layout."""
        # Packing is copying in numpy, which gives up the interpreter lock.
        with ThreadPoolExecutor(os.cpu_count(), "pack") as pool:
            return tuple(piece for pieces in pool.map(_packed, self._offsets) for piece in pieces)


def _nbytes(constant: Constant) -> int:
    """Give the bytes a constant takes in its layout."""
    return constant.infer().with_layout(constant.layout).nbytes


def _packed(constant: Constant) -> tuple[memoryview, ...]:
    """Give a constant as it lies in memory, filled up to the alignment."""
    array = constant.value.array
    packed = array if constant.layout is None else constant.layout.pack(array)
    data = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
    return data.data, memoryview(bytes(-data.size % ALIGNMENT))
