"""place_concats: parts are computed where they lie in the whole, wherever that is possible and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

import cnnc
from cnnc.errors import VerifyError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.interp import evaluate
from cnnc.ir.layout import Layout
from cnnc.ir.text import print_graph
from cnnc.ops import Concat, Exp, LayoutTransform, MaxPool, Relu, Reshape
from cnnc.passes.check_plan import check_plan
from cnnc.passes.fuse import Fuse
from cnnc.passes.place_concats import PlaceConcats
from cnnc.passes.plan_memory import MemoryPlan, plan_memory
from tests.passes.graphs import TARGET, check, conv, graph_of, image, weights


def branch(rng: np.random.Generator, x: Value, channels: int, name: str = "") -> Value:
    return call(Relu(), conv(x, weights(rng, channels, int(x.shape[1]), 1, 1)), loc=[name] if name else [])


def pooled(x: Value) -> Value:
    return call(MaxPool((2, 2), (2, 2), (0,) * 4, (1, 1)), x)


def placed(graph: Graph, rng: np.random.Generator) -> Graph:
    """Run the pass on kernels, and plan and check the memory of what it makes."""
    done = check(PlaceConcats(), Fuse().run(graph, TARGET), rng)
    check_plan(done, plan_memory(done, TARGET))
    return done


def joints(graph: Graph) -> int:
    return sum(isinstance(node.op, Concat) for node in graph.nodes)


def fire(rng: np.random.Generator) -> Graph:
    x = branch(rng, image(1, 4, 4, 4), 4, "squeeze")
    parts = (branch(rng, x, 8, "expand1x1"), branch(rng, x, 4, "expand3x3"))
    return graph_of(pooled(call(Concat(1), *parts, loc=["join"])))


def test_golden(rng, golden):
    golden("place_concats", print_graph(placed(fire(rng), rng)))


def test_parts_lie_in_the_whole(rng):
    graph = placed(fire(rng), rng)
    plan = plan_memory(graph, TARGET)
    (joint,) = [node for node in graph.nodes if isinstance(node.op, Concat)]
    first, second = (plan.offsets[part] for part in joint.inputs)
    assert plan.offsets[joint.values[0]] == first
    assert second == first + 8 * 16 * 4
    assert plan.size == (4 + 12) * 16 * 4


def test_joints_of_joints(rng):
    x = branch(rng, image(1, 4, 4, 4), 4)
    inner = call(Concat(1), branch(rng, x, 4), branch(rng, x, 8))
    whole = call(Concat(1), branch(rng, x, 4), inner, branch(rng, x, 4))
    graph = placed(graph_of(pooled(whole)), rng)
    plan = plan_memory(graph, TARGET)
    outer = next(node for node in graph.nodes if isinstance(node.op, Concat) and len(node.inputs) == 3)
    starts = [plan.offsets[part] - plan.offsets[outer.values[0]] for part in outer.inputs]
    assert starts == [0, 256, 256 + 768]
    assert joints(graph) == 2


def test_blocks_of_channels(rng):
    block = Layout("NCHW8c")
    parts = [call(LayoutTransform(block), call(Exp(), image(1, c, 3, 4, label=f"x{c}"))) for c in (8, 16, 5)]
    assert joints(placed(graph_of(pooled(call(Concat(1), *parts))), rng)) == 1


def test_a_part_may_be_read_by_others_too(rng):
    x = branch(rng, image(1, 4, 4, 4), 4)
    part = branch(rng, x, 8)
    whole = call(Concat(1), part, branch(rng, x, 4))
    assert joints(placed(graph_of(pooled(whole), pooled(part)), rng)) == 1


CASES = {
    "a batch comes before the axis": lambda rng: call(
        Concat(1), branch(rng, image(2, 4, 4, 4), 4), branch(rng, image(2, 4, 4, 4, label="z"), 4)
    ),
    "another axis": lambda rng: call(
        Concat(2), branch(rng, image(1, 4, 4, 4), 4), branch(rng, image(1, 4, 4, 4, label="z"), 4)
    ),
    "a graph input": lambda rng: call(Concat(1), branch(rng, image(1, 4, 4, 4), 4), image(1, 4, 4, 4, label="z")),
    "a constant": lambda rng: call(Concat(1), branch(rng, image(1, 4, 4, 4), 4), weights(rng, 1, 4, 4, 4)),
    "an address that is not aligned": lambda rng: call(
        Concat(1), branch(rng, image(1, 4, 4, 3), 3), branch(rng, image(1, 4, 4, 3, label="z"), 4)
    ),
    "one value twice": lambda rng: call(Concat(1), *[branch(rng, image(1, 4, 4, 4), 4)] * 2),
    "a view": lambda rng: call(
        Concat(1),
        call(Reshape((1, 4, 4, 4)), branch(rng, image(1, 4, 16, 1), 4)),
        branch(rng, image(1, 4, 4, 4, label="z"), 4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_needs_a_kernel(rng, name):
    assert joints(placed(graph_of(pooled(CASES[name](rng))), rng)) == 0


def test_outputs_are_in_the_callers_memory(rng):
    x = branch(rng, image(1, 4, 4, 4), 4)
    part = branch(rng, x, 4)
    whole = call(Concat(1), part, branch(rng, x, 4))
    assert joints(placed(graph_of(whole), rng)) == 0
    assert joints(placed(graph_of(pooled(whole), part), rng)) == 0


def test_one_of_two_concatenations_has_a_part_to_itself(rng):
    x = branch(rng, image(1, 4, 4, 4), 4)
    shared, first, second = (branch(rng, x, 4) for _ in range(3))
    wholes = call(Concat(1), shared, first), call(Concat(1), second, shared)
    assert joints(placed(graph_of(*map(pooled, wholes)), rng)) == 1


def test_the_checker_refuses_parts_out_of_place(rng):
    graph = placed(fire(rng), rng)
    plan = plan_memory(graph, TARGET)
    (joint,) = [node for node in graph.nodes if isinstance(node.op, Concat)]
    moved = {**plan.offsets, joint.inputs[1]: plan.size}
    with pytest.raises(VerifyError, match="does not lie where it belongs"):
        check_plan(graph, MemoryPlan(moved, plan.size + 256))
    overwritten = {**plan.offsets, joint.inputs[0].node.inputs[0]: plan.offsets[joint.inputs[0]]}
    with pytest.raises(VerifyError, match="memory plan"):
        check_plan(graph, MemoryPlan(overwritten, plan.size))


@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_networks_equal_the_interpreter(rng, threads):
    """Two modules in a row, whose concatenations are read by convolutions, a pool and each other, in blocks of 8."""
    x = image(1, 16, 12, 12)
    y = x
    for channels in (16, 48):
        parts = [branch(rng, y, c) for c in (channels, 16, 32)]
        whole = call(Concat(1), *parts)
        y = call(Concat(1), branch(rng, whole, 16), call(MaxPool((3, 3), (1, 1), (1,) * 4, (1, 1)), whole))
    graph = graph_of(branch(rng, y, 10))
    data = rng.standard_normal((1, 16, 12, 12)).astype(np.float32)
    (wanted,) = evaluate(graph, {graph.input_names[0]: data}, precise=True).values()
    module = cnnc.compile(graph, target="cpu:x86-64-v3", threads=threads, cache=False)
    (got,) = module.run({graph.input_names[0]: data}).values()
    assert np.linalg.norm(got - wanted) <= 2e-6 * np.linalg.norm(wanted)
    assert not any("concat" in kernel.symbol for kernel in module.kernels)
