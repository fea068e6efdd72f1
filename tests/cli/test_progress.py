"""Progress: bars on a terminal, nothing elsewhere."""

from __future__ import annotations

import io

import pytest

from cnnc.cli.progress import Phases, Search


class _Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stream = _Stream(terminal)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with Phases() as phases, Search(60) as search:
        phases("kernels", 1, 3)
        search("conv1", 2, 5)
    said = stream.getvalue()
    assert ("kernels" in said and "1/3" in said) == terminal
    assert bool(said) == terminal
