"""Square blocks of numbers transposed in vector registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["transpose_block"]


def transpose_block(lanes: int, load: Callable[[int], Any], store: Callable[[int, Any], Any]) -> Any:
    """Write the code that transposes a block: `load(row)` gives a vector, `store(column, vector)` a statement.

    In step s, 1, 2, 4, ..., rows i and i + s exchange the lanes in which they differ from the result by s.
    """
    from tvm import tirx

    from cnnc.backends.lower import loops

    block = loops.buffer("block", (lanes, lanes), scope="local")

    def row(number: int) -> Any:
        return loops.load(block, number, 0, lanes=lanes)

    def put(number: int, vector: Any) -> Any:
        return loops.store(block, vector, number, 0, lanes=lanes)

    statements = [loops.alloc(block), *(put(number, load(number)) for number in range(lanes))]
    step = 1
    while step < lanes:
        for number in range(lanes):
            if number & step:
                continue
            kept = loops.buffer("kept", (lanes,), scope="local")
            low = [lane if not lane & step else lanes + (lane ^ step) for lane in range(lanes)]
            high = [lane | step if not lane & step else lanes + lane for lane in range(lanes)]
            pair = [loops.load(kept, 0, lanes=lanes), row(number | step)]
            statements += [
                loops.alloc(kept),
                loops.store(kept, row(number), 0, lanes=lanes),
                put(number, tirx.Shuffle(pair, [loops.const(lane) for lane in low])),
                put(number | step, tirx.Shuffle(pair, [loops.const(lane) for lane in high])),
            ]
        step *= 2
    return loops.sequence(*statements, *(store(number, row(number)) for number in range(lanes)))
