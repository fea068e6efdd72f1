"""Give every kernel its schedule: a template of the back end and tile sizes.

    fused(...) -> fused(...) {schedule=conv_direct(pixels=14,vectors=2)}

A tuned record decides where there is one; otherwise the cheapest candidate by the templates' cost models.  That search
is most of the time of a repeated compile, so its results may be remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from cnnc.errors import VerifyError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.rewrite import map_graph, rebuild
from cnnc.ir.text import print_graph
from cnnc.ops.fused import Fused, Schedule
from cnnc.passes.registry import Pass
from cnnc.target import Target


class KernelTemplate(Protocol):
    """One algorithm of one target: when it applies, its tile sizes, and what they cost."""

    @property
    def name(self) -> str:
        """The name that schedules carry."""

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Whether it can compute the kernel."""

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the schedules worth considering, at least one."""

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds a run takes."""


Records: TypeAlias = Callable[[Fused, Target], Schedule | None]
"""Gives the tuned schedule of a kernel, if there is one."""


def no_records(kernel: Fused, target: Target) -> Schedule | None:
    """Know of no tuned schedule."""
    return None


class Memory(Protocol):
    """What earlier searches over the same templates ended with."""

    def recall(self, kernel: Fused, target: Target) -> Schedule | None:
        """Give the schedule found for a kernel without one, if it was searched before."""

    def remember(self, kernel: Fused, target: Target, schedule: Schedule) -> None:
        """Keep what a search found."""


class NoMemory:
    """Remembers nothing: every search is done anew."""

    def recall(self, kernel: Fused, target: Target) -> Schedule | None:
        """Give nothing."""

    def remember(self, kernel: Fused, target: Target, schedule: Schedule) -> None:
        """Keep nothing."""


def candidates(kernel: Fused, templates: Sequence[KernelTemplate], target: Target) -> list[tuple[float, Schedule]]:
    """List the schedules of the templates that take a kernel, each with the seconds estimated for it."""
    matching = (template for template in templates if template.matches(kernel, target))
    return [(t.cost(kernel, s, target), s) for t in matching for s in t.space(kernel, target)]


@dataclass(frozen=True)
class Tile(Pass):
    """Choose schedules; equal kernels get equal ones.  Kernels that have a schedule keep it."""

    templates: tuple[KernelTemplate, ...] = field(default=(), metadata={"option": False})
    records: Records = field(default=no_records, metadata={"option": False})
    memory: Memory = field(default=NoMemory(), metadata={"option": False})

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph with every kernel scheduled; raises `VerifyError` naming a node that no template takes."""
        known: dict[str, Schedule] = {}

        def schedule(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            if not isinstance(node.op, Fused) or node.op.schedule is not None:
                return rebuild(node, inputs)
            key = print_graph(node.op.body, locations=False)
            if key not in known:
                known[key] = self._choose(node, node.op, target)
            return call(replace(node.op, schedule=known[key]), *inputs, loc=node.loc).node.values

        return map_graph(graph, schedule)

    def _choose(self, node: Node, kernel: Fused, target: Target) -> Schedule:
        matching = [template for template in self.templates if template.matches(kernel, target)]
        names = {template.name for template in matching}
        for ask in (self.records, self.memory.recall):
            known = ask(kernel, target)
            if known is not None and known.template in names:
                return known
        found = self._cheapest(node, kernel, matching, target)
        self.memory.remember(kernel, target, found)
        return found

    def _cheapest(self, node: Node, kernel: Fused, matching: Sequence[KernelTemplate], target: Target) -> Schedule:
        """Search all candidates; raises `VerifyError` if there is none."""
        if not matching:
            where = ", ".join(sorted(node.loc)) or "no location"
            names = ", ".join(template.name for template in self.templates) or "none"
            text = print_graph(kernel.body)
            raise VerifyError(f"tile: no template ({names}) takes kernel {kernel.anchor} at {where}\n{text}")
        found = candidates(kernel, matching, target)
        if not found:
            raise VerifyError(
                f"tile: template {matching[0].name} takes kernel {kernel.anchor} but has no schedule for it"
            )
        return min(found, key=lambda candidate: candidate[0])[1]
