"""Passes as a concept: the class every pass derives from, the registry by name, the text form of a list of passes."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cnnc.errors import ModelError, UsageError
from cnnc.ir.graph import Graph
from cnnc.ir.op import snake_case
from cnnc.ir.parse import parse_attributes
from cnnc.ir.text import format_attribute, same_attribute
from cnnc.target import Target

PASSES: dict[str, type[Pass]] = {}
"""Every pass class by its name; filled as the classes are defined."""

_ITEM = re.compile(r"\s*(\w+)\s*(\{[^{}]*\})?\s*(,|$)")


@dataclass(frozen=True)
class Pass:
    """A transformation of graphs: valid in, valid out, and a second run changes nothing.

    A subclass is a pass, its fields are the options; a field with metadata `option=False` is handed in by the
    driver and has no text form.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        PASSES[snake_case(cls.__name__)] = cls

    @property
    def name(self) -> str:
        """The printed name: the class name in snake case."""
        return snake_case(type(self).__name__)

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the transformed graph."""
        raise TypeError(f"{self.name} defines no run")

    def run_together(self, graphs: Sequence[Graph], target: Target) -> tuple[Graph, ...]:
        """Give the transformed graphs of one network for several batch sizes.

        A pass that changes how weights lie in memory decides it once for all of them, so that they need one set.
        """
        return tuple(self.run(graph, target) for graph in graphs)

    def __str__(self) -> str:
        options = [
            f"{spec.name}={format_attribute(getattr(self, spec.name))}"
            for spec in option_fields(type(self))
            if not same_attribute(getattr(self, spec.name), spec.default)
        ]
        return self.name + ("{" + ",".join(options) + "}" if options else "")


def option_fields(cls: type[Pass]) -> list[dataclasses.Field[Any]]:
    """List the fields a user may set."""
    return [spec for spec in dataclasses.fields(cls) if spec.metadata.get("option", True)]


def parse_passes(text: str, handed_in: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Pass, ...]:
    """Read `fold_batch_norm,assign_layouts{block=16},fuse`.

    `handed_in` gives, by pass, the fields that have no text form.  Raises `UsageError` for an unknown pass or option.
    """
    import cnnc.passes.pipeline  # noqa: F401  (fills the registry)

    passes = []
    position = 0
    while position < len(text):
        match = _ITEM.match(text, position)
        if match is None:
            raise UsageError(
                f"pass list cannot be read from {text[position:]!r} on; write name or name{{option=value}}"
            )
        name, options, _ = match.groups()
        passes.append(_make(name, options, (handed_in or {}).get(name, {})))
        position = match.end()
    return tuple(passes)


def print_passes(passes: Iterable[Pass]) -> str:
    """Write a list of passes as `parse_passes` reads it."""
    return ",".join(map(str, passes))


def _make(name: str, options: str | None, handed_in: Mapping[str, Any]) -> Pass:
    if name not in PASSES:
        near = difflib.get_close_matches(name, PASSES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no pass {name!r}{hint} (there are {', '.join(sorted(PASSES))})")
    cls = PASSES[name]
    defaults = {spec.name: spec.default for spec in option_fields(cls)}
    try:
        given = parse_attributes(options) if options else {}
    except ModelError as error:
        raise UsageError(f"options of pass {name}: {error}") from None
    for key, value in given.items():
        if key not in defaults:
            raise UsageError(f"pass {name} has no option {key!r} (it has {', '.join(defaults) or 'none'})")
        if type(value) is not type(defaults[key]) and defaults[key] is not None:
            wanted = type(defaults[key]).__name__
            raise UsageError(f"pass {name}: {key}={value} is no {wanted}")
    return cls(**given, **handed_in)
