"""Operators of cnnc's own in TVM."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cnnc.backends.lower.operators import register_operator


def test_threads_may_register_the_same_operator_at_once() -> None:
    def first_argument(call: Any) -> Any:
        return call.args[0]

    def register(_: int) -> None:
        for number in range(20):
            register_operator(f"cnnc.test_{number}", 1, first_argument)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(register, range(8)))
