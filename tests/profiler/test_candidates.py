"""Which schedules are measured: the cheapest, each value of each parameter, the neighbours of the best."""

from __future__ import annotations

from itertools import product

from cnnc.ops.fused import Schedule
from cnnc.profiler.candidates import Priced, first_candidates, neighbours


def schedule(a: int, b: int, template: str = "t") -> Schedule:
    return Schedule(template, (("a", a), ("b", b)))


GRID = [Priced(schedule(a, b), 1.0 + 0.1 * a + 0.01 * b) for a, b in product(range(5), range(5))]


def test_the_default_comes_first_and_none_twice():
    for count in range(1, 30):
        found = first_candidates(GRID, count)
        assert found[0] == GRID[0].schedule
        assert len(set(found)) == len(found) == min(count, len(GRID))


def test_every_value_of_every_parameter_is_among_the_first():
    found = first_candidates(GRID, 14)
    assert {s["a"] for s in found} == set(range(5))
    assert {s["b"] for s in found} == set(range(5))
    assert [p.schedule for p in GRID[:7]] == found[:7]


def test_every_template_is_among_the_first():
    dear = Priced(Schedule("without_parameters"), 2.9)
    assert dear.schedule in first_candidates([*GRID, dear], 12)


def test_neighbours_differ_in_one_parameter_and_are_new():
    best, tried = schedule(2, 2), {schedule(2, 2), schedule(2, 0)}
    found = neighbours([*GRID, Priced(schedule(2, 3, "u"), 0.1)], best, tried, 4)
    assert found == [schedule(0, 2), schedule(1, 2), schedule(2, 1), schedule(2, 3)]
    assert neighbours(GRID, best, tried, 0) == []
