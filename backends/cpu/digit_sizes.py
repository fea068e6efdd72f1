"""How many int8 digits a number has, which of their products count, and how many of them tiles take at a time."""

from __future__ import annotations

from cnnc.ops.digit_conv import DIGITS

__all__ = ["DIGITS", "IN_A_STEP", "PRODUCTS", "TILES"]

PRODUCTS: tuple[tuple[int, int], ...] = ((0, 2), (0, 1), (1, 1), (0, 0), (1, 0), (2, 0))
"""Which digit of the one is multiplied by which of the other, the highest being 0; their sum is what they add to.

Those with the same digit of the other follow each other.
"""

IN_A_STEP = 4
"""Blocks of input channels that a product of tiles adds up."""

TILES = 2
"""Tiles of rows whose sums are in registers: three each."""
