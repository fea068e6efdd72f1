"""Random numbers for parameters: He's rule for weights, plausible statistics for batch norm."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from cnnc.ir.graph import Graph, Value
from cnnc.ops.source import Parameter

RESIDUAL = 0.3
"""What the gammas at the end of residual branches are multiplied by."""


class Role(StrEnum):
    """What a parameter does in its layer, which decides how its first numbers are drawn."""

    WEIGHT = "weight"
    BIAS = "bias"
    GAMMA = "gamma"
    BETA = "beta"
    MEAN = "mean"
    VARIANCE = "variance"

    @property
    def trained(self) -> bool:
        """Whether training changes it by gradients (running statistics are no parameters in papers' counts)."""
        return self not in (Role.MEAN, Role.VARIANCE)


@dataclass(frozen=True)
class Initial:
    """How the first numbers of a parameter are drawn; `fan_in` counts the inputs of one output."""

    role: Role
    fan_in: int = 1

    def draw(self, shape: tuple[int, ...], name: str, seed: int) -> np.ndarray:
        """Draw f32 numbers that depend on the seed and the name only, not on the other parameters.

        Weights are normal with variance 2 / fan_in (He et al., ICCV 2015, section 2.2), biases uniform in
        +-1 / sqrt(fan_in); gamma has a mean square near 1, so that signals neither die nor grow through a
        chain of normalised layers.
        """
        digest = hashlib.sha256(name.encode()).digest()
        rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
        fan_in = max(self.fan_in, 1)
        match self.role:
            case Role.WEIGHT:
                return rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / fan_in))
            case Role.BIAS:
                return (rng.random(shape, np.float32) * 2 - 1) * np.float32(1 / math.sqrt(fan_in))
            case Role.GAMMA:
                return rng.random(shape, np.float32) * np.float32(0.5) + np.float32(0.75)
            case Role.VARIANCE:
                return rng.random(shape, np.float32) + np.float32(0.5)
            case Role.BETA | Role.MEAN:
                return rng.standard_normal(shape, np.float32) * np.float32(0.1)


def residual_gammas(graph: Graph) -> frozenset[str]:
    """Name the gammas of batch norms whose output is added to something that is none.

    Those of residual branches: were they near 1, each block would double the variance.  (Goyal et al., 2017,
    section 5.1, start them at 0.)
    """
    found: set[str] = set()
    for node in graph.nodes:
        if node.op.name == "add":
            ends = [_last_gamma(value) for value in node.inputs]
            if None in ends:
                found.update(name for name in ends if name is not None)
    return frozenset(found)


def _last_gamma(value: Value) -> str | None:
    """Name the gamma of the batch norm that makes a value, a gate on its way allowed."""
    while value.op.name == "mul":
        value = value.inputs[0]
    if value.op.name != "batch_norm":
        return None
    gamma = value.inputs[1].op
    return gamma.label if isinstance(gamma, Parameter) else None
