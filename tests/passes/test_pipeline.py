"""The pipeline: levels, the text form of pass lists, dumps, times, the log."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from cnnc.errors import UsageError, VerifyError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.rewrite import RewriteLog
from cnnc.ir.text import print_graph
from cnnc.ops import Add, Dense, Fused, MaxPool, Pad, Relu, Reshape, Schedule
from cnnc.options import LEVELS
from cnnc.passes import registry
from cnnc.passes.assign_layouts import AssignLayouts
from cnnc.passes.check_plan import check_plan
from cnnc.passes.fuse import Fuse
from cnnc.passes.pipeline import pipeline, run_pipeline
from cnnc.passes.plan_memory import plan_memory
from cnnc.passes.registry import PASSES, Pass, parse_passes, print_passes
from cnnc.passes.tile import Tile
from cnnc.target import Target
from tests.passes.graphs import TARGET, assert_same_numbers, batch_norm, conv, graph_of, image, operators, weights


class Anything:
    """A template that takes every kernel."""

    name = "anything"

    def matches(self, kernel: Fused, target: Target) -> bool:
        return True

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        return [Schedule(self.name)]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        return 1.0


def network(rng) -> Graph:
    x = image(1, 3, 20, 20)
    y = call(Relu(), batch_norm(rng, conv(call(Pad((0, 0, 1, 1, 0, 0, 1, 1)), x), weights(rng, 16, 3, 3, 3))))
    y = call(Relu(), call(Add(), batch_norm(rng, conv(y, weights(rng, 16, 16, 3, 3), pad=1)), y))
    y = call(MaxPool((2, 2), (2, 2), (0,) * 4, (1, 1)), y)
    return graph_of(call(Dense(), call(Reshape((1, 1600)), y), weights(rng, 10, 1600), weights(rng, 10)))


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_keeps_the_numbers_and_plans(rng, level):
    graph = network(rng)
    done = run_pipeline(graph, TARGET, pipeline(level, [Anything()]))
    assert_same_numbers(graph, done, rng)
    assert all(n.op.schedule for n in done.nodes if isinstance(n.op, Fused))
    check_plan(done, plan_memory(done, TARGET))
    again = run_pipeline(done, TARGET, pipeline(level, [Anything()]))
    assert print_graph(again) == print_graph(done)


def test_golden(rng, golden):
    golden("pipeline", print_graph(run_pipeline(network(rng), TARGET, pipeline(3, [Anything()]))))


def test_levels_do_more_and_more(rng):
    counts = [len(operators(run_pipeline(network(rng), TARGET, pipeline(level, [Anything()])))) for level in LEVELS]
    assert counts[0] > counts[1]
    assert operators(run_pipeline(network(rng), TARGET, pipeline(3, [Anything()])))[:2] == [
        "conv+relu",
        "conv+add+relu",
    ]


def test_unknown_levels():
    with pytest.raises(UsageError, match="optimisation level 4 does not exist; use one of 0, 1, 2, 3"):
        pipeline(4)


def test_lists_print_and_parse_back():
    text = "simplify,fold_constants{limit=64},assign_layouts{block=16},fuse{grow=False,most=8},tile"
    passes = parse_passes(text)
    assert passes[2] == AssignLayouts(block=16)
    assert passes[3] == Fuse(grow=False, most=8)
    assert print_passes(passes) == text
    assert parse_passes(" fuse { most = 32 } , cse ,simplify") == parse_passes("fuse,cse,simplify")
    assert parse_passes("") == ()


def test_every_pass_prints_and_parses_back():
    for level in LEVELS:
        passes = pipeline(level)
        assert [p.name for p in parse_passes(print_passes(passes))] == [p.name for p in passes]


def test_every_file_of_a_pass_has_its_name():
    own = {name: cls for name, cls in PASSES.items() if cls.__module__.startswith("cnnc.passes.")}
    assert own
    assert all(cls.__module__ == f"cnnc.passes.{name}" for name, cls in own.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fuze", "there is no pass 'fuze'; did you mean fuse?"),
        ("fuse{blok=1}", "pass fuse has no option 'blok' .it has grow, most."),
        ("cse{x=1}", "pass cse has no option 'x' .it has none."),
        ("fuse{most=True}", "pass fuse: most=True is no int"),
        ("fuse{most=1.5}", "pass fuse: most=1.5 is no int"),
        ("fuse{most}", "options of pass fuse"),
        ("fuse{most=1", "cannot be read"),
        ("tile{templates=[]}", "pass tile has no option 'templates'"),
        ("fuse;cse", "cannot be read"),
    ],
)
def test_mistakes_in_lists(text, message):
    with pytest.raises(UsageError, match=message):
        parse_passes(text)


def test_what_has_no_text_is_handed_in():
    template = Anything()
    (tile,) = pipeline(3, [template], "tile")
    assert isinstance(tile, Tile)
    assert tile.templates == (template,)


def test_dumps_only_what_changed(rng, tmp_path):
    passes = parse_passes("cse,fold_batch_norm,fold_batch_norm,fuse")
    folder = tmp_path / "ir"
    run_pipeline(network(rng), TARGET, passes, dump_dir=folder)
    assert sorted(p.name for p in folder.iterdir()) == ["00-import.txt", "02-fold_batch_norm.txt", "04-fuse.txt"]
    assert "batch_norm" in (folder / "00-import.txt").read_text()


def test_times_and_log(rng):
    timings: list[tuple[str, float]] = []
    log = RewriteLog()
    run_pipeline(network(rng), TARGET, parse_passes("fold_batch_norm,fold_pad,cse"), timings=timings, log=log)
    assert [name for name, _ in timings] == ["fold_batch_norm", "fold_pad", "cse"]
    assert all(seconds >= 0 for _, seconds in timings)
    assert [f.rule for f in log.fired] == ["fold_batch_norm", "fold_batch_norm", "fold_pad_into_conv"]


@pytest.fixture
def broken():
    class Breaks(Pass):
        """A pass that gives a type that inference does not."""

        def run(self, graph: Graph, target: Target) -> Graph:
            (value,) = graph.outputs
            wrong = Node(value.op, value.inputs, (value.type.with_shape((7,)),), frozenset(["here"]))
            return Graph(graph.name, graph.inputs, (Value(wrong),))

    yield Breaks()
    del registry.PASSES["breaks"]


def test_the_verifier_runs_after_each_pass(rng, broken):
    with pytest.raises(VerifyError, match=r"dense: has types \(f32\[7\]\), .* after breaks"):
        run_pipeline(network(rng), TARGET, [broken])
    run_pipeline(network(rng), TARGET, [broken], verify_each=False)


@pytest.mark.parametrize("level", LEVELS)
def test_a_gpu_gets_plain_layouts_and_direct_convolutions(rng, level):
    graph = network(rng)
    done = run_pipeline(graph, Target.parse("cuda:sm_90"), pipeline(level, [Anything()]))
    assert_same_numbers(graph, done, rng)
    bodies = [n.op.body for n in done.nodes if isinstance(n.op, Fused)]
    nodes = [node for body in (done, *bodies) for node in body.nodes]
    assert all(type_.layout is None for node in nodes for type_ in node.types)
    assert all(node.op.algorithm == "direct" for node in nodes if node.op.name == "conv")
    if level > 0:
        assert any(len([n for n in body.nodes if n.inputs]) > 1 for body in bodies)
