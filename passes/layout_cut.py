"""Give nodes one of two labels, blocked or plain, so that all costs together are least: a minimum cut.

Most nodes need no cut: what they gain by one label decides, by themselves or for all that hang together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING

from cnnc.ir.graph import Node, Value

if TYPE_CHECKING:
    import networkx

BLOCKED, PLAIN = "blocked", "plain"
_PER_SECOND = 1e12
"""Costs are cut as whole picoseconds, so that no rounding decides."""

MOST_UNDECIDED = 5_000
"""With more nodes to decide, which no network for images has, all that can be blocked is: cuts take quadratic time."""


@dataclass(frozen=True)
class Edge:
    """What it costs to make `value` in one layout and read it in another; makers and readers are nodes or PLAIN."""

    value: Value
    maker: Node | str
    readers: tuple[Node | str, ...]
    seconds: float

    def ends(self, label: dict[Node, str]) -> list[Node | str]:
        """List the maker and the readers, by their labels where they have one."""
        return [n if isinstance(n, str) else label.get(n, n) for n in (self.maker, *self.readers)]


def blocked_side(gain: dict[Node, float], edges: Sequence[Edge], decided: Mapping[Node, str]) -> set[Node]:
    """Give the nodes to label blocked, where some are labelled already.

    `gain` is what each node saves by being blocked, in seconds, apart from its edges.
    """
    label = _clear(gain, edges)
    label |= decided
    label |= _agreed(gain, edges, label)
    undecided = [node for node in gain if node not in label]
    if not undecided or len(undecided) > MOST_UNDECIDED:
        return {node for node in gain if label.get(node) != PLAIN}
    network = _network(undecided, gain, edges, label)
    import networkx

    _, (blocked, _) = networkx.minimum_cut(
        network, BLOCKED, PLAIN, flow_func=networkx.algorithms.flow.boykov_kolmogorov
    )
    return {node for node in gain if label.get(node) == BLOCKED or node in blocked}


def _clear(gain: dict[Node, float], edges: Sequence[Edge]) -> dict[Node, str]:
    """Label the nodes that gain more by one layout than all their transforms could cost."""
    at_stake = dict.fromkeys(gain, 0.0)
    for edge in edges:
        for node in {edge.maker, *edge.readers}:
            if isinstance(node, Node):
                at_stake[node] += edge.seconds
    return {n: BLOCKED if gain[n] > 0 else PLAIN for n in gain if abs(gain[n]) > at_stake[n]}


def _agreed(gain: dict[Node, float], edges: Sequence[Edge], label: dict[Node, str]) -> dict[Node, str]:
    """Label neighbours together that all gain by one layout, each at least what the whole group's borders could cost.

    In most networks that leaves nothing to cut.
    """
    touching: dict[Node, list[Edge]] = {node: [] for node in gain if node not in label}
    for edge in edges:
        for end in set(edge.ends(label)):
            if isinstance(end, Node):
                touching[end].append(edge)
    found: dict[Node, str] = {}
    seen: set[Node] = set()
    for first in touching:
        if first in seen:
            continue
        group, around = _neighbours(first, touching, label)
        seen.update(group)
        for mine, other, sign in ((BLOCKED, PLAIN, 1), (PLAIN, BLOCKED, -1)):
            # An exact sum, which does not depend on the order of a set.
            border = fsum(edge.seconds for edge in around if other in edge.ends(label))
            if min(sign * gain[node] for node in group) >= border:
                found |= dict.fromkeys(group, mine)
    return found


def _neighbours(first: Node, touching: dict[Node, list[Edge]], label: dict[Node, str]) -> tuple[set[Node], set[Edge]]:
    """Give the nodes to be reached from one over edges between nodes without a label, and all edges they touch."""
    group, around, stack = {first}, set(), [first]
    while stack:
        for edge in touching[stack.pop()]:
            around.add(edge)
            new = {end for end in edge.ends(label) if isinstance(end, Node)} - group
            group |= new
            stack += new
    return group, around


def _network(
    undecided: Sequence[Node], gain: dict[Node, float], edges: Sequence[Edge], label: dict[Node, str]
) -> networkx.DiGraph:
    """Make the network to cut: an edge (a, b) costs its capacity where a is blocked and b plain, or is never cut.

    A value changed to blocked for some reader costs once, so its readers pull a vertex that stands for "some reader is
    blocked", and only that one pays; likewise for plain.
    """
    import networkx

    network = networkx.DiGraph()
    network.add_nodes_from((BLOCKED, PLAIN))
    for node in undecided:
        ends = (BLOCKED, node) if gain[node] > 0 else (node, PLAIN)
        network.add_edge(*ends, capacity=round(abs(gain[node]) * _PER_SECOND))
    for edge in edges:
        maker, *readers = edge.ends(label)
        some_blocked, some_plain = (edge.value, BLOCKED), (edge.value, PLAIN)
        for reader in set(readers):
            network.add_edge(reader, some_blocked)
            network.add_edge(some_plain, reader)
        network.add_edge(some_blocked, maker, capacity=round(edge.seconds * _PER_SECOND))
        network.add_edge(maker, some_plain, capacity=round(edge.seconds * _PER_SECOND))
    return network
