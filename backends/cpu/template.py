"""Kernel templates as a concept: what the tile pass asks of one, and how it makes its kernel."""

from __future__ import annotations

from typing import Any, Protocol

from cnnc.ops.fused import Fused, Schedule
from cnnc.passes.tile import KernelTemplate
from cnnc.target import Target


class Template(KernelTemplate, Protocol):
    """One algorithm of the CPU: `matches`, `space` and `cost` for the tile pass, `build` for code generation."""

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the scheduled PrimFunc over the kernel's inputs, then its outputs."""
