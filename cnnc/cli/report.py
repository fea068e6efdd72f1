"""How results are printed: tables for people, one JSON document for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

SCHEMA = 1
"""The version of every JSON report; a field that changes its meaning raises it."""

_WIDEST = 10_000
"""Columns; where stdout is no terminal a table takes as many as it needs."""


def print_json(kind: str, content: dict[str, Any]) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps({"schema": SCHEMA, "report": kind, **content}, indent=2, sort_keys=False))


def print_table(title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout; a column is (heading, "left" or "right").

    Wide enough for every cell where stdout is no terminal, so that nothing is cut in a file.
    """
    # Imported here, as most verbs print one table, after all else, or none.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for heading, side in columns:
        table.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=Console(width=_WIDEST).measure(table).maximum)
    console.print(table)


def seconds_text(seconds: float) -> str:
    """Write a duration for people: `3.21 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-9:.0f} ns"
