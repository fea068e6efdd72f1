"""Products of int8 digits on matrix tiles: sums of three orders for up to two tiles of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cnnc.backends.cpu import amx
from cnnc.backends.cpu.digit_sizes import DIGITS, PRODUCTS
from cnnc.backends.lower import loops

__all__ = ["digit_products"]

A, B = 6, 7
"""The registers of a tile of input and one of weights, beside the sums."""

Place = tuple[Any, ...]


def digit_products(
    steps: int,
    tiles: int,
    rows: tuple[Any, Callable[[Any, int, int], Place]],
    weights: tuple[Any, Callable[[Any, int], Place]],
    sums: Any,
    before: Callable[[Any], Any],
) -> Any:
    """Write the sums over all steps of channels for some tiles of rows, `before` going first in each step.

    `rows` is a buffer and where a tile of it begins, for a step, a digit and the number of the tile; `weights` the same
    for a step and a digit.  The sums are stored as sums[tile, order, row, output].
    """

    def step(number: Any) -> Any:
        statements = [before(number)]
        of_weight = None
        for of_x, of_w in PRODUCTS:
            if of_w != of_weight:
                statements.append(amx.load(B, weights[0], *weights[1](number, of_w)))
                of_weight = of_w
            for tile in range(tiles):
                statements.append(amx.load(A, rows[0], *rows[1](number, of_x, tile)))
                statements.append(amx.multiply_add_int8(tile * DIGITS + of_x + of_w, A, B))
        return loops.sequence(*statements)

    registers = range(tiles * DIGITS)
    return loops.sequence(
        *(amx.zero(register) for register in registers),
        loops.loop(steps, step, "step"),
        *(amx.store(r, sums, r // DIGITS, r % DIGITS, 0, 0) for r in registers),
    )
