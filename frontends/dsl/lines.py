"""Which lines of the user's program made a layer."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import FrameType

_HERE = os.path.dirname(os.path.abspath(__file__))
BOUNDARY = "_write_down"
"""The function that runs a network's definition; lines outside it did not make the layers inside."""


@dataclass(frozen=True)
class Line:
    """One line of a file, and the function it stands in."""

    path: str
    number: int
    function: str

    @property
    def short(self) -> str:
        """`resnet.py:31`: the same on every machine."""
        return f"{os.path.basename(self.path)}:{self.number}"

    def __str__(self) -> str:
        path = os.path.abspath(self.path)
        here = os.getcwd() + os.sep
        shown = path.removeprefix(here) if path.startswith(here) else self.path
        return f"{shown}:{self.number}"


def user_lines(most: int = 4) -> tuple[Line, ...]:
    """List the user's lines that are running now, the innermost first; lines of the DSL itself are left out."""
    lines: list[Line] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(lines) < most:
        code = frame.f_code
        if os.path.dirname(os.path.abspath(code.co_filename)) != _HERE:
            lines.append(Line(code.co_filename, frame.f_lineno, code.co_name))
            if code.co_name == "<module>":
                break
        elif code.co_name == BOUNDARY:
            break
        frame = frame.f_back
    return tuple(lines)


def trace(lines: tuple[Line, ...] = ()) -> str:
    """Write lines under an error message: where it is, from where that was called, and what is running now."""
    text = ""
    for line in dict.fromkeys(lines + user_lines()):
        inside = "" if line.function.startswith("<") else f", in {line.function}"
        text += f"\n  {'from' if text else 'at'} {line}{inside}"
    return text
