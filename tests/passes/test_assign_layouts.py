"""assign_layouts: what is blocked, what stays plain, and that no transform is paid twice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.layout import Layout
from cnnc.ir.text import print_graph
from cnnc.ir.types import Dim, DType
from cnnc.ops import (
    Add,
    AveragePool,
    Concat,
    Constant,
    Conv,
    Dense,
    LayoutTransform,
    Lrn,
    MaxPool,
    Mul,
    ReduceMean,
    Relu,
    Reshape,
    Sigmoid,
    Softmax,
    Transpose,
    constant,
    graph_input,
)
from cnnc.passes import assign_layouts, layout_cut
from cnnc.passes.assign_layouts import AssignLayouts
from cnnc.passes.fuse import Fuse
from cnnc.target import Target
from tests.passes.graphs import TARGET, batch_norm, check, conv, graph_of, image, operators, weights

ASSIGN = AssignLayouts()
BLOCKED = Layout("NCHW8c")


def layouts(graph: Graph, name: str) -> list[str]:
    """Give the output layouts of all operators of a name."""
    return [str(n.types[0].layout) for n in graph.nodes if n.op.name == name]


def transforms(graph: Graph) -> int:
    return operators(graph).count("layout_transform")


def body(rng: np.random.Generator, x: Value) -> Value:
    """Build a residual block of 16 channels, large enough for blocks to be worth it."""
    y = call(Relu(), conv(x, weights(rng, 16, 16, 3, 3), weights(rng, 16), pad=1))
    return call(Relu(), call(Add(), conv(y, weights(rng, 16, 16, 3, 3), pad=1), x))


def test_golden(rng, golden):
    x = image(1, 3, 16, 16)
    y = call(MaxPool((2, 2), (2, 2), (0,) * 4, (1, 1)), call(Relu(), conv(x, weights(rng, 16, 3, 3, 3), pad=1)))
    y = body(rng, y)
    gate = call(Sigmoid(), conv(call(ReduceMean((2, 3)), y), weights(rng, 16, 16, 1, 1)))
    y = call(Mul(), call(Mul(), y, gate), weights(rng, 16, 1, 1))
    y = call(Dense(), call(Reshape((1, 16)), call(ReduceMean((2, 3)), y)), weights(rng, 10, 16))
    graph = graph_of(y)
    done = check(ASSIGN, graph, rng)
    golden("assign_layouts", print_graph(graph) + print_graph(done))
    assert set(layouts(done, "conv") + layouts(done, "mul") + layouts(done, "max_pool")) == {"NCHW8c"}
    assert transforms(done) == 1, "only the result of global pooling changes, and that is a view"


def test_a_first_layer_of_few_channels_reads_plain(rng):
    done = check(ASSIGN, graph_of(conv(image(1, 3, 32, 32), weights(rng, 16, 3, 3, 3))), rng)
    (node,) = (n for n in done.nodes if n.op.name == "conv")
    assert [str(v.type.layout) for v in node.inputs] == ["None", "OIHW8o"]
    assert transforms(done) == 1


def test_a_first_layer_of_many_channels_is_transformed(rng):
    done = check(ASSIGN, graph_of(conv(image(1, 24, 32, 32), weights(rng, 20, 24, 3, 3))), rng)
    (node,) = (n for n in done.nodes if n.op.name == "conv")
    assert [str(v.type.layout) for v in node.inputs] == ["NCHW8c", "OIHW8i8o"]
    assert transforms(done) == 2


def test_few_channels_are_taken_as_they_come(rng):
    squeezed = conv(
        call(ReduceMean((2, 3)), conv(image(1, 16, 32, 32), weights(rng, 16, 16, 3, 3))), weights(rng, 4, 16, 1, 1)
    )
    done = check(ASSIGN, graph_of(call(Sigmoid(), conv(call(Relu(), squeezed), weights(rng, 16, 4, 1, 1)))), rng)
    *_, last = (n for n in done.nodes if n.op.name == "conv")
    assert [str(v.type.layout) for v in last.inputs] == ["NCHW8c", "OIHW8i8o"]
    large = conv(conv(image(1, 3, 64, 64), weights(rng, 2, 3, 3, 3)), weights(rng, 32, 2, 9, 9))
    *_, last = (n for n in check(ASSIGN, graph_of(large), rng).nodes if n.op.name == "conv")
    assert [str(v.type.layout) for v in last.inputs] == ["None", "OIHW8o"]


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "layout"),
    [
        (16, 16, 16, "OIHW8o"),
        (13, 13, 13, "OIHW8o"),
        (32, 32, 8, "OIHW8o"),
        (32, 64, 2, "OIHW8i8o"),
        (16, 32, 16, "None"),
        (24, 24, 2, "None"),
        (48, 48, 4, "None"),
    ],
)
def test_groups(rng, channels, outputs, groups, layout):
    y = conv(image(1, channels, 32, 32), weights(rng, outputs, channels // groups, 3, 3), groups=groups)
    done = check(ASSIGN, graph_of(y), rng)
    assert [str(n.types[0].layout) for n in done.nodes if n.types[0].rank == 4 and n.op.name == "constant"] == [layout]


def test_one_transform_for_many_readers(rng):
    x = image(1, 16, 32, 32)
    branches = [conv(x, weights(rng, 16, 16, 1, 1)) for _ in range(3)]
    done = check(ASSIGN, graph_of(call(Concat(1), *branches)), rng)
    assert transforms(done) == 2
    assert layouts(done, "concat") == ["NCHW8c"]


def test_a_concat_that_would_cut_blocks_is_plain(rng):
    x = image(1, 16, 32, 32)
    branches = [conv(x, weights(rng, c, 16, 1, 1)) for c in (12, 16)]
    done = check(ASSIGN, graph_of(call(Relu(), call(Concat(1), *branches))), rng)
    assert layouts(done, "concat") == ["None"]
    assert layouts(done, "conv") == ["NCHW8c"] * 2


def test_constants_are_declared_blocked_not_transformed(rng):
    y = conv(image(1, 16, 32, 32), weights(rng, 20, 16, 3, 3))
    y = call(Add(), call(Mul(), y, weights(rng, 20, 1, 1, label="k")), constant(0.5))
    y = call(Mul(), y, weights(rng, 1, 1, 30, 30))
    done = check(ASSIGN, graph_of(y), rng)
    (k,) = (n for n in done.nodes if isinstance(n.op, Constant) and n.op.label == "k")
    assert str(k.types[0]) == "f32[1,20,1,1] NCHW8c"
    assert transforms(done) == 2


@pytest.mark.parametrize(
    "tail", [lambda y: call(Lrn(5), y), lambda y: call(AveragePool((2, 2), (1, 1), (0,) * 4, (1, 1)), y)]
)
def test_operators_that_take_blocks_follow(rng, tail):
    done = check(ASSIGN, graph_of(tail(conv(image(1, 16, 32, 32), weights(rng, 20, 16, 3, 3)))), rng)
    assert transforms(done) == 2
    assert done.outputs[0].inputs[0].type.layout == BLOCKED


@pytest.mark.parametrize("tail", [lambda y: call(Softmax(1), y), lambda y: call(Transpose((0, 2, 3, 1)), y)])
def test_operators_that_do_not_get_plain(rng, tail):
    done = check(ASSIGN, graph_of(tail(conv(image(1, 16, 32, 32), weights(rng, 20, 16, 3, 3)))), rng)
    assert done.outputs[0].inputs[0].type.layout is None


def test_batch_norm_keeps_its_vectors_plain(rng):
    done = check(ASSIGN, graph_of(batch_norm(rng, conv(image(1, 16, 32, 32), weights(rng, 20, 16, 3, 3)))), rng)
    assert layouts(done, "batch_norm") == ["NCHW8c"]


def test_broadcast_over_channels(rng):
    y = conv(image(1, 16, 32, 32), weights(rng, 20, 16, 3, 3))
    mask = image(1, 1, 30, 30, label="mask")
    done = check(ASSIGN, graph_of(call(Mul(), y, mask)), rng)
    assert layouts(done, "mul") == ["NCHW8c"]
    assert transforms(done) == 2


@pytest.mark.parametrize("dtype", [DType.F64, DType.F16])
def test_other_element_types_stay_plain(rng, dtype):
    x = graph_input("x", (1, 16, 8, 8), dtype)
    w = constant(rng.standard_normal((16, 16, 3, 3)).astype(dtype.numpy))
    assert transforms(check(ASSIGN, graph_of(conv(x, w)), rng)) == 0


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_stay_plain(rng, rank):
    graph = graph_of(conv(image(1, 16, *(8,) * rank), weights(rng, 16, 16, *(3,) * rank)))
    assert transforms(check(ASSIGN, graph, rng)) == 0


def test_a_graph_without_convolutions_stays(rng):
    graph = graph_of(call(MaxPool((2, 2), (2, 2), (0,) * 4, (1, 1)), image(1, 16, 64, 64)))
    assert print_graph(check(ASSIGN, graph, rng)) == print_graph(graph)


def test_kernels_stay(rng):
    graph = Fuse().run(graph_of(conv(image(1, 16, 32, 32), weights(rng, 16, 16, 3, 3))), TARGET)
    assert ASSIGN.run(graph, TARGET) is graph


def test_run_time_batch(rng):
    x = graph_input("x", (Dim.symbol("n", 4), 16, 32, 32))
    done = ASSIGN.run(graph_of(call(Relu(), conv(x, weights(rng, 16, 16, 3, 3)))), TARGET)
    assert layouts(done, "relu") == ["NCHW8c"]


def test_the_block_is_an_option(rng):
    graph = graph_of(conv(image(1, 16, 32, 32), weights(rng, 16, 16, 3, 3)))
    assert layouts(check(AssignLayouts(block=4), graph, rng), "conv") == ["NCHW4c"]
    assert print_graph(AssignLayouts(block=1).run(graph, TARGET)) == print_graph(graph)


def zigzag(rng: np.random.Generator, kinds: str) -> Graph:
    """Build a chain of what can be blocked (c a convolution, r a relu and a sum) and what cannot (t a transpose)."""
    y: Value = image(1, 8, 8, 8)
    for kind in kinds:
        if kind == "c":
            y = conv(y, weights(rng, 8, 8, 1, 1))
        elif kind == "t":
            y = call(Transpose((0, 1, 3, 2)), y)
        else:
            y = call(Add(), y, call(Relu(), y))
    return graph_of(y)


def seconds(graph: Graph, blocked: set[Node], wanted: assign_layouts.Wanted, block: int) -> float:
    """Add up the costs of an assignment, plainly."""
    total = sum(assign_layouts._node_cost(n, assign_layouts.Form(block), blocked=n in blocked) for n in wanted)
    for value, users in graph.users.items():
        if isinstance(value.op, Constant) or value.type.rank != 4:
            continue
        made = value.node in blocked
        read = {u in blocked for u in users} | ({False} if value in graph.outputs else set())
        total += assign_layouts._transform_cost(value, assign_layouts.Form(block)) * ((not made) in read)
    return total


@pytest.mark.parametrize("agreed", [True, False])
@pytest.mark.parametrize("kinds", ["crtrc", "trcrt", "rrcrr", "ctctc", "rtrtcr"])
def test_the_cut_is_the_cheapest_of_all_assignments(rng, kinds, agreed, monkeypatch):
    """With what neighbours agree on beforehand, and without."""
    if not agreed:
        monkeypatch.setattr(layout_cut, "_agreed", lambda gain, edges, label: {})
    graph = zigzag(rng, kinds)
    wanted = {n: w for n in graph.nodes if (w := assign_layouts.wanted_layouts(n, assign_layouts.Form(8))) is not None}
    choices = [
        {n for n, chosen in zip(wanted, bits, strict=True) if chosen}
        for bits in itertools.product((False, True), repeat=len(wanted))
    ]
    cut = assign_layouts._minimum_cut(graph, wanted, assign_layouts.Form(8))
    best = min(seconds(graph, choice, wanted, 8) for choice in choices)
    assert seconds(graph, cut, wanted, 8) == pytest.approx(best, rel=1e-6)
    check(ASSIGN, graph, rng)


def test_where_all_gain_by_blocks_nothing_is_cut(rng, monkeypatch):
    def cut(*_: object) -> None:
        raise AssertionError("there is nothing to decide")

    monkeypatch.setattr(layout_cut, "_network", cut)
    y = conv(image(1, 16, 32, 32), weights(rng, 16, 16, 3, 3, label="w0"))
    for block in range(3):
        y = call(Relu(), call(Add(), y, conv(call(Relu(), y), weights(rng, 16, 16, 1, 1, label=f"w{block + 1}"))))
    done = check(ASSIGN, graph_of(conv(y, weights(rng, 16, 16, 3, 3, label="last"))), rng)
    assert layouts(done, "add") == ["NCHW8c"] * 3
    assert transforms(done) == 2


def test_a_transform_is_made_once(rng):
    y = conv(image(1, 16, 32, 32), weights(rng, 16, 16, 3, 3))
    done = check(ASSIGN, graph_of(call(Softmax(1), y), call(Softmax(2), y), call(Relu(), y)), rng)
    made = [n for n in done.nodes if isinstance(n.op, LayoutTransform)]
    assert len({(n.inputs, n.op) for n in made}) == len(made)


TENSOR_CORES = AssignLayouts(block=8, tensor_cores=True)
GPU = Target.parse("cuda:sm_80")


def test_tensor_cores_read_every_image_in_blocks(rng):
    """Few channels too, since those that are missing cost less than ordinary cores; weights lie as tiles do."""
    x = image(1, 3, 12, 12)
    y = call(Relu(), conv(x, weights(rng, 12, 3, 3, 3), weights(rng, 12), stride=2))
    y = call(Add(), conv(y, weights(rng, 12, 1, 3, 3), pad=1, groups=12), y)
    done = check(TENSOR_CORES, graph_of(conv(y, weights(rng, 9, 12, 1, 1))), rng, GPU)
    found = [[str(v.type.layout) for v in n.inputs[:2]] for n in done.nodes if isinstance(n.op, Conv)]
    assert found == [["NCHW8c", "HWIO8i"], ["NCHW8c", "OIHW8o"], ["NCHW8c", "HWIO8i"]]
    assert operators(done) == ["layout_transform", "conv", "relu", "conv", "add", "conv", "layout_transform"]


class ReadsFewChannels:
    """A back end's template that is better at images of up to `most` channels."""

    def __init__(self, most: int) -> None:
        self.most = most

    def prefers_plain(self, node: Node, block: int, target: Target) -> bool:
        assert (block, target) == (8, GPU)
        return node.inputs[0].type.static_shape[1] <= self.most


@pytest.mark.parametrize("most", [2, 3, 99])
def test_a_template_may_read_a_plain_image_beside_tensor_cores(rng, most):
    """But not one that comes from a convolution in blocks."""
    y = call(Relu(), conv(image(1, 3, 24, 24), weights(rng, 16, 3, 3, 3), weights(rng, 16), stride=2))
    graph = graph_of(conv(y, weights(rng, 16, 16, 3, 3)))
    done = check(AssignLayouts(block=8, tensor_cores=True, templates=(ReadsFewChannels(most),)), graph, rng, GPU)
    found = [[str(v.type.layout) for v in n.inputs[:2]] for n in done.nodes if isinstance(n.op, Conv)]
    assert found == [["NCHW8c", "HWIO8i"] if most < 3 else ["None", "OIHW8o"], ["NCHW8c", "HWIO8i"]]
    assert transforms(done) == (2 if most < 3 else 1)


def test_blocks_for_tensor_cores_are_for_gpus_and_others_for_cpus(rng):
    graph = graph_of(conv(image(1, 16, 12, 12), weights(rng, 16, 16, 3, 3)))
    for step, target in ((TENSOR_CORES, TARGET), (AssignLayouts(block=8), GPU), (AssignLayouts(), GPU)):
        assert print_graph(check(step, graph, rng, target)) == print_graph(graph)
