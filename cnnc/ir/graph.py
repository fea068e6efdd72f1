"""Graphs: nodes, values, and the graph as what its outputs reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from cnnc.errors import VerifyError
from cnnc.ir.op import Op
from cnnc.ir.types import DType, Size, TensorType


@dataclass(frozen=True, eq=False)
class Node:
    """One application of an operator; two nodes are the same only if they are the same object.

    `loc` is where it comes from: ONNX node names or DSL `file:line`s, more than one after fusion.
    Make nodes with `cnnc.ir.build.call`, the one door.
    """

    op: Op
    inputs: tuple[Value, ...]
    types: tuple[TensorType, ...]
    loc: frozenset[str] = frozenset()

    @property
    def values(self) -> tuple[Value, ...]:
        """All outputs."""
        return tuple(Value(self, i) for i in range(len(self.types)))

    def __repr__(self) -> str:
        return f"<{self.op.name} : {', '.join(map(str, self.types))}>"


@dataclass(frozen=True)
class Value:
    """One output of a node."""

    node: Node
    index: int = 0

    @property
    def type(self) -> TensorType:
        """Shape, dtype and layout."""
        return self.node.types[self.index]

    @property
    def shape(self) -> tuple[Size, ...]:
        """The logical shape."""
        return self.type.shape

    @property
    def dtype(self) -> DType:
        """The element type."""
        return self.type.dtype

    @property
    def op(self) -> Op:
        """The operator that makes it."""
        return self.node.op

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The inputs of the node that makes it."""
        return self.node.inputs

    def __repr__(self) -> str:
        return f"<{self.op.name}#{self.index} : {self.type}>"


@dataclass(frozen=True, eq=False)
class Graph:
    """A network: what its outputs reach, so dead nodes cannot exist.

    `inputs` are values of `Input` nodes (they may be unused); `output_names` pairs with `outputs`.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    output_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.output_names:
            names = tuple(f"output{i}" for i in range(len(self.outputs)))
            object.__setattr__(self, "output_names", names if len(names) != 1 else ("output",))
        if len(self.output_names) != len(self.outputs):
            raise VerifyError(f"graph {self.name}: {len(self.outputs)} outputs, {len(self.output_names)} names")

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes in a deterministic topological order, the inputs first."""
        return topological_order(v.node for v in (*self.inputs, *self.outputs))

    @cached_property
    def users(self) -> Mapping[Value, tuple[Node, ...]]:
        """The nodes that read each value (one entry a use; graph outputs are not among them)."""
        users: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.values:
                users.setdefault(value, [])
            for value in node.inputs:
                users.setdefault(value, []).append(node)
        return {value: tuple(nodes) for value, nodes in users.items()}

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs, in order."""
        return tuple(str(getattr(v.op, "label", "")) for v in self.inputs)

    def __repr__(self) -> str:
        return f"<graph {self.name}: {len(self.nodes)} nodes>"


def topological_order(roots: Iterable[Node]) -> tuple[Node, ...]:
    """List what the roots reach, every node after its inputs (iterative: a network may be 100,000 deep)."""
    order: list[Node] = []
    done: set[Node] = set()
    for root in roots:
        stack = [(root, False)]
        while stack:
            node, expanded = stack.pop()
            if node in done:
                continue
            if expanded:
                done.add(node)
                order.append(node)
                continue
            stack.append((node, True))
            stack.extend((v.node, False) for v in reversed(node.inputs) if v.node not in done)
    return tuple(order)
