"""Give every value between kernels its place in one arena, reusing the bytes of values no longer needed.

Inputs, outputs and constants of the graph lie elsewhere.  A view has the place of what it renames, and the inputs of a
joint lie one after the other in its output.  An elementwise kernel may write over an input that dies with it.  What is
left is dynamic storage allocation, known to be hard; the heuristic is TFLite's "greedy by size" (Pisarchyk and Lee,
"Efficient memory management for deep neural net inference", 2020, section 5.2), tried in several orders, the smallest
arena taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.op import Kind
from cnnc.ops.fused import Fused
from cnnc.passes.views import is_joint, is_view
from cnnc.target import Target

ALIGNMENT = 64
"""Kernels load whole vectors from aligned addresses; also a cache line."""

InPlace = Callable[[Node], Sequence[int]]
"""Which inputs of a kernel its first output may overwrite, by position."""


@dataclass(frozen=True)
class MemoryPlan:
    """Where each value lies: its first byte in the arena, and the bytes of the arena."""

    offsets: dict[Value, int]
    size: int


@dataclass(eq=False)
class Storage:
    """A piece of memory, of `nbytes`, that holds values from kernel number `first` to kernel number `last`.

    `values` come with where they start in it.
    """

    nbytes: int
    first: int
    last: int
    values: list[tuple[Value, int]] = field(default_factory=list)


def plan_memory(graph: Graph, target: Target, in_place: InPlace | None = None) -> MemoryPlan:
    """Plan the arena of a graph of kernels, run in the order of `graph.nodes`.

    Sizes are physical, at the bounds of run-time sizes.  `in_place` defaults to `elementwise_in_place`.
    """
    storages = find_storages(graph, in_place or elementwise_in_place)
    plans = [_place(storages, order) for order in _orders(storages)]
    offsets, size = min(plans, key=lambda plan: plan[1])
    return MemoryPlan({v: o + at for s, o in zip(storages, offsets, strict=True) for v, at in s.values}, size)


def live_bytes(graph: Graph, in_place: InPlace | None = None) -> int:
    """Give the most bytes needed at any moment: no plan can be smaller."""
    storages = find_storages(graph, in_place or elementwise_in_place)
    change: dict[int, int] = {}
    for storage in storages:
        change[storage.first] = change.get(storage.first, 0) + storage.nbytes
        change[storage.last + 1] = change.get(storage.last + 1, 0) - storage.nbytes
    now, most = 0, 0
    for moment in sorted(change):
        now += change[moment]
        most = max(most, now)
    return most


def elementwise_in_place(node: Node) -> Sequence[int]:
    """Give the inputs that a purely elementwise kernel reads at the very index it then writes.

    Whatever the order of its loops, every element is read before the same element is written.
    """
    if not isinstance(node.op, Fused) or len(node.types) != 1 or not is_elementwise(node.op):
        return ()
    out = node.types[0]
    return [
        position
        for position, value in enumerate(node.inputs)
        if (value.shape, value.type.layout, value.dtype.itemsize) == (out.shape, out.layout, out.dtype.itemsize)
    ]


def is_elementwise(kernel: Fused) -> bool:
    """Whether every operator of a kernel is elementwise, so that it may write over what it reads."""
    return all(node.op.kind is Kind.ELEMENTWISE for node in kernel.body.nodes if node.inputs)


def find_storages(graph: Graph, in_place: InPlace) -> list[Storage]:
    """Find which values share storage, and from when to when each storage is needed."""
    elsewhere = {*graph.inputs, *graph.outputs}
    last_use = _last_uses(graph)
    joined = _joined(graph)
    storages: list[Storage] = []
    of: dict[Value, tuple[Storage, int]] = {}

    def hold(storage: Storage, value: Value, start: int) -> None:
        storage.values.append((value, start))
        storage.last = max(storage.last, last_use[value])
        of[value] = (storage, start)

    def open_storage(value: Value, moment: int) -> Storage:
        storages.append(Storage(-(-value.type.nbytes // ALIGNMENT) * ALIGNMENT, moment, moment))
        return storages[-1]

    for moment, node in enumerate(graph.nodes):
        if is_view(node) and node.inputs[0] in of:
            hold(of[node.inputs[0]][0], node.values[0], of[node.inputs[0]][1])
        elif isinstance(node.op, Fused):
            dying = [of[node.inputs[p]][0] for p in in_place(node) if _dies(node, p, moment, of, joined)]
            for value in node.values:
                if value in joined:
                    whole, start = joined[value]
                    if whole not in of:
                        hold(open_storage(whole, moment), whole, 0)
                    hold(of[whole][0], value, start)
                elif value not in elsewhere:
                    over = bool(dying) and value.index == 0
                    hold(dying[0] if over else open_storage(value, moment), value, 0)
        elif is_joint(node) and node.values[0] not in of:
            whole, start = joined[node.values[0]]
            hold(of[whole][0], node.values[0], start)
    return storages


def _joined(graph: Graph) -> dict[Value, tuple[Value, int]]:
    """Give, for the inputs and outputs of joints, the outermost whole they are in, and their first byte there."""
    joined: dict[Value, tuple[Value, int]] = {}
    for node in reversed(graph.nodes):
        if is_joint(node):
            whole, start = joined.setdefault(node.values[0], (node.values[0], 0))
            for part in node.inputs:
                joined[part] = (whole, start)
                start += part.type.nbytes
    return joined


def _dies(
    node: Node,
    position: int,
    moment: int,
    of: Mapping[Value, tuple[Storage, int]],
    joined: Mapping[Value, tuple[Value, int]],
) -> bool:
    """Whether the storage of an input holds nothing else, and is read for the last time now, under this name only."""
    value = node.inputs[position]
    if value not in of or value in joined:
        return False
    storage = of[value][0]
    return storage.last == moment and [of[v][0] for v in node.inputs if v in of].count(storage) == 1


def _last_uses(graph: Graph) -> dict[Value, int]:
    """Give, for each value, the last moment it is needed, uses through views and joints included."""
    moment = {node: position for position, node in enumerate(graph.nodes)}
    last: dict[Value, int] = {}
    for node in reversed(graph.nodes):
        for value in node.values:
            users = graph.users[value]
            uses = [last[user.values[0]] if is_view(user) or is_joint(user) else moment[user] for user in users]
            last[value] = max(uses, default=moment[node])
    return last


def _orders(storages: Sequence[Storage]) -> Iterator[list[int]]:
    """Give orders to place storages in: the largest, the largest and longest, the earliest first."""
    keys: tuple[Callable[[Storage], tuple[int, ...]], ...] = (
        lambda s: (-s.nbytes, s.first),
        lambda s: (-s.nbytes * (s.last - s.first + 1), s.first),
        lambda s: (s.first, -s.nbytes),
        lambda s: (s.first - s.last, -s.nbytes),
    )
    for key in keys:
        yield sorted(range(len(storages)), key=lambda i: key(storages[i]))


def _place(storages: Sequence[Storage], order: Sequence[int]) -> tuple[list[int], int]:
    """Place storages one by one, each in the smallest gap that holds it; gives the offsets and the arena's size."""
    first, last, nbytes = (
        np.array([getattr(storages[i], name) for i in order], np.int64) for name in ("first", "last", "nbytes")
    )
    placed = np.zeros(len(order), np.int64)
    for k in range(len(order)):
        meets = np.flatnonzero((first[:k] <= last[k]) & (first[k] <= last[:k]))
        taken = sorted(zip(placed[meets].tolist(), (placed[meets] + nbytes[meets]).tolist(), strict=True))
        placed[k] = _best_gap(taken, int(nbytes[k]))
    offsets = [0] * len(order)
    for i, offset in zip(order, placed.tolist(), strict=True):
        offsets[i] = offset
    return offsets, int((placed + nbytes).max(initial=0))


def _best_gap(taken: Sequence[tuple[int, int]], nbytes: int) -> int:
    """Give the start of the smallest gap between the taken ranges that holds so many bytes, or their end."""
    best: tuple[int, int] | None = None
    end = 0
    for start, stop in taken:
        if start - end >= nbytes and (best is None or start - end < best[0]):
            best = (start - end, end)
        end = max(end, stop)
    return end if best is None else best[1]
