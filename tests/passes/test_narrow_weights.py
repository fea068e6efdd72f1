"""narrow_weights: which constants are stored in 16 bits, that the graph means just that, and what stays f32."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import UsageError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.interp import run
from cnnc.ir.parse import parse_graph
from cnnc.ir.rewrite import RewriteLog, recording
from cnnc.ir.text import print_graph, weights_of
from cnnc.ir.types import DType
from cnnc.ops import Add, Cast, Constant, Conv, Dense, Fused, MatMul, Mul, Relu, WinogradWeight, constant, graph_input
from cnnc.passes.fold_constants import FoldConstants
from cnnc.passes.fuse import Fuse
from cnnc.passes.narrow_weights import NARROW, NarrowWeights
from cnnc.passes.pipeline import pipeline, run_pipeline
from cnnc.passes.registry import parse_passes
from cnnc.passes.weight_report import describe_weights, weight_type
from cnnc.target import Target
from tests.passes.graphs import TARGET, check, conv, graph_of, image, operators, weights

BF16 = NarrowWeights()


def exact(v: Value, dtype: DType = DType.BF16) -> Value:
    """Give a constant of f32 whose numbers the narrow type holds."""
    assert isinstance(v.op, Constant)
    return constant(v.op.value.array.astype(dtype.numpy).astype(np.float32), label=v.op.label)


def stored(graph: Graph) -> list[DType]:
    """List the types of all constants, in order."""
    return [node.types[0].dtype for node in graph.nodes if isinstance(node.op, Constant)]


def network(rng: np.random.Generator) -> Graph:
    x = image(1, 4, 6, 6)
    y = call(Relu(), conv(x, exact(weights(rng, 4, 4, 3, 3, label="conv.weight")), weights(rng, 4), pad=1))
    y = call(MatMul(), exact(weights(rng, 1, 4, 6, 6)), call(Add(), y, weights(rng, 4, 1, 1)))
    return graph_of(call(Dense(), y, exact(weights(rng, 5, 6, label="fc.weight"))))


def test_golden(rng, golden):
    graph = network(rng)
    done = check(BF16, graph, rng)
    fused = check(Fuse(), done, rng)
    golden("narrow_weights", print_graph(graph) + print_graph(done) + print_graph(fused))
    assert operators(fused) == ["cast+conv+relu+add", "cast+mat_mul", "cast+dense"]


@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_are_those_of_rounded_weights(rng, dtype: DType):
    x, w = image(1, 3, 5, 5), weights(rng, 4, 3, 3, 3)
    done = NarrowWeights(dtype).run(graph_of(conv(x, w)), TARGET)
    wanted = graph_of(conv(x, exact(w, dtype)))
    array = rng.standard_normal((1, 3, 5, 5)).astype(np.float32)
    np.testing.assert_array_equal(run(done, [array])[0], run(wanted, [array])[0])
    assert stored(done) == [dtype]


def test_what_is_no_weight_stays(rng):
    x = image(1, 4, 6, 6)
    y = call(Mul(), conv(x, image(4, 4, 1, 1, label="w"), weights(rng, 4)), weights(rng, 4, 1, 1))
    done = check(BF16, graph_of(y), rng)
    assert stored(done) == [DType.F32] * 2
    assert "cast" not in operators(done)


def test_other_types_stay(rng):
    x = graph_input("x", (2, 8), DType.F16)
    assert stored(check(BF16, graph_of(call(Dense(), x, constant(np.ones((3, 8)), DType.F16))), rng)) == [DType.F16]


def test_a_weight_two_layers_share_is_stored_once_and_widened_in_each(rng):
    x, w = image(1, 4, 6, 6), exact(weights(rng, 4, 4, 1, 1))
    done = check(BF16, graph_of(call(Add(), conv(x, w), conv(call(Relu(), x), w))), rng)
    assert stored(done) == [DType.BF16]
    assert [o for o in operators(check(Fuse(), done, rng)) if "cast" in o] == ["cast+conv", "cast+conv+add"]


def test_weights_beyond_the_type_stay_and_are_named(rng):
    large = np.full((3, 8), 0.5, np.float32)
    large[1, 2] = -7e4
    infinite = np.full((3, 8), np.inf, np.float32)
    x = graph_input("x", (2, 8))
    graph = graph_of(
        call(Dense(), x, constant(large, label="large"), loc=["Gemm_1"]),
        call(Dense(), x, constant(infinite, label="infinite")),
    )
    log = RewriteLog()
    with recording(log):
        done = NarrowWeights(DType.F16).run(graph, TARGET)
    assert stored(done) == [DType.F32, DType.F16]
    (miss,) = log.missed
    assert miss.rule == "narrow_weights"
    assert miss.reason == "large : f32[3,8] holds -70000, too large for f16"
    assert stored(NarrowWeights(DType.BF16).run(graph, TARGET)) == [DType.BF16] * 2
    report = describe_weights((Fuse().run(done, TARGET),), DType.F16, log.missed)
    assert report.narrow == 1
    assert report.narrow_bytes == 48
    assert report.kept == (miss.reason,)
    assert [(c.name, c.bytes) for c in report.wide] == [("large", 96)]


def test_a_transformed_weight_that_no_winograd_kernel_reads_stays(rng):
    plain = graph_of(
        call(
            Conv((1, 1), (1,) * 4, (1, 1), algorithm="winograd4"),
            image(1, 16, 8, 8),
            call(WinogradWeight(4), weights(rng, 16, 16, 3, 3)),
        )
    )
    folded = FoldConstants().run(plain, TARGET)
    log = RewriteLog()
    with recording(log):
        assert stored(check(NarrowWeights(DType.F16), folded, rng)) == [DType.F32]
    assert "is transformed, but read by no Winograd kernel" in log.missed[0].reason


def test_transformed_weights_in_blocks_are_narrowed(rng):
    graph = graph_of(conv(image(1, 16, 24, 24), weights(rng, 16, 16, 3, 3), pad=1))
    steps = [p for p in pipeline(3, weights=DType.F16) if p.name not in ("tile", "place_concats")]
    done = run_pipeline(graph, TARGET, steps)
    assert stored(done) == [DType.F16]
    (kernel,) = [n.op for n in done.nodes if isinstance(n.op, Fused) and n.op.anchor == "conv"]
    (op,) = [n.op for n in kernel.body.nodes if isinstance(n.op, Conv)]
    assert op.algorithm.startswith("winograd")


def test_the_text_reads_back(rng):
    done = Fuse().run(NarrowWeights(DType.F16).run(network(rng), TARGET), TARGET)
    again = parse_graph(print_graph(done), weights_of(done))
    assert print_graph(again) == print_graph(done)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_every_level_converts_inside_the_kernels(rng, level: int):
    steps = [p for p in pipeline(level, weights=DType.BF16) if p.name != "tile"]
    done = run_pipeline(network(rng), TARGET, steps)
    assert stored(done).count(DType.BF16) == 3
    assert "cast" not in operators(done)
    assert sum("cast" in o for o in operators(done)) == 3


def test_what_is_refused():
    with pytest.raises(UsageError, match="narrow_weights: dtype=f64 is none of bf16, f16"):
        NarrowWeights(DType.F64).run(Graph("g", (), ()), TARGET)
    with pytest.raises(UsageError, match="put narrow_weights\\{dtype=f16\\} before fuse into the list"):
        pipeline(3, passes="fuse", weights=DType.F16)
    with pytest.raises(UsageError, match="weights 'f8' are not known; use f32, bf16, f16"):
        weight_type("f8", TARGET)
    with pytest.raises(UsageError, match="f16 need F16C instructions, which cpu:x86-64-v2 lacks; use bf16"):
        weight_type("f16", Target.parse("cpu:x86-64-v2"))
    assert weight_type("bf16", Target.parse("cpu:x86-64-v2")) is DType.BF16


def test_the_pass_can_stand_in_a_list():
    (step,) = parse_passes("narrow_weights{dtype=f16}")
    assert step == NarrowWeights(DType.F16)
    assert str(step) == "narrow_weights{dtype=f16}"


def test_conversions_of_computed_values_are_no_ones_business(rng):
    x = graph_input("x", (2, 8), DType.F16)
    graph = graph_of(call(Dense(), call(Cast(DType.F32), x), weights(rng, 3, 8)))
    assert operators(check(Fuse(), graph, rng)) == ["cast", "dense"]
