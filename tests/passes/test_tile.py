"""tile: records first, then the cheapest; a kernel nobody takes is our bug."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pytest

from cnnc.errors import VerifyError
from cnnc.ir.build import call
from cnnc.ir.text import print_graph
from cnnc.ops import Exp, Fused, Relu, Schedule
from cnnc.passes.fuse import Fuse
from cnnc.passes.tile import Tile
from cnnc.target import Target
from tests.passes.graphs import TARGET, check, conv, graph_of, image, weights


@dataclass(frozen=True)
class Fixed:
    """A template with a price list."""

    name: str
    takes: frozenset[str]
    prices: Mapping[int, float]
    asked: list[str] = field(default_factory=list)

    def matches(self, kernel: Fused, target: Target) -> bool:
        return kernel.anchor in self.takes

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        self.asked.append(kernel.anchor)
        return [Schedule(self.name, (("size", size),)) for size in self.prices]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        return self.prices[schedule["size"]]


GENERAL = Fixed("general", frozenset({"conv", "exp", "relu"}), {1: 5.0})
SPECIAL = Fixed("special", frozenset({"conv"}), {1: 9.0, 2: 3.0, 4: 4.0})


def schedules(graph):
    return [str(n.op.schedule) for n in graph.nodes if isinstance(n.op, Fused)]


def network(rng):
    y = call(Relu(), conv(image(1, 3, 5, 5), weights(rng, 4, 3, 3, 3)))
    return Fuse(grow=False).run(graph_of(call(Exp(), y)), TARGET)


def test_golden(rng, golden):
    done = check(Tile((GENERAL, SPECIAL)), network(rng), rng)
    golden("tile", print_graph(done))
    assert schedules(done) == ["special(size=2)", "general(size=1)", "general(size=1)"]


def test_a_record_decides(rng):
    def records(kernel: Fused, target: Target) -> Schedule | None:
        return Schedule("general", (("size", 7),)) if kernel.anchor == "conv" else None

    done = check(Tile((GENERAL, SPECIAL), records), network(rng), rng)
    assert schedules(done)[0] == "general(size=7)"


def test_a_record_of_a_template_that_does_not_match_is_not_used(rng):
    done = check(Tile((GENERAL, SPECIAL), lambda kernel, target: Schedule("special")), network(rng), rng)
    assert schedules(done) == ["special()", "general(size=1)", "general(size=1)"]


@dataclass
class Notes:
    """Remembers by anchor."""

    known: dict[str, Schedule] = field(default_factory=dict)

    def recall(self, kernel: Fused, target: Target) -> Schedule | None:
        return self.known.get(kernel.anchor)

    def remember(self, kernel: Fused, target: Target, schedule: Schedule) -> None:
        self.known[kernel.anchor] = schedule


def test_what_was_searched_once_is_not_searched_again(rng):
    notes = Notes()
    template = Fixed("general", frozenset({"conv", "exp", "relu"}), {1: 5.0, 2: 4.0})
    graph = network(rng)
    first = schedules(Tile((template,), memory=notes).run(graph, TARGET))
    assert template.asked == ["conv", "relu", "exp"]
    assert schedules(check(Tile((template,), memory=notes), graph, rng)) == first == ["general(size=2)"] * 3
    assert template.asked == ["conv", "relu", "exp"]


def test_a_record_goes_before_memory_and_is_not_remembered(rng):
    notes = Notes({"relu": Schedule("general", (("size", 3),)), "exp": Schedule("gone")})
    tile = Tile((GENERAL, SPECIAL), lambda kernel, target: Schedule("general", (("size", 7),)), notes)
    assert schedules(check(tile, network(rng), rng)) == ["general(size=7)"] * 3
    assert notes.known == {"relu": Schedule("general", (("size", 3),)), "exp": Schedule("gone")}
    assert schedules(Tile((GENERAL, SPECIAL), memory=notes).run(network(rng), TARGET)) == [
        "special(size=2)",
        "general(size=3)",
        "general(size=1)",
    ]


def test_equal_kernels_are_looked_at_once(rng):
    x = image(2, 3)
    graph = Fuse(grow=False).run(graph_of(call(Exp(), call(Exp(), x, loc=["a"]), loc=["b"])), TARGET)
    template = Fixed("once", frozenset({"exp"}), {1: 1.0})
    assert schedules(check(Tile((template,)), graph, rng)) == ["once(size=1)"] * 2
    assert template.asked == ["exp"]


def test_no_template_is_an_error_that_names_the_node(rng):
    graph = Fuse().run(graph_of(call(Exp(), image(2, 3), loc=["Exp_7"])), TARGET)
    with pytest.raises(VerifyError, match=r"no template \(special\) takes kernel exp at Exp_7"):
        Tile((SPECIAL,)).run(graph, TARGET)


def test_a_template_without_a_schedule_is_an_error(rng):
    empty = Fixed("empty", frozenset({"exp"}), {})
    with pytest.raises(VerifyError, match="template empty takes kernel exp but has no schedule"):
        Tile((empty,)).run(Fuse().run(graph_of(call(Exp(), image(2))), TARGET), TARGET)
