"""`cnnc cache`: the kernels and schedules kept from earlier compiles."""

from __future__ import annotations

import click

from cnnc.backends.cache import DiskCache
from cnnc.options import format_bytes


@click.group("cache")
def command() -> None:
    """Show or empty the kernel cache."""


@command.command("status")
def status() -> None:
    """Show where the cache is and how much it holds."""
    state = DiskCache().status()
    click.echo(f"{state.folder}: {state.entries} entries, {format_bytes(state.bytes)}")


@command.command("clear")
def clear() -> None:
    """Remove every entry of the cache."""
    click.echo(f"removed {DiskCache().clear()} entries")
