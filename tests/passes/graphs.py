"""Small networks to run passes on, and what every test of a pass asks."""

from __future__ import annotations

from typing import Any

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.interp import evaluate_all, run
from cnnc.ir.op import random_array
from cnnc.ir.text import print_graph
from cnnc.ir.verify import verify
from cnnc.ops import BatchNorm, Conv, constant, graph_input
from cnnc.passes.registry import Pass
from cnnc.target import Target

TARGET = Target("cpu", "x86-64-v3", ("avx", "avx2", "fma"))
"""A fixed one, so that golden texts are the same on every machine: vectors of 8 lanes."""


def weights(rng: np.random.Generator, *shape: int, label: str = "") -> Value:
    """Draw a constant in [-1, 1)."""
    return constant((rng.random(shape) * 2 - 1).astype(np.float32), label=label)


def image(*shape: int, label: str = "x") -> Value:
    """Make an input."""
    return graph_input(label, shape)


def conv(x: Value, w: Value, b: Value | None = None, *, pad: int = 0, stride: int = 1, groups: int = 1) -> Value:
    """Convolve with the same pad and stride along every axis."""
    rank = w.type.rank - 2
    op = Conv((stride,) * rank, (pad,) * (2 * rank), (1,) * rank, groups)
    return call(op, x, w) if b is None else call(op, x, w, b)


def batch_norm(rng: np.random.Generator, x: Value, epsilon: float = 1e-5, var: Any = None) -> Value:
    """Normalise with drawn statistics."""
    channels = x.type.static_shape[1]
    variance = rng.uniform(0.2, 2, channels) if var is None else np.broadcast_to(np.asarray(var, float), (channels,))
    vectors = [weights(rng, channels) for _ in range(3)]
    return call(BatchNorm(epsilon), x, *vectors, constant(variance.astype(np.float32)))


def graph_of(*outputs: Value, inputs: tuple[Value, ...] | None = None) -> Graph:
    """Make a graph of what the outputs reach, its inputs in topological order."""
    found = Graph("net", (), outputs)
    reached = tuple(v for node in found.nodes if node.op.name == "input" for v in node.values)
    return Graph("net", reached if inputs is None else inputs, outputs)


def operators(graph: Graph) -> list[str]:
    """List the operators that compute, in order; kernels as `conv+relu`."""
    names = []
    for node in graph.nodes:
        body = getattr(node.op, "body", None)
        if body is not None:
            names.append("+".join(operators(body)))
        elif node.op.name not in ("input", "constant"):
            names.append(node.op.name)
    return names


def check(
    step: Pass, graph: Graph, rng: np.random.Generator, target: Target = TARGET, tolerance: float = 1e-6
) -> Graph:
    """Run a pass and check what holds for all of them: valid, idempotent, the same numbers on fresh inputs."""
    verify(graph)
    done = verify(step.run(graph, target), str(step))
    assert done.input_names == graph.input_names
    assert done.output_names == graph.output_names
    assert [v.type for v in done.outputs] == [v.type for v in graph.outputs]
    assert print_graph(verify(step.run(done, target))) == print_graph(done), f"{step} is not idempotent"
    assert_same_numbers(graph, done, rng, tolerance)
    return done


def assert_same_numbers(before: Graph, after: Graph, rng: np.random.Generator, tolerance: float = 1e-6) -> None:
    """Compare two graphs in float64, where only the rounding of folded constants can differ.

    That is relative to the largest number on the way: a difference of large numbers may be small.
    """
    for _ in range(2):
        arrays = [random_array(rng, v.type) for v in before.inputs]
        values = evaluate_all(before, arrays, precise=True)
        got = run(after, arrays, precise=True)
        scale = max(_largest(array) for array in values.values())
        for name, v, b in zip(before.output_names, before.outputs, got, strict=True):
            np.testing.assert_allclose(b, values[v], rtol=tolerance * 10, atol=tolerance * scale, err_msg=name)


def _largest(array: np.ndarray) -> float:
    finite = np.abs(array[np.isfinite(array)]) if array.dtype.kind == "f" else np.zeros(0)
    return float(finite.max(initial=0.0))
