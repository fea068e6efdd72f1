"""A network while it is being written: its parameters and layers by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cnnc.errors import LimitError, ModelError, ShapeError
from cnnc.frontends.dsl.initial import Initial
from cnnc.frontends.dsl.lines import Line, trace
from cnnc.ir.build import call, infer_types
from cnnc.ir.graph import Node, Value
from cnnc.ir.op import Op
from cnnc.ir.types import TensorType, format_shape
from cnnc.ops.source import Parameter


@dataclass(frozen=True)
class Declared:
    """A parameter: its value in the graph, how it starts, and the layer it belongs to."""

    value: Value
    initial: Initial
    owner: object
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Applied:
    """A layer applied to something: what came out, and the nodes and parameters it took."""

    name: str
    kind: str
    outputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    parameters: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True, eq=False)
class Draft:
    """What the tensors of one network write down as layers are applied to them; all of them share it."""

    parameters: dict[str, Declared] = field(default_factory=dict)
    layers: dict[str, Applied] = field(default_factory=dict)
    _names: dict[object, str] = field(default_factory=dict)
    _owners: dict[str, object] = field(default_factory=dict)

    def name_of(self, owner: object, scope: tuple[str, ...], name: str, kind: str, lines: tuple[Line, ...]) -> str:
        """Give a layer its full name: the same at each application, another for each layer.

        Without `name` it is the kind and a number.  Raises `ModelError` where another layer has the name.
        """
        if owner in self._names:
            return self._names[owner]
        full = ".".join((*scope, name)) if name else self._free_name(scope, kind)
        if full in self._owners:
            first = self.layers.get(full)
            there = trace(first.lines[:1]).strip() if first else "in the same network"
            raise ModelError(f"{kind}: the name {full} is taken by a layer {there}{trace(lines)}")
        self._names[owner] = full
        self._owners[full] = owner
        return full

    def applied(self, owner: object) -> Applied | None:
        """Give what a layer did when it was first applied; None if it has not been."""
        name = self._names.get(owner)
        return None if name is None else self.layers.get(name)

    def _free_name(self, scope: tuple[str, ...], kind: str) -> str:
        number = 1
        while (full := ".".join((*scope, f"{kind}{number}"))) in self._owners:
            number += 1
        return full

    def parameter(
        self, name: str, shape: tuple[int, ...], initial: Initial, owner: object, lines: tuple[Line, ...]
    ) -> Value:
        """Declare a parameter, or give the one this layer declared when it was applied before.

        Raises `ModelError` where another layer has one of this name, `ShapeError` where it was of another shape.
        """
        known = self.parameters.get(name)
        if known is None:
            value = call(Parameter(name, TensorType(shape)), loc=_loc(name, lines))
            self.parameters[name] = Declared(value, initial, owner, lines)
            return value
        if known.owner is not owner:
            raise ModelError(f"parameter {name} is declared twice{trace(lines)}{trace(known.lines)}")
        if known.value.shape != shape:
            raise ShapeError(
                f"{name}: the layer was applied before, with a parameter of shape {format_shape(known.value.shape)};"
                f" this input needs {format_shape(shape)}{trace(lines)}"
            )
        return known.value

    def apply(self, op: Op, inputs: Sequence[Value], name: str, lines: tuple[Line, ...]) -> Value:
        """Add a node; raises `ShapeError` with the layer's name and line where it cannot take these inputs."""
        try:
            infer_types(op, tuple(value.type for value in inputs))
        except (ShapeError, LimitError) as error:
            raise type(error)(f"{name}: {error}{trace(lines)}") from None
        return call(op, *inputs, loc=_loc(name, lines))

    def record(self, layer: Applied) -> None:
        """Remember what a layer gave; a layer applied again is recorded as `name@2`."""
        name, times = layer.name, 1
        while name in self.layers:
            times += 1
            name = f"{layer.name}@{times}"
        self.layers[name] = layer


def _loc(name: str, lines: tuple[Line, ...]) -> tuple[str, ...]:
    return (f"{name} ({lines[0].short})" if lines else name,)
