"""Reads at quotients and remainders find their element, whichever way the index is shifted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu.codegen import compile_kernel
from cnnc.backends.load_tvm import load_tvm
from cnnc.target import Target
from tests.backends.running import aligned, link, poisoned, run

TARGET = Target.parse("cpu")
ROWS, COLUMNS, COUNT = 5, 8, 80

READS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "up": lambda i: (i % 40 // 8, i % 8),
    "up from 11": lambda i: ((i + 11) % 40 // 8, (i + 3) % 8),
    "down": lambda i: ((79 - i) % 40 // 8, (79 - i) % 8),
    "down, reduced": lambda i: ((39 - i) % 40 // 8, (7 - i) % 8),
    "down by threes": lambda i: ((300 - i * 3) % 40 // 8, (300 - i * 3) % 8),
    "axes shifted apart": lambda i: ((i // 8 + 1) % 5, (i + 1) % 8),
    "axes shifted against each other": lambda i: (i % 40 // 8, (7 - i) % 8),
}


@pytest.mark.parametrize("name", READS)
def test_quotient_and_remainder(name: str, tmp_path: Path) -> None:
    load_tvm()
    from cnnc.backends.lower import loops

    x, y = loops.buffer("x", (ROWS, COLUMNS)), loops.buffer("y", (COUNT,))
    body = loops.parallel(COUNT, lambda i: loops.store(y, loops.load(x, *READS[name](i)), i))
    kernel = compile_kernel(loops.function([x, y], body), "kernel", TARGET)
    numbers = np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)
    output = poisoned((COUNT,), np.float32)
    run(link([kernel], tmp_path), kernel, [aligned(numbers), output])
    np.testing.assert_array_equal(output, numbers[READS[name](np.arange(COUNT))])
