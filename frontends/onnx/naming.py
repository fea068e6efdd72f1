"""How the model's own names appear in messages: escaped, cut, and with the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

_SHOWN = 80
_CANDIDATES = 2_000


def shown(name: str) -> str:
    """Quote a name for a one-line message: control characters escaped, the middle of a long one left out."""
    text = repr(name)
    if len(text) <= _SHOWN:
        return text
    return f"{text[:60]}...{text[-12:]} ({len(name)} characters)"


def nearest(name: str, known: Collection[str]) -> str:
    """Give `; did you mean 'x'?` for the most similar known name, or nothing."""
    if not 0 < len(known) <= _CANDIDATES or len(name) > _SHOWN:
        return ""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {shown(matches[0])}?" if matches else ""


def listed(names: Iterable[str], most: int = 12) -> str:
    """Write names as a list for a message, the tail of a long one counted only."""
    names = list(names)
    text = ", ".join(shown(name) for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def node_title(op_type: str, name: str, position: int) -> str:
    """Name a node in a message: `Conv 'conv1'`, or its position where it has no name."""
    return f"{shown(op_type)[1:-1]} {shown(name)}" if name else f"{shown(op_type)[1:-1]} (node {position})"
