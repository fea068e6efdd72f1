"""Names of layers: `with scope("layer1", 0)` puts `layer1.0.` before the names given inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from cnnc.errors import UsageError

_path: ContextVar[tuple[str, ...]] = ContextVar("scope", default=())


@contextmanager
def scope(*parts: str | int) -> Iterator[None]:
    """Put these parts, joined by dots, before the names of all layers made inside.

    Scopes nest.  A layer gets its scope where it is made, not where it is applied; ready-made layers such as
    `relu` get it where they are applied.  Raises `UsageError` for an empty part.
    """
    if not parts or "" in parts:
        raise UsageError(f"scope{parts}: every part of a name needs at least one letter")
    token = _path.set(current_scope() + tuple(str(part) for part in parts))
    try:
        yield
    finally:
        _path.reset(token)


def current_scope() -> tuple[str, ...]:
    """Give the parts of the scopes that are open."""
    return _path.get()
