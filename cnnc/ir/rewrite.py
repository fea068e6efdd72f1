"""The rewrite driver: applies rules to a graph until none fires, keeps types and locations, records what fired."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from cnnc.errors import VerifyError
from cnnc.ir.build import call, located
from cnnc.ir.graph import Graph, Node, Value

Rule: TypeAlias = Callable[[Value], Value | None]
"""Its docstring is its equation, its body one `match`; None where it does not apply.

The replacement must have the very type of the value it replaces.
"""

MAX_SWEEPS = 50
_CONE_DEPTH = 8


@dataclass(frozen=True)
class Firing:
    """One application of a rule."""

    rule: str
    before: str
    after: str
    loc: frozenset[str]


@dataclass(frozen=True)
class NearMiss:
    """A place where a rule nearly applied, and what was in the way."""

    rule: str
    reason: str
    loc: frozenset[str]


@dataclass
class RewriteLog:
    """What happened in a rewrite; `--why RULE` prints it."""

    fired: list[Firing] = field(default_factory=list)
    missed: list[NearMiss] = field(default_factory=list)


_log: ContextVar[RewriteLog | None] = ContextVar("log", default=None)


@contextmanager
def recording(log: RewriteLog) -> Iterator[RewriteLog]:
    """Collect here what every rewrite inside does."""
    token = _log.set(log)
    try:
        yield log
    finally:
        _log.reset(token)


def record(rule: str, before: Value, after: Value) -> None:
    """Note a replacement that a pass made without the rewrite driver."""
    log = _log.get()
    if log is not None:
        log.fired.append(Firing(rule, repr(before), repr(after), before.node.loc | after.node.loc))


def record_miss(rule: str, reason: str, loc: frozenset[str]) -> None:
    """Note a place where a pass nearly made a replacement without the rewrite driver, and what was in the way."""
    log = _log.get()
    if log is not None:
        log.missed.append(NearMiss(rule, reason, loc))


@dataclass
class _State:
    uses: dict[Value, int]
    log: RewriteLog
    rule: str = ""
    loc: frozenset[str] = frozenset()


_state: ContextVar[_State | None] = ContextVar("rewrite", default=None)


def sole_use(value: Value) -> bool:
    """Whether the value being looked at is read once: a rule asks before it would double work."""
    state = _state.get()
    return state is None or state.uses.get(value, 1) <= 1


def miss(reason: str) -> None:
    """Record that the running rule nearly applied, and what was in the way."""
    state = _state.get()
    if state is not None:
        state.log.missed.append(NearMiss(state.rule, reason, state.loc))


def rewrite(graph: Graph, rules: Sequence[Rule], log: RewriteLog | None = None) -> Graph:
    """Apply rules everywhere until none fires.

    Nodes are visited inputs first, so a rule sees inputs already rewritten.  `log` defaults to that of `recording`.
    Raises `VerifyError` where a rule changes a type or the rules do not come to an end.
    """
    log = log or _log.get() or RewriteLog()
    missed_before = len(log.missed)
    for _ in range(MAX_SWEEPS):
        before = len(log.fired)
        graph = _sweep(graph, rules, log)
        if len(log.fired) == before:
            return graph
        del log.missed[missed_before:]
    last = ", ".join(sorted({f.rule for f in log.fired[-20:]}))
    raise VerifyError(f"rewriting {graph.name} does not end after {MAX_SWEEPS} sweeps; last rules: {last}")


def map_graph(graph: Graph, transform: Callable[[Node, tuple[Value, ...]], Sequence[Value]]) -> Graph:
    """Rebuild a graph node by node, inputs first; `transform(node, new inputs)` gives the new outputs.

    Use `rebuild` inside for the nodes that stay as they are.
    """
    new: dict[Value, Value] = {}
    for node in graph.nodes:
        results = transform(node, tuple(new[v] for v in node.inputs))
        new.update(zip(node.values, results, strict=True))
    return substitute(graph, new)


def rebuild(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
    """Give the outputs of a node with other inputs (the node itself where they are the same)."""
    if inputs == node.inputs:
        return node.values
    return call(node.op, *inputs, loc=node.loc).node.values


def substitute(graph: Graph, new: Mapping[Value, Value]) -> Graph:
    """Give the graph whose inputs and outputs are the images of the old ones."""
    inputs = tuple(new.get(v, v) for v in graph.inputs)
    outputs = tuple(new.get(v, v) for v in graph.outputs)
    return Graph(graph.name, inputs, outputs, graph.output_names)


def _sweep(graph: Graph, rules: Sequence[Rule], log: RewriteLog) -> Graph:
    state = _State({}, log)
    known: set[Node] = set()
    old_uses = {value: len(users) for value, users in graph.users.items()}
    for value in graph.outputs:
        old_uses[value] += 1
    token = _state.set(state)

    def visit(node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
        results = []
        for old, value in zip(node.values, rebuild(node, inputs), strict=True):
            state.uses[value] = old_uses[old]
            known.add(value.node)
            value = _apply(value, rules, state, known)
            state.uses[value] = max(state.uses.get(value, 0), old_uses[old])
            results.append(value)
        return results

    try:
        return map_graph(graph, visit)
    finally:
        _state.reset(token)


def _apply(value: Value, rules: Sequence[Rule], state: _State, known: set[Node]) -> Value:
    """Apply rules at one value until none fires there."""
    while (result := _apply_first(value, rules, state)) is not None:
        if result.type != value.type:
            raise VerifyError(f"rule {state.rule} changes {value.type} to {result.type} at {sorted(value.node.loc)}")
        result = _merge_locations(value, result, state, known)
        state.log.fired.append(Firing(state.rule, repr(value), repr(result), value.node.loc | result.node.loc))
        value = result
    return value


def _apply_first(value: Value, rules: Sequence[Rule], state: _State) -> Value | None:
    """Give what the first rule that fires makes of a value, None if none does; `state.rule` is the last one tried."""
    state.loc = value.node.loc
    with located(state.loc):
        for rule in rules:
            state.rule = getattr(rule, "__name__", "rule")
            result = rule(value)
            if result is not None and result != value:
                return result
    return None


def _merge_locations(old: Value, new: Value, state: _State, known: set[Node]) -> Value:
    """Give the freshly made nodes the locations of all the nodes they replace."""
    fresh = _fresh_nodes(new.node, known)
    if not fresh:
        return new
    kept = {v.node for node in fresh for v in node.inputs} - set(fresh)
    loc = _replaced_locations(old.node, kept, state)
    moved: dict[Node, Node] = {}
    for node in fresh:
        inputs = tuple(Value(moved.get(v.node, v.node), v.index) for v in node.inputs)
        moved[node] = replace(node, inputs=inputs, loc=node.loc | loc)
    known.update(moved.values())
    return Value(moved[new.node], new.index)


def _fresh_nodes(root: Node, known: set[Node]) -> list[Node]:
    """List the nodes not seen before that the root reaches, inputs first."""
    order: list[Node] = []
    stack = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if node in known or node in order:
            continue
        if expanded:
            order.append(node)
            continue
        stack.append((node, True))
        stack.extend((v.node, False) for v in node.inputs)
    return order


def _replaced_locations(root: Node, kept: set[Node], state: _State) -> frozenset[str]:
    """Collect the locations of the root and of the inputs that die with it."""
    loc = root.loc
    stack = [(v, 1) for v in root.inputs]
    while stack:
        value, depth = stack.pop()
        if value.node in kept or depth > _CONE_DEPTH or state.uses.get(value, 1) > 1:
            continue
        loc |= value.node.loc
        stack.extend((v, depth + 1) for v in value.inputs)
    return loc
