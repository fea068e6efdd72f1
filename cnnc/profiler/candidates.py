"""Which schedules of a kernel are worth measuring.

The cost models are good, but where one is wrong it is wrong for all schedules that share a parameter.  So there are,
beside the cheapest schedules, the cheapest with each value of each parameter; and when these are measured, those that
differ from the best in one parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cnnc.backends.cpu.templates import TEMPLATES
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

FAR = 3.0
"""Schedules whose estimate is so many times the cheapest's are left out: no cost model is that wrong."""


@dataclass(frozen=True)
class Priced:
    """A schedule and the seconds that its template's cost model estimates."""

    schedule: Schedule
    seconds: float


def priced(kernel: Fused, target: Target) -> list[Priced]:
    """List the schedules of all templates that take a kernel, the cheapest first: that is the default."""
    found = [
        Priced(schedule, template.cost(kernel, schedule, target))
        for template in TEMPLATES
        if template.matches(kernel, target)
        for schedule in template.space(kernel, target)
    ]
    found.sort(key=lambda p: p.seconds)
    return [p for p in found if p.seconds <= FAR * found[0].seconds]


def first_candidates(schedules: Sequence[Priced], count: int) -> list[Schedule]:
    """Choose at most `count` schedules, the default first: half the cheapest, half the cheapest of each kind."""
    cheapest = [p.schedule for p in schedules[: (count + 1) // 2]]
    kinds: dict[tuple[str, str, int], Schedule] = {}
    for p in schedules:
        for name, value in p.schedule.params or (("", 0),):
            kinds.setdefault((p.schedule.template, name, value), p.schedule)
    place = {p.schedule: number for number, p in enumerate(schedules)}
    others = sorted(set(kinds.values()) - set(cheapest), key=place.__getitem__)
    rest = [p.schedule for p in schedules if p.schedule not in {*cheapest, *others}]
    return [*cheapest, *others, *rest][:count]


def neighbours(schedules: Sequence[Priced], best: Schedule, tried: Collection[Schedule], count: int) -> list[Schedule]:
    """Choose at most `count` schedules that differ from the best one in one parameter, the cheapest first."""
    near = (p.schedule for p in schedules if p.schedule not in tried and _distance(p.schedule, best) == 1)
    return list(near)[:count]


def _distance(a: Schedule, b: Schedule) -> int:
    """Count the parameters in which two schedules differ."""
    if a.template != b.template:
        return max(len(a.params), len(b.params)) + 1
    return sum(one != other for one, other in zip(a.params, b.params, strict=True))
