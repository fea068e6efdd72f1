"""From a scheduled graph to a program, whatever its kernels run on: ports, places in memory, calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cnnc.backends.host.device import DeviceCode
from cnnc.backends.host.program import BASELINE_CPU, KernelCall, Port, Program, Slot, Variant
from cnnc.backends.lower.run_time_indices import check_symbol
from cnnc.backends.lower.weights import WeightBlock
from cnnc.errors import VerifyError
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ops.fused import Fused
from cnnc.ops.source import Constant
from cnnc.passes.plan_memory import MemoryPlan
from cnnc.passes.views import is_joint, is_view
from cnnc.target import Target

_SOURCES = ("input", "constant")

Slots: TypeAlias = Mapping[Value, Slot]
"""Where every value outside kernels lives."""

CallsOf: TypeAlias = Callable[[Node, Slots], Iterable[KernelCall]]
"""What makes the calls of a kernel's node, checks of its indices before it."""


@dataclass(frozen=True)
class Build:
    """A program with the graphs it came from, one for each batch size, and the machine code of its kernels.

    `objects` are for a linker; kernels for a GPU are in the program.  `compiled` and `cached` count where the kernels
    came from.
    """

    graphs: tuple[Graph, ...]
    program: Program
    objects: tuple[bytes, ...]
    compiled: int
    cached: int


@dataclass(frozen=True)
class Memory:
    """Where the values of each graph live, and the block of weights in pieces."""

    slots: Sequence[Slots]
    weights: Sequence[bytes | memoryview]


@dataclass(frozen=True)
class Scheduled:
    """What is to be built: graphs whose every computing node is a scheduled `Fused`, one for each batch size.

    `meta` travels in the binary as JSON.
    """

    graphs: Sequence[Graph]
    plans: Sequence[MemoryPlan]
    batches: Sequence[int]
    target: Target
    meta: Mapping[str, object]

    @property
    def kernels(self) -> list[Node]:
        """The kernels of all graphs in the order they run."""
        return [node for graph in self.graphs for node in fused_nodes(graph)]

    def memory(self) -> Memory:
        """Give every value its place, and pack the weights: equal ones are there once."""
        weights = WeightBlock()
        slots = [_slots_of(graph, plan, weights) for graph, plan in zip(self.graphs, self.plans, strict=True)]
        return Memory(slots, weights.pieces())

    def program(
        self, memory: Memory, calls_of: CallsOf, scratch_bytes: int, device: DeviceCode | None = None
    ) -> Program:
        """Fill in ports, places and calls; the arena is the largest needed."""
        first, *others = (
            _variant(batch, graph, slots, calls_of)
            for batch, graph, slots in zip(self.batches, self.graphs, memory.slots, strict=True)
        )
        return Program(
            name=self.graphs[0].name,
            inputs=first.inputs,
            outputs=first.outputs,
            calls=first.calls,
            arena_bytes=max(plan.size for plan in self.plans),
            scratch_bytes=scratch_bytes,
            weights=memory.weights,
            meta=json.dumps(self.meta, sort_keys=True),
            cpu=BASELINE_CPU if device else self.target.llvm_cpu,
            features=() if device else self.target.features,
            batch=first.batch,
            others=tuple(others),
            device=device,
        )


def _variant(batch: int, graph: Graph, slots: Slots, calls_of: CallsOf) -> Variant:
    """Fill in the ports and calls for one batch size."""
    return Variant(
        batch=batch,
        inputs=tuple(_port(name, v) for name, v in zip(graph.input_names, graph.inputs, strict=True)),
        outputs=tuple(_port(name, v) for name, v in zip(graph.output_names, graph.outputs, strict=True)),
        calls=tuple(call for node in fused_nodes(graph) for call in calls_of(node, slots)),
    )


def _port(name: str, value: Value) -> Port:
    """Describe an input or output of the graph."""
    return Port(name, str(value.dtype), value.type.static_shape)


def _slots_of(graph: Graph, plan: MemoryPlan, weights: WeightBlock) -> dict[Value, Slot]:
    """Say where every value outside kernels lives."""
    slots: dict[Value, Slot] = {}
    for position, value in enumerate(graph.inputs):
        slots[value] = Slot("input", position)
    for position, value in enumerate(graph.outputs):
        if not isinstance(value.op, Fused) or value in slots:
            raise VerifyError(f"output {graph.output_names[position]} is not written by a kernel of its own")
        slots[value] = Slot("output", position)
    for node in graph.nodes:
        if isinstance(node.op, Constant):
            slots[node.values[0]] = Slot("weights", weights.place(node.op))
        elif is_view(node):
            slots[node.values[0]] = slots[node.inputs[0]]
        elif isinstance(node.op, Fused) or is_joint(node):
            for value in node.values:
                if value not in slots:
                    slots[value] = Slot("arena", plan.offsets[value])
        elif node.op.name not in _SOURCES:
            raise VerifyError(f"{node.op.name} is left outside of a kernel (at {', '.join(sorted(node.loc))})")
    return slots


def fused_of(node: Node) -> Fused:
    """Give the kernel of a node."""
    if not isinstance(node.op, Fused):
        raise VerifyError(f"{node.op.name} is left outside of a kernel (at {', '.join(sorted(node.loc))})")
    return node.op


def fused_nodes(graph: Graph) -> Sequence[Node]:
    """List the kernels of a graph in the order they run."""
    return [node for node in graph.nodes if isinstance(node.op, Fused)]


def kernel_call(node: Node, symbol: str, slots: Slots) -> KernelCall:
    """Describe the call of a kernel over its inputs, then its outputs."""
    op, values = fused_of(node), (*node.inputs, *node.values)
    return KernelCall(
        symbol=symbol,
        args=tuple(slots[v] for v in values),
        layers=tuple(sorted(node.loc)),
        flops=op.flops(*(v.type for v in node.inputs)),
        bytes=sum(v.type.nbytes for v in values),
        algorithm=op.schedule.template if op.schedule else "",
        schedule=str(op.schedule),
    )


def check_call(node: Node, indices: Value, extents: tuple[int, ...], slots: Slots) -> KernelCall:
    """Describe the call that checks indices a kernel reads with."""
    return KernelCall(
        symbol=check_symbol(indices.type, extents),
        args=(slots[indices],),
        layers=tuple(sorted(node.loc)),
        bytes=indices.type.nbytes,
        algorithm="check_indices",
        schedule="check_indices()",
    )
