"""narrow_activations: what kernels hand each other in 16 bits, that arithmetic stays f32, and what stays wide."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import UsageError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.interp import run
from cnnc.ir.rewrite import RewriteLog, recording
from cnnc.ir.text import print_graph
from cnnc.ir.types import DType
from cnnc.ops import Add, ArgMax, AveragePool, Concat, Dense, Fused, MaxPool, Relu, Reshape, Sigmoid, Transpose
from cnnc.passes.fuse import Fuse
from cnnc.passes.narrow_activations import NarrowActivations
from cnnc.passes.place_concats import PlaceConcats
from tests.passes.graphs import TARGET, check, conv, graph_of, image, operators, weights

F16 = NarrowActivations()
ROUNDING = 2e-4
"""Of the largest number on the way, where f16 rounds a few times (and `check` allows ten times that of each)."""


def narrow(graph: Graph, rng: np.random.Generator) -> Graph:
    return check(F16, Fuse().run(graph, TARGET), rng, tolerance=ROUNDING)


def types(graph: Graph) -> list[str]:
    """List what is computed outside of kernels' bodies."""
    return [str(t.dtype) for node in graph.nodes if node.inputs for t in node.types]


def pool() -> MaxPool:
    return MaxPool((2, 2), (2, 2), (0,) * 4, (1, 1))


def test_golden(rng, golden):
    x = image(1, 4, 6, 6)
    y = call(pool(), call(Relu(), conv(x, weights(rng, 4, 4, 3, 3), weights(rng, 4), pad=1)))
    y = call(Add(), conv(y, weights(rng, 4, 4, 1, 1)), y)
    y = call(Dense(), call(Reshape((1, 36)), y), weights(rng, 5, 36))
    fused = Fuse().run(graph_of(y), TARGET)
    done = check(F16, fused, rng, tolerance=ROUNDING)
    golden("narrow_activations", print_graph(fused) + print_graph(done))
    assert operators(done) == [
        "conv+relu+cast",
        "cast+max_pool+cast",
        "cast+conv+cast+add+cast",
        "reshape",
        "cast+dense",
    ]


@pytest.mark.parametrize(("dtype", "bits"), [(DType.F16, 10), (DType.BF16, 7)])
def test_numbers_are_rounded_once_a_kernel_and_nowhere_else(rng, dtype: DType, bits: int):
    x = image(1, 3, 4, 4)
    w, v = weights(rng, 8, 3, 1, 1), weights(rng, 2, 8, 1, 1)
    y = conv(call(Sigmoid(), conv(x, w)), v)
    done = NarrowActivations(dtype).run(Fuse().run(graph_of(y), TARGET), TARGET)
    array = rng.standard_normal((1, 3, 4, 4)).astype(np.float32)
    between = 1 / (1 + np.exp(-np.einsum("oi,ihw->ohw", w.op.value.array[..., 0, 0].astype(float), array[0])))
    exponent = np.floor(np.log2(between)) - bits
    rounded = np.rint(between / 2**exponent) * 2**exponent
    wanted = np.einsum("oi,ihw->ohw", v.op.value.array[..., 0, 0], rounded)
    (got,) = run(done, [array], precise=True)
    np.testing.assert_allclose(got[0], wanted, rtol=1e-5, atol=1e-7)


def test_inputs_outputs_and_constants_stay(rng):
    x = image(1, 4, 4, 4)
    done = narrow(graph_of(call(Relu(), x), call(Add(), x, weights(rng, 1, 4, 4, 4))), rng)
    assert types(done) == ["f32", "f32"]


def test_an_output_that_is_read_again_stays(rng):
    y = call(pool(), image(1, 4, 8, 8))
    done = narrow(graph_of(y, call(pool(), y)), rng)
    assert types(done) == ["f32", "f32"]


def test_kernels_that_move_data_move_16_bits(rng):
    x = call(pool(), image(1, 4, 8, 8))
    y = call(Concat(1), call(Transpose((0, 1, 3, 2)), x), x)
    done = narrow(graph_of(call(pool(), y), call(pool(), x)), rng)
    moved = [node for node in done.nodes if isinstance(node.op, Fused) and node.op.anchor in ("transpose", "concat")]
    assert {str(v.dtype) for node in moved for v in (*node.inputs, *node.values)} == {"f16"}
    assert [operators(node.op.body) for node in moved] == [["transpose"], ["concat"]]


def test_parts_of_a_concatenation_are_narrowed_together(rng):
    x = image(1, 16, 8, 8)
    y = call(Concat(1), call(pool(), x), call(AveragePool((2, 2), (2, 2), (0,) * 4, (1, 1)), x))
    graph = graph_of(call(pool(), y))
    done = PlaceConcats().run(narrow(graph, rng), TARGET)
    assert operators(done)[2] == "concat"
    assert types(done) == ["f16", "f16", "f16", "f32"]
    placed = PlaceConcats().run(Fuse().run(graph, TARGET), TARGET)
    assert types(check(F16, placed, rng, tolerance=ROUNDING)) == ["f16", "f16", "f16", "f32"]


def test_what_integers_are_made_of_stays(rng):
    y = call(pool(), image(1, 4, 8, 8))
    log = RewriteLog()
    with recording(log):
        done = F16.run(Fuse().run(graph_of(call(ArgMax(1, False), y, loc=["top"])), TARGET), TARGET)
    assert types(done) == ["f32", "i64"]
    assert [(miss.rule, miss.reason) for miss in log.missed] == [
        ("narrow_activations", "arg_max makes i64[1,4,4] of what it reads")
    ]


def test_a_graph_without_kernels_stays(rng):
    graph = graph_of(call(pool(), call(pool(), image(1, 4, 8, 8))))
    assert print_graph(check(F16, graph, rng)) == print_graph(graph)


def test_only_narrow_types():
    with pytest.raises(UsageError, match="narrow_activations: dtype=f64 is none of bf16, f16"):
        NarrowActivations(DType.F64).run(graph_of(image(1, 1, 1, 1)), TARGET)
