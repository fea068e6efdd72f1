"""The rewrite driver: to the end, with types kept, locations united, and a log of what fired and nearly did."""

from __future__ import annotations

import pytest

from cnnc.errors import VerifyError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.rewrite import RewriteLog, map_graph, miss, rebuild, recording, rewrite, sole_use
from cnnc.ops import Abs, Add, Exp, Log, Neg, Relu, Reshape, Split, Tanh, graph_input

X = graph_input("x", (2, 3))


def graph_of(*outputs: Value) -> Graph:
    return Graph("g", (X,), outputs)


def names(graph: Graph) -> list[str]:
    return [n.op.name for n in graph.nodes if n.inputs]


def log_of_exp(v: Value) -> Value | None:
    """log(exp(x)) -> x."""
    match v.node:
        case Node(Log(), (Value(Node(Exp(), (x,))) as inner,)):
            if not sole_use(inner):
                miss("exp has other readers")
                return None
            return x
    return None


def abs_to_relus(v: Value) -> Value | None:
    """abs(x) -> relu(x) + relu(-x)."""
    match v.node:
        case Node(Abs(), (x,)):
            return call(Add(), call(Relu(), x), call(Relu(), call(Neg(), x)))
    return None


def test_to_the_end():
    y = call(Log(), call(Log(), call(Exp(), call(Exp(), X))))
    assert names(rewrite(graph_of(y), [log_of_exp])) == []


def test_a_graph_no_rule_touches_is_the_same_nodes():
    graph = graph_of(call(Relu(), X))
    assert rewrite(graph, [log_of_exp]).nodes == graph.nodes


def test_rules_see_what_other_rules_made():
    y = call(Log(), call(Exp(), call(Abs(), X)))
    assert names(rewrite(graph_of(y), [log_of_exp, abs_to_relus])) == ["relu", "neg", "relu", "add"]


def test_locations_of_all_that_was_replaced():
    inner = call(Exp(), call(Tanh(), X, loc=["tanh"]), loc=["exp"])
    y = call(Relu(), call(Abs(), call(Log(), inner, loc=["log"]), loc=["abs"]), loc=["relu"])
    done = rewrite(graph_of(y), [log_of_exp, abs_to_relus])
    assert {n.op.name: set(n.loc) for n in done.nodes if n.op.name in ("add", "neg", "tanh")} == {
        "tanh": {"tanh"},
        "neg": {"abs"},
        "add": {"abs"},
    }


def exp_of_tanh_is_relu(v: Value) -> Value | None:
    """exp(tanh(x)) -> relu(x), which is wrong but has the shape of a fusion."""
    match v.node:
        case Node(Exp(), (Value(Node(Tanh(), (x,))),)):
            return call(Relu(), x)
    return None


def test_locations_of_what_dies_with_the_root():
    tanh = call(Tanh(), X, loc=["tanh"])
    alone = rewrite(graph_of(call(Exp(), tanh, loc=["exp"])), [exp_of_tanh_is_relu])
    assert alone.outputs[0].node.loc == {"exp", "tanh"}
    shared = rewrite(graph_of(call(Exp(), tanh, loc=["exp"]), tanh), [exp_of_tanh_is_relu])
    assert shared.outputs[0].node.loc == {"exp"}


def test_the_log_tells_what_fired():
    log = RewriteLog()
    rewrite(graph_of(call(Log(), call(Exp(), X), loc=["here"])), [log_of_exp], log)
    (fired,) = log.fired
    assert (fired.rule, fired.loc) == ("log_of_exp", {"here"})
    assert "log" in fired.before
    assert "input" in fired.after


def test_the_log_tells_near_misses_once():
    exp = call(Exp(), X)
    graph = graph_of(call(Abs(), call(Log(), exp, loc=["here"])), exp)
    log = RewriteLog()
    with recording(log):
        rewrite(graph, [log_of_exp, abs_to_relus])
        rewrite(graph, [abs_to_relus])
    assert [(m.rule, m.reason, set(m.loc)) for m in log.missed] == [("log_of_exp", "exp has other readers", {"here"})]
    assert [f.rule for f in log.fired] == ["abs_to_relus"] * 2


def test_outputs_count_as_readers():
    exp = call(Exp(), X)
    assert names(rewrite(graph_of(call(Log(), exp), exp), [log_of_exp])) == ["exp", "log"]


def test_readers_of_what_was_merged_count_together():
    """Both logs read exp(x) once the reshape that keeps the shape is gone."""
    exp = call(Exp(), X)

    def drop_reshape(v: Value) -> Value | None:
        """reshape(x) -> x."""
        return v.inputs[0] if isinstance(v.op, Reshape) and v.inputs[0].type == v.type else None

    graph = graph_of(call(Log(), call(Reshape((2, 3)), exp)), call(Log(), call(Reshape((2, 3)), exp)))
    assert names(rewrite(graph, [drop_reshape, log_of_exp])) == ["exp", "log", "log"]


def test_a_rule_that_changes_the_type_is_our_bug():
    def shrink(v: Value) -> Value | None:
        """relu(x) -> reshape(x)."""
        return call(Reshape((6,)), v.inputs[0]) if isinstance(v.op, Relu) else None

    with pytest.raises(VerifyError, match=r"rule shrink changes f32\[2,3\] to f32\[6\]"):
        rewrite(graph_of(call(Relu(), X)), [shrink])


def test_rules_without_end_are_our_bug():
    def round_and_round(v: Value) -> Value | None:
        """neg(x) -> neg(neg(neg(x)))."""
        match v.node:
            case Node(Neg(), (x,)) if x.op.name == "input":
                return call(Neg(), call(Neg(), call(Neg(), x)))
        return None

    with pytest.raises(VerifyError, match="does not end after 50 sweeps; last rules: round_and_round"):
        rewrite(graph_of(call(Neg(), X)), [round_and_round])


def test_one_output_of_several():
    first, second = call(Split(1, (1, 2)), X).node.values
    done = rewrite(graph_of(call(Log(), call(Exp(), second)), first), [log_of_exp])
    assert names(done) == ["split"]
    assert done.outputs[0].index == 1


def test_map_graph_shares_what_stays():
    y = call(Relu(), call(Exp(), X))

    def relu_to_neg(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        return (call(Neg(), *inputs),) if isinstance(node.op, Relu) else rebuild(node, inputs)

    done = map_graph(graph_of(y), relu_to_neg)
    assert names(done) == ["exp", "neg"]
    assert done.outputs[0].inputs[0] == y.inputs[0]
