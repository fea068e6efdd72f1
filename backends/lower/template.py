"""Kernel templates as a concept: what the tile pass asks of one, and how it makes its kernel."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Protocol, TypeVar

from cnnc.ops.fused import Fused, Schedule
from cnnc.passes.tile import KernelTemplate
from cnnc.target import Target

Params = TypeVar("Params")


class Template(KernelTemplate, Protocol):
    """One algorithm of one target: `matches`, `space` and `cost` for the tile pass, `build` for code generation."""

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the scheduled PrimFunc over the kernel's inputs, then its outputs."""


def schedule_of(name: str, params: Any) -> Schedule:
    """Write a template's parameters, a dataclass of integers, as a schedule."""
    return Schedule(name, tuple((field.name, getattr(params, field.name)) for field in fields(params)))


def params_of(kind: type[Params], schedule: Schedule) -> Params:
    """Read back what `schedule_of` wrote."""
    return kind(**dict(schedule.params))
