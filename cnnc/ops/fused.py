"""A kernel: several operators run as one, its meaning is its body."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.attribute import attribute
from cnnc.ir.graph import Graph
from cnnc.ir.interp import run
from cnnc.ir.layout import Layout
from cnnc.ir.op import Op
from cnnc.ir.types import TensorType


@attribute
@dataclass(frozen=True)
class Schedule:
    """How a kernel is computed: a template of the back end and its parameters (tile sizes), by name."""

    template: str
    params: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        inner = ",".join(f"{key}={value}" for key, value in self.params)
        return f"{self.template}({inner})"

    @staticmethod
    def parse(text: str) -> Schedule:
        """Read what `str` printed."""
        template, _, inner = text.rstrip(")").partition("(")
        pairs = [item.partition("=") for item in inner.split(",") if item]
        return Schedule(template, tuple((key, int(value)) for key, _, value in pairs))

    def __getitem__(self, key: str) -> int:
        return dict(self.params)[key]


@dataclass(frozen=True)
class Fused(Op):
    """One kernel: y = body(x...).

    `anchor` names the operator that decides the algorithm (`conv`, `reduce_mean`, ...; the deepest in `Kind`).
    """

    body: Graph
    anchor: str
    schedule: Schedule | None = None

    @property
    def outputs(self) -> int:
        """As many as the body has."""
        return len(self.body.outputs)

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        """Give the body's output types; the inputs must be the body's to the letter."""
        wanted = tuple(v.type for v in self.body.inputs)
        if types != wanted:
            raise ShapeError(
                f"fused {self.anchor}: the body takes ({', '.join(map(str, wanted))})"
                f" but is given ({', '.join(map(str, types))})"
            )
        return tuple(v.type for v in self.body.outputs)

    def infer_layout(self, *types: TensorType) -> tuple[Layout | None, ...]:
        """Give the body's output layouts."""
        return tuple(v.type.layout for v in self.body.outputs)

    def reference(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run the body; all of it in float64 where the arrays are wider than the body's inputs."""
        pairs = zip(arrays, self.body.inputs, strict=True)
        return run(self.body, arrays, precise=any(a.dtype != v.dtype.numpy for a, v in pairs))

    def flops(self, *types: TensorType) -> int:
        """Add up the body."""
        return sum(n.op.flops(*(v.type for v in n.inputs)) for n in self.body.nodes)
