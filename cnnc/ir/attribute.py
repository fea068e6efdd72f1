"""Attribute classes: values in operators' fields that the text form prints as `Class<text>`."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar


class Attribute(Protocol):
    """A value that `str` prints and `parse` reads back."""

    @staticmethod
    def parse(text: str) -> Any:
        """Read what `str` printed."""


ATTRIBUTES: dict[str, type[Attribute]] = {}
"""Attribute classes by name, filled as they are defined."""

A = TypeVar("A", bound=type[Attribute])


def attribute(cls: A) -> A:
    """Let instances of a class stand in an operator's fields."""
    ATTRIBUTES[cls.__name__] = cls
    return cls
