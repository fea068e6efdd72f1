"""Simplify: algebra, moves that cancel, operators recognised in their pieces.

    x + 0 -> x        transpose(transpose(x)) -> transpose(x)        x * sigmoid(x) -> silu(x)

The rules stand in `rules`, each with its equation; what depends on constants alone is left to fold_constants.
"""

from __future__ import annotations

from dataclasses import dataclass

from cnnc.ir.graph import Graph
from cnnc.ir.rewrite import rewrite
from cnnc.passes.registry import Pass
from cnnc.passes.rules.algebra import ALGEBRA
from cnnc.passes.rules.movement import MOVEMENT
from cnnc.passes.rules.patterns import PATTERNS
from cnnc.target import Target


@dataclass(frozen=True)
class Simplify(Pass):
    """Apply all rules of simplification until none fires."""

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the simplified graph."""
        return rewrite(graph, (*ALGEBRA, *MOVEMENT, *PATTERNS))
