"""Choose how each convolution is computed.

    conv{algorithm=direct} -> conv{algorithm=A}

for the cheapest A of a table whose error stays within the budget.  `seconds` are relative estimates for one layer on
one core; `error` is in units of the last place of the work done, max |y - exact| / (eps * sum |a||b|), as measured on
3x3 layers; the budget of a convolution is 8 without Winograd, 64 with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.rewrite import rewrite
from cnnc.ops.conv import Conv
from cnnc.passes.registry import Pass
from cnnc.target import Target

Applies: TypeAlias = Callable[[Node], bool]
Seconds: TypeAlias = Callable[[Node, Target], float]


@dataclass(frozen=True)
class Algorithm:
    """One way to compute a convolution: when it applies, what it costs, how large its error is."""

    name: str
    error: float
    applies: Applies
    seconds: Seconds


FMA_A_SECOND = 4e9
"""Vector multiply-adds a second of one core: only ratios between algorithms matter."""


def _direct_seconds(node: Node, target: Target) -> float:
    flops = node.op.flops(*(v.type for v in node.inputs))
    return flops / (2 * target.vector_lanes * FMA_A_SECOND)


ALGORITHMS: tuple[Algorithm, ...] = (
    Algorithm("direct", error=2.2, applies=lambda node: True, seconds=_direct_seconds),
)
"""The table: a new algorithm is a line here and a template in the back end."""


@dataclass(frozen=True)
class ChooseAlgorithm(Pass):
    """Choose an algorithm for every convolution; `budget` bounds its error."""

    budget: float = 8.0

    def run(self, graph: Graph, target: Target) -> Graph:
        """Set the algorithm of every convolution."""

        def choose_algorithm(v: Value) -> Value | None:
            """conv{algorithm=direct} -> conv{algorithm=cheapest within the budget}."""
            match v.node:
                case Node(Conv() as conv, inputs):
                    best = cheapest(v.node, target, self.budget)
                    return None if conv.algorithm == best else call(replace(conv, algorithm=best), *inputs)
            return None

        return rewrite(graph, (choose_algorithm,))


def cheapest(node: Node, target: Target, budget: float, table: tuple[Algorithm, ...] = ALGORITHMS) -> str:
    """Name the cheapest algorithm of a table that applies to a convolution and stays within an error budget.

    The first of the table is what remains when none does.
    """
    possible = [a for a in table if a.error <= budget and a.applies(node)]
    return min(possible, key=lambda a: a.seconds(node, target), default=table[0]).name
