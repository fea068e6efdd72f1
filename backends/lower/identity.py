"""What a kernel is known by: a digest of everything its machine code depends on."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path

from cnnc.backends.cache import ScheduleCache
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.text import print_graph
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.source import Constant, Input
from cnnc.target import Target


def kernel_symbol(kernel: Fused, target: Target) -> str:
    """Name a kernel by what it computes and how: the same body, types, schedule and target give the same name."""
    return f"{kernel.anchor}_{kernel_key(kernel, target)[:16]}"


def kernel_key(kernel: Fused, target: Target) -> str:
    """Digest everything a kernel's machine code depends on, the compiler's own source included."""
    text = print_graph(anonymous(kernel.body))
    parts = (text, str(kernel.schedule), str(target), str(target.caches), source_digest())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def anonymous(body: Graph) -> Graph:
    """Give the body without names and source locations, which change nothing in the code."""
    new: dict[Value, Value] = {}
    for position, value in enumerate(body.inputs):
        new[value] = Value(Node(Input(f"x{position}", value.type), (), value.node.types))
    for node in body.nodes:
        if node.op.name == "input":
            continue
        op = replace(node.op, label="") if isinstance(node.op, Constant) else node.op
        copy = Node(op, tuple(new[v] for v in node.inputs), node.types)
        new.update(zip(node.values, copy.values, strict=True))
    names = tuple(f"y{i}" for i in range(len(body.outputs)))
    return Graph("kernel", tuple(new[v] for v in body.inputs), tuple(new[v] for v in body.outputs), names)


@cache
def source_digest() -> str:
    """Digest the source files kernels come from, so that a changed compiler never reuses old code."""
    from importlib.metadata import version

    state = hashlib.sha256(f"{version('apache-tvm')} {version('llvmlite')}".encode())
    for path in _sources():
        state.update(f"{path.name}\0".encode() + path.read_bytes())
    return state.hexdigest()


def _sources() -> list[Path]:
    """List what decides on machine code: the back end, the operators, the IR with its layouts, and the targets."""
    import cnnc.ir
    import cnnc.ops
    import cnnc.target

    folders = [Path(__file__).resolve().parents[1]]
    folders += [Path(str(package.__file__)).resolve().parent for package in (cnnc.ops, cnnc.ir)]
    targets = Path(str(cnnc.target.__file__)).resolve()
    return [*(path for folder in folders for path in sorted(folder.rglob("*.py"))), targets]


class ScheduleMemory:
    """Remembers the schedules of the tile pass from one compile to the next."""

    def __init__(self, cache: ScheduleCache) -> None:
        self._cache = cache

    def recall(self, kernel: Fused, target: Target) -> Schedule | None:
        """Give the schedule an earlier compile found for the same kernel with the same compiler."""
        return self._cache.get(_search_key(kernel, target))

    def remember(self, kernel: Fused, target: Target, schedule: Schedule) -> None:
        """Keep a schedule for later compiles."""
        self._cache.put(_search_key(kernel, target), schedule)


def _search_key(kernel: Fused, target: Target) -> str:
    """Digest what a search depends on: the cost models, unlike machine code, count with a number of threads."""
    return hashlib.sha256(f"{kernel_key(kernel, target)}\0{target.threads}".encode()).hexdigest()
