"""Functions behind convolutions: computed for several vectors at once, equal to the interpreter's."""

from __future__ import annotations

import numpy as np
import pytest

import cnnc
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.interp import evaluate
from cnnc.ops import Add, Conv, Exp, Gelu, Mish, Mul, Relu, Sigmoid, Silu, Tanh, constant, graph_input


def gated(x: Value) -> Value:
    return call(Mul(), call(Tanh(), x), call(Sigmoid(), x))


FOLLOWERS = {
    "silu": lambda x: call(Silu(), x),
    "gelu": lambda x: call(Gelu(), x),
    "tanh of a shifted sum": lambda x: call(Tanh(), call(Add(), x, constant(np.float32(0.5)))),
    "two functions": gated,
    "one in another": lambda x: call(Mish(), x),
    "a function, then more": lambda x: call(Relu(), call(Add(), call(Exp(), x), constant(np.float32(-0.75)))),
}


@pytest.mark.parametrize("name", FOLLOWERS)
@pytest.mark.parametrize("groups", [1, 12])
@pytest.mark.parametrize(("channels", "width"), [(12, 5), (36, 13)])
def test_functions_after_convolutions(
    rng: np.random.Generator, name: str, groups: int, channels: int, width: int
) -> None:
    """Channels beside the block, and rows of one tile, of several and of a rest."""
    ic = channels if groups > 1 else 7
    w = rng.standard_normal((channels, 1 if groups > 1 else ic, 3, 3)).astype(np.float32) / 16
    x = graph_input("x", (2, ic, 6, width))
    conv = Conv((1, 1), (1, 1, 1, 1), (1, 1), channels if groups > 1 else 1)
    y = call(conv, x, constant(w), constant(rng.standard_normal(channels).astype(np.float32)))
    graph = Graph("net", (x,), (FOLLOWERS[name](y),), ("y",))
    data = rng.standard_normal((2, ic, 6, width)).astype(np.float32) * 3
    wanted = evaluate(graph, {"x": data}, precise=True)["y"]
    got = cnnc.compile(graph, cache=False).run({"x": data})["y"]
    np.testing.assert_allclose(got, wanted, rtol=3e-6, atol=3e-6)
