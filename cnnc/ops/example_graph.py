"""The examples of an operator side by side in one graph, and when its results are close enough.

What tests compare on this machine, `cnnc bench-gpu` compares on a GPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from cnnc.ir.build import call, infer_types
from cnnc.ir.graph import Graph, Value
from cnnc.ir.op import OPERATORS, Example
from cnnc.ir.types import DType
from cnnc.ops.source import Input

_WITHOUT_EXAMPLES = {"input", "parameter", "constant", "fused"}
"""Sources have nothing to compute, and a kernel means what its body means."""

TOLERANCE = {DType.F16: 4e-3, DType.BF16: 3e-2, DType.F32: 2e-5, DType.F64: 1e-12}
"""Of the largest magnitude in a result: sums run in another order."""


def operator_names() -> list[str]:
    """List the operators of cnnc that have examples."""
    ours = {name for name, cls in OPERATORS.items() if cls.__module__.startswith("cnnc.ops.")}
    return sorted(ours - _WITHOUT_EXAMPLES)


def buildable_examples(name: str) -> list[Example]:
    """List the examples that the driver takes as they are: plain, of fixed sizes, with something to compute."""
    return [example for example in OPERATORS[name].examples() if _is_buildable(example)]


def _is_buildable(example: Example) -> bool:
    types = (*example.types, *infer_types(example.op, example.types))
    return all(t.layout is None and t.is_static for t in types) and bool(example.types)


def graph_of(examples: Sequence[Example]) -> Graph:
    """Make one graph of several examples side by side."""
    inputs: list[Value] = []
    outputs: list[Value] = []
    for number, example in enumerate(examples):
        values = [call(Input(f"x{number}_{i}", t)) for i, t in enumerate(example.types)]
        inputs += values
        outputs += call(example.op, *values).node.values
    return Graph("example", tuple(inputs), tuple(outputs))


def rng_for(name: str, number: int) -> np.random.Generator:
    """Give the random numbers of an example, the same every time."""
    return np.random.default_rng(zlib.crc32(f"{name} {number}".encode()))


def draw(example: Example, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draw inputs, numpy's scalars made into arrays."""
    return tuple(np.array(a) for a in example.inputs(rng))


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """Give the largest error as a share of the largest magnitude wanted, at least 1.

    Infinite where the shape, or a NaN, an infinity, or a number that is no float, is another.
    """
    if got.shape != wanted.shape:
        return float("inf")
    if wanted.dtype.kind not in "fV":
        return 0.0 if np.array_equal(got, wanted) else float("inf")
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return float("inf")
    scale = max(1.0, float(np.abs(b[finite]).max(initial=0)))
    return float(np.abs(a - b)[finite].max(initial=0)) / scale
