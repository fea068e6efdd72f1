"""Fuse operators into kernels, judged by their `Kind` and not by their names.

    relu(add(conv(x, w), r)) -> fused(x, w, r) {conv, add, relu}

Afterwards every computing node is a `Fused`; inputs, constants and views stay as they are.  A conversion of a constant,
as of a weight stored in 16 bits, goes into the kernel of the reduction that reads it.  Then there are four steps:

1. From each reduction (convolution, pooling, ...), then from each remaining node, a group grows forward over
   elementwise consumers of the same shape, through diamonds too, as long as one value leaves the group.
2. An elementwise group moves into the reduction that alone reads it, as its first operand, where a template of the back
   end takes such a prologue: mul, add, relu before a convolution become fused(x, k, b, w) {mul, add, relu, conv}.
3. A group of elementwise and injective nodes moves into its only consumer where that reads each element once; one that
   merely moves data also through views, into a consumer that moves it on.
4. Groups become kernels, each after those it reads (which is refused, should groups be cyclic).

Growing keeps groups convex: everything between a group's first value and its last is inside.  The rules are those of
Hidet (ASPLOS'23, section 4.2); the names prologue and epilogue are its, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from typing import Protocol, runtime_checkable

from cnnc.errors import VerifyError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.op import Kind
from cnnc.ir.rewrite import rebuild, substitute
from cnnc.ops.cast import Cast
from cnnc.ops.fused import Fused
from cnnc.ops.reshape import Reshape
from cnnc.ops.source import Constant, Input
from cnnc.passes.registry import Pass
from cnnc.passes.views import is_view
from cnnc.target import Target

SOURCES = ("input", "parameter", "constant")


@runtime_checkable
class TakesPrologue(Protocol):
    """A kernel template that can compute its anchor's first operand itself."""

    def takes_prologue(self, kernel: Fused, target: Target) -> bool:
        """Whether a kernel that does so is better than a kernel before the anchor's."""


@dataclass(frozen=True)
class Fuse(Pass):
    """Make kernels; with `grow` off each holds one operator, weights converted.  `most` bounds the operators of one.

    `templates` are the back end's, of which those that `TakesPrologue` are asked about prologues.
    """

    grow: bool = True
    most: int = 32
    templates: tuple[object, ...] = field(default=(), metadata={"option": False})

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph of kernels."""
        groups = _Groups(graph, self.most)
        groups.move_conversions()
        if self.grow:
            groups.grow()
            groups.move_prologues([t for t in self.templates if isinstance(t, TakesPrologue)], target)
            groups.move_producers()
        return _copy_outputs(_build(graph, groups))


@dataclass(eq=False)
class _Group:
    """Nodes that become one kernel, in topological order."""

    nodes: list[Node]

    @property
    def anchor(self) -> Node:
        """The first of the nodes with the highest kind."""
        return max(self.nodes, key=lambda node: node.op.kind)


@dataclass(eq=False)
class _Groups:
    graph: Graph
    most: int
    rank: dict[Node, int] = field(init=False)
    of: dict[Node, _Group] = field(init=False)

    def __post_init__(self) -> None:
        self.rank = {node: position for position, node in enumerate(self.graph.nodes)}
        self.of = {node: _Group([node]) for node in self.graph.nodes if _computes(node)}
        self.outputs = set(self.graph.outputs)
        self.prologues: set[Node] = set()

    def move_conversions(self) -> None:
        """Move each conversion of a constant into the reduction that alone reads it, which converts as it loads."""
        for node in list(self.of):
            if not isinstance(node.op, Cast) or not isinstance(node.inputs[0].op, Constant):
                continue
            views, consumer = self._only_consumer(node)
            if consumer is not None and not views and consumer.op.kind is Kind.REDUCTION:
                target = self.of[consumer]
                target.nodes.insert(0, node)
                self.of[node] = target

    def grow(self) -> None:
        """Let groups grow forward, reductions first: an epilogue costs them nothing."""
        nodes = list(self.of)
        for node in [n for n in nodes if n.op.kind is Kind.REDUCTION] + [
            n for n in nodes if n.op.kind < Kind.REDUCTION
        ]:
            group = self.of[node]
            if group.anchor is not node or node is not group.nodes[-1] or len(node.types) > 1:
                continue
            last: Node | None = node
            while last is not None:
                region = self._region(last.values[0], self.most - len(group.nodes))
                self._join(group, region)
                last = region[-1] if region else None

    def _region(self, value: Value, most: int) -> list[Node]:
        """List the elementwise nodes through which all that reads a value flows into one; [] if there is none."""
        region: list[Node] = []
        pending = {*self.graph.users[value]}
        leaving = value
        while pending:
            if leaving in self.outputs or len(region) == most:
                return []
            node = min(pending, key=self.rank.__getitem__)
            if not self._is_epilogue(node, value):
                return []
            region.append(node)
            leaving = node.values[0]
            pending.remove(node)
            if not pending:
                return region
            pending |= {*self.graph.users[leaving]}
        return []

    def _is_epilogue(self, node: Node, value: Value) -> bool:
        alone = node in self.of and len(self.of[node].nodes) == 1
        same = len(node.types) == 1 and node.types[0].shape == value.shape and node.types[0].layout == value.type.layout
        return alone and same and node.op.kind is Kind.ELEMENTWISE

    def _join(self, group: _Group, nodes: Sequence[Node]) -> None:
        group.nodes += nodes
        for node in nodes:
            self.of[node] = group

    def move_producers(self) -> None:
        """Move groups into their only consumer, consumers first, so that whole chains move."""
        for node in reversed(list(self.of)):
            group = self.of[node]
            if node is not group.nodes[-1]:
                continue
            views, consumer = self._only_consumer(node)
            if consumer is not None and self._moves(group, views, consumer):
                target = self.of[consumer]
                self._join(target, [*group.nodes, *views])
                target.nodes.sort(key=self.rank.__getitem__)

    def move_prologues(self, templates: Sequence[TakesPrologue], target: Target) -> None:
        """Move elementwise groups into the reduction that alone reads them, where a template takes that."""
        for node in reversed(list(self.of)):
            group = self.of[node]
            if node is not group.nodes[-1]:
                continue
            views, consumer = self._only_consumer(node)
            moved = _Group(group.nodes[1:] if _joins(group.nodes[0]) else group.nodes)
            if consumer is None or views or not moved.nodes or not self._may_be_prologue(moved, consumer):
                continue
            nodes = sorted([*moved.nodes, *self.of[consumer].nodes], key=self.rank.__getitem__)
            kernel = self._kernel(_Group(nodes))
            if any(template.takes_prologue(kernel, target) for template in templates):
                self.prologues.update(moved.nodes)
                group.nodes = [n for n in group.nodes if n not in self.prologues]
                self._join(self.of[consumer], moved.nodes)
                self.of[consumer].nodes.sort(key=self.rank.__getitem__)

    def _may_be_prologue(self, group: _Group, consumer: Node) -> bool:
        """Whether a group computes the first operand of a reduction, element by element, or a part of its prologue.

        Only where it reads an image that stays: over one that dies, a kernel of its own writes at half the traffic.
        """
        made = group.nodes[-1]
        first = [position for position, value in enumerate(consumer.inputs) if value.node is made] == [0]
        reduction = consumer.op.kind is Kind.REDUCTION and self.of[consumer].anchor is consumer and first
        if not reduction and consumer not in self.prologues:
            return False
        if len(group.nodes) + len(self.of[consumer].nodes) > self.most:
            return False
        if any(node.op.kind is not Kind.ELEMENTWISE for node in group.nodes):
            return False
        images = {v for node in group.nodes for v in node.inputs if v.type == made.types[0]}
        return any(value.node not in group.nodes and self._stays(value, group) for value in images)

    def _stays(self, value: Value, group: _Group) -> bool:
        """Whether a value is still needed, where it lies, once a group has read it."""
        if value in self.outputs or value.node not in self.of or _joins(value.node):
            return True
        others = {*self.graph.users[value]}.difference(group.nodes)
        return not others <= self._before(group, self.rank[value.node])

    def _before(self, group: _Group, rank: int) -> set[Node]:
        """Give the nodes, of a rank above `rank`, that a group's values are computed from."""
        found: set[Node] = set()
        pending = [*group.nodes]
        while pending:
            for value in pending.pop().inputs:
                if value.node not in found and self.rank[value.node] > rank:
                    found.add(value.node)
                    pending.append(value.node)
        return found

    def _kernel(self, group: _Group) -> Fused:
        """Give the kernel that a group would become."""
        return Fused(_body(group, _leaving(self.graph, group))[0], group.anchor.op.name)

    def _only_consumer(self, node: Node) -> tuple[list[Node], Node | None]:
        """Give the one node outside of views that reads a node's output, and the views in between."""
        views: list[Node] = []
        while len(node.types) == 1 and node.values[0] not in self.outputs:
            users = set(self.graph.users[node.values[0]])
            if len(users) != 1:
                break
            (node,) = users
            if node in self.of:
                return views, node
            if not is_view(node):
                break
            views.append(node)
        return views, None

    def _moves(self, group: _Group, views: Sequence[Node], consumer: Node) -> bool:
        """Whether computing a group inside the kernel of its only consumer costs nothing."""
        target = self.of[consumer]
        if target is group or len(target.nodes) + len(group.nodes) + len(views) > self.most:
            return False
        if any(node.op.kind > Kind.INJECTIVE for node in group.nodes) or consumer in self.prologues:
            return False
        if any(map(_joins, group.nodes)) and target.anchor.op.kind >= Kind.REDUCTION:
            return False
        moves_data = all(node.op.kind is Kind.INJECTIVE for node in group.nodes)
        if views and not (moves_data and consumer.op.kind is Kind.INJECTIVE):
            return False
        read = (views or group.nodes)[-1].values[0]
        return _reads_once(consumer, read, moves_data)


def _joins(node: Node) -> bool:
    """Whether a node moves data of several inputs into one place."""
    return node.op.kind is Kind.INJECTIVE and len(node.inputs) > 1


def _computes(node: Node) -> bool:
    return not isinstance(node.op, Fused) and node.op.name not in SOURCES and not is_view(node)


def _reads_once(node: Node, value: Value, moves_data: bool) -> bool:
    """Whether a node reads each element of an input about once, or again at the mere price of moving data.

    Not where several inputs are joined: a guard for each would stand in the innermost loop.  Into a reduction only
    where little comes out: there nothing is lost if the kernel is the general one.
    """
    elements = value.type.elements
    if node.op.kind is Kind.ELEMENTWISE:
        return moves_data or node.types[0].elements <= elements
    if node.op.kind is Kind.INJECTIVE:
        return len(node.inputs) == 1 and (moves_data or sum(t.elements for t in node.types) <= elements)
    if node.op.kind is Kind.REDUCTION:
        flops, made = node.op.flops(*(v.type for v in node.inputs)), sum(t.elements for t in node.types)
        return len(node.inputs) == 1 and flops < 2 * elements and made * 8 <= elements
    return False


def _build(graph: Graph, groups: _Groups) -> Graph:
    """Rebuild the graph with a kernel in place of each group."""
    new: dict[Value, Value] = {}
    for item in _order(graph, groups):
        if isinstance(item, Node):
            new.update(zip(item.values, rebuild(item, tuple(new[v] for v in item.inputs)), strict=True))
            continue
        leaving = _leaving(graph, item)
        body, sources = _body(item, leaving)
        loc = frozenset().union(*(node.loc for node in item.nodes))
        kernel = call(Fused(body, item.anchor.op.name), *(new[v] for v in sources), loc=loc)
        new.update(zip(leaving, kernel.node.values, strict=True))
    return substitute(graph, new)


def _order(graph: Graph, groups: _Groups) -> Iterator[Node | _Group]:
    """List groups and the nodes outside them, each after what it reads."""
    sorter: TopologicalSorter[Node | _Group] = TopologicalSorter()
    rank: dict[Node | _Group, int] = {}
    for node in graph.nodes:
        item = groups.of.get(node, node)
        rank[item] = groups.rank[node]
        sources = (groups.of.get(value.node, value.node) for value in node.inputs)
        sorter.add(item, *(source for source in sources if source is not item))
    try:
        sorter.prepare()
    except CycleError:
        raise VerifyError(f"fuse: groups of {graph.name} depend on each other in a circle") from None
    items = {place: item for item, place in rank.items()}
    ready: list[int] = []
    while sorter.is_active():
        for item in sorter.get_ready():
            heappush(ready, rank[item])
        first = items[heappop(ready)]
        yield first
        sorter.done(first)


def _leaving(graph: Graph, group: _Group) -> list[Value]:
    """List the values that somebody outside reads."""
    inside = set(group.nodes)
    outputs = set(graph.outputs)
    return [
        value
        for node in group.nodes
        for value in node.values
        if value in outputs or any(user not in inside for user in graph.users[value])
    ]


def _body(group: _Group, leaving: Sequence[Value]) -> tuple[Graph, list[Value]]:
    """Make a kernel's body and list the values it reads: the anchor's operands first, then the others.

    The operands of a reduction are apart from the others even where they are the same value, so that a template finds
    them by position.  One-element constants of elementwise operators go inside.
    """
    inside = set(group.nodes)
    sources: list[Value] = []
    inputs: list[Value] = []
    new: dict[Value, Value] = {}

    def read(value: Value, reader: Node) -> None:
        if value.node in inside or value in new:
            return
        inside_code = reader.op.kind is Kind.ELEMENTWISE and not isinstance(reader.op, Cast)
        if isinstance(value.op, Constant) and value.type.elements == 1 and inside_code:
            new[value] = value
            return
        new[value] = call(Input(f"x{len(inputs)}", value.type), loc=())
        inputs.append(new[value])
        sources.append(value)

    def visit(nodes: Sequence[Node]) -> None:
        for node in nodes:
            for value in node.inputs:
                read(value, node)
        for node in nodes:
            new.update(zip(node.values, rebuild(node, tuple(new[v] for v in node.inputs)), strict=True))

    head = _up_to(group.anchor, inside)
    visit([node for node in group.nodes if node in head])
    if group.anchor.op.kind >= Kind.REDUCTION:
        for value in sources:
            new.pop(value, None)
    visit([node for node in group.nodes if node not in head])
    outputs = tuple(new[v] for v in leaving)
    return Graph(group.anchor.op.name, tuple(inputs), outputs), sources


def _up_to(anchor: Node, inside: set[Node]) -> set[Node]:
    """Give the anchor and the group's nodes it is computed from."""
    found = {anchor}
    stack = [anchor]
    while stack:
        for value in stack.pop().inputs:
            if value.node in inside and value.node not in found:
                found.add(value.node)
                stack.append(value.node)
    return found


def _copy_outputs(graph: Graph) -> Graph:
    """Make every output of the graph the output of a kernel of its own.

    An input, a constant or a view as output is copied, and so is what stands among the outputs twice.
    """
    outputs: list[Value] = []
    for value in graph.outputs:
        if not isinstance(value.op, Fused) or value in outputs:
            value = _copy(value)
        outputs.append(value)
    return Graph(graph.name, graph.inputs, tuple(outputs), graph.output_names)


def _copy(value: Value) -> Value:
    """Make a kernel that copies a value, through the view where it is one."""
    view = is_view(value.node)
    source = value.inputs[0] if view else value
    inside = call(Input("x0", source.type), loc=())
    op = value.op if view else Reshape(value.shape)
    body = Graph("copy", (inside,), (call(op, inside, loc=value.node.loc),))
    return call(Fused(body, op.name), source, loc=value.node.loc)
