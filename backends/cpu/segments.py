"""Cutting a row of output pixels into register tiles, so that padding costs neither copies nor wasted arithmetic.

Tiles at the borders of the input skip, for each kernel column, the pixels that would read padding; tiles that
skip nothing, or the same, share one piece of code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

__all__ = ["Run", "Segment", "even_split", "row_segments", "tap_range"]


@dataclass(frozen=True)
class Run:
    """Kernel columns [first, last) read input for just the pixels [begin, end) of a tile."""

    first: int
    last: int
    begin: int
    end: int


@dataclass(frozen=True)
class Segment:
    """`count` neighbouring tiles of `pixels` output pixels, the first at `start`, all with the same runs."""

    start: int
    pixels: int
    count: int
    runs: tuple[Run, ...]


def even_split(size: int, most: int) -> list[tuple[int, int]]:
    """Split `size` into the fewest parts of at most `most`, nearly equal: [(part, how many)], larger ones first."""
    parts = -(-size // most)
    small, larger = divmod(size, parts)
    return [(part, count) for part, count in ((small + 1, larger), (small, parts - larger)) if count]


def tap_range(position: int, size: int, kernel: int, dilation: int) -> tuple[int, int]:
    """Give the taps [first, last) that fall inside an input axis of `size`, for tap 0 at `position`."""
    first = max(0, -(position // dilation))
    last = min(kernel, -((position - size) // dilation))
    return first, max(first, last)


def row_segments(
    size: int, out: int, kernel: int, stride: int, pad: int, dilation: int, tile: int
) -> tuple[Segment, ...]:
    """Cut `out` output pixels, read from `size` input pixels with `pad` before them, into tiles of at most `tile`."""
    no_padding = pad == 0 and (out - 1) * stride + (kernel - 1) * dilation < size
    widths = _even_widths(out, tile) if no_padding else _widths(out, tile)
    tiles = []
    start = 0
    for width in widths:
        tiles.append((start, width, tuple(_runs(start, width, size, kernel, stride, pad, dilation))))
        start += width
    segments = []
    for (width, runs), members in groupby(tiles, key=lambda t: t[1:]):
        same = list(members)
        segments.append(Segment(same[0][0], width, len(same), runs))
    return tuple(segments)


def _widths(out: int, tile: int) -> list[int]:
    """Choose tile widths: equal ones inside, the remainder shared by the two at the borders, which differ anyway."""
    count = -(-out // tile)
    if count == 1:
        return [out]
    inner = -(-out // count)
    border = out - (count - 2) * inner
    if border < 2:
        return _even_widths(out, tile)
    return [border - border // 2, *[inner] * (count - 2), border // 2]


def _even_widths(out: int, tile: int) -> list[int]:
    return [width for width, repeat in even_split(out, tile) for _ in range(repeat)]


def _runs(start: int, width: int, size: int, kernel: int, stride: int, pad: int, dilation: int) -> Iterator[Run]:
    """Give the runs of a tile in order of the kernel columns; columns that read nothing but padding have none."""
    spans = []
    for tap in range(kernel):
        inside = [p for p in range(width) if 0 <= (start + p) * stride - pad + tap * dilation < size]
        spans.append((inside[0], inside[-1] + 1) if inside else None)
    for span, taps in groupby(range(kernel), key=lambda tap: spans[tap]):
        if span is not None:
            members = list(taps)
            yield Run(members[0], members[-1] + 1, *span)
