"""Networks: a function of tensors made a network, its parameters, its graph."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from cnnc.errors import ModelError, UsageError
from cnnc.frontends.dsl.draft import Applied, Draft
from cnnc.frontends.dsl.initial import RESIDUAL, Initial, residual_gammas
from cnnc.frontends.dsl.layer import Composable
from cnnc.frontends.dsl.lines import trace
from cnnc.frontends.dsl.scope import current_scope
from cnnc.frontends.dsl.tensor import Tensor
from cnnc.frontends.dsl.weights import checked_weights, read_weights, write_weights
from cnnc.ir.graph import Graph, Value
from cnnc.ir.rewrite import map_graph, rebuild
from cnnc.ir.types import Dim, Size, TensorType
from cnnc.ops.source import Parameter, constant, graph_input

Shape: TypeAlias = tuple[Size, ...] | TensorType
"""The shape of an input without its batch; a `TensorType` to give a dtype as well."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network with its layers, parameters and, once drawn or loaded, their numbers.

    `weights` is the one thing that changes: `init`, `load` and `load_state_dict` fill it and give the network back.
    """

    name: str
    structure: Graph
    """The graph with `Parameter` nodes where `graph()` has constants."""
    layers: Mapping[str, Applied]
    initials: Mapping[str, Initial]
    training_only: tuple[str, ...] = ()
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    rewrite: Callable[[Size | None], Network] | None = None

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The inputs."""
        return self.structure.inputs

    @property
    def outputs(self) -> tuple[Value, ...]:
        """The outputs."""
        return self.structure.outputs

    @cached_property
    def parameters(self) -> dict[str, TensorType]:
        """The types of all parameters, running statistics included, by `state_dict` name, in the order written."""
        reached = {node.op.label: node.types[0] for node in self.structure.nodes if isinstance(node.op, Parameter)}
        return {name: reached[name] for name in self.initials if name in reached}

    @property
    def parameter_count(self) -> int:
        """The number of trained numbers, as papers count them: without running statistics."""
        return sum(t.elements for name, t in self.parameters.items() if self.initials[name].role.trained)

    def init(self, seed: int = 0) -> Network:
        """Draw all parameters at random (He's rule); the same seed gives the same numbers everywhere."""
        small = residual_gammas(self.structure)
        for name, type_ in self.parameters.items():
            drawn = self.initials[name].draw(type_.static_shape, name, seed)
            self.weights[name] = drawn * np.float32(RESIDUAL) if name in small else drawn
        return self

    def load_state_dict(self, state: Mapping[str, Any]) -> Network:
        """Take the numbers of a `state_dict`: arrays, or anything numpy reads, by name.

        f16 and bf16 become f32; `num_batches_tracked` and what only training uses are left out.  Raises
        `ModelError` that lists every missing, unexpected and ill-shaped entry.
        """
        self.weights.update(checked_weights(self.name, self.parameters, state, self.training_only))
        return self

    def load(self, path: str | Path) -> Network:
        """Take the numbers from a `.safetensors` file, as `load_state_dict` does."""
        return self.load_state_dict(read_weights(Path(path)))

    def save(self, path: str | Path) -> None:
        """Write the parameters to a `.safetensors` file; the path holds the old file or the whole new one."""
        self._require_weights()
        write_weights(Path(path), {name: self.weights[name] for name in self.parameters})

    def graph(self) -> Graph:
        """Give the graph to compile, parameters bound to their numbers; raises `UsageError` while they have none."""
        self._require_weights()
        known = self.weights

        def bind(node: Any, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            if not isinstance(node.op, Parameter):
                return rebuild(node, inputs)
            return (constant(known[node.op.label], label=node.op.label),)

        return map_graph(self.structure, bind)

    def cut(self, *names: str) -> Network:
        """Give the network whose outputs are those of the named layers or scopes (of a scope: its last layer).

        The numbers are kept.  Raises `UsageError` for a name that is not there.
        """
        outputs = tuple(self.output_of(name) for name in names)
        structure = Graph(self.name, self.inputs, outputs, names)
        rewrite = self.rewrite
        again = None if rewrite is None else lambda batch: rewrite(batch).cut(*names)
        return Network(
            self.name, structure, self.layers, self.initials, self.training_only, dict(self.weights), rewrite=again
        )

    def output_of(self, name: str) -> Value:
        """Give what a layer, or the last layer of a scope, computes."""
        if name in self.layers:
            return self.layers[name].outputs[0]
        inside = [layer for layer in self.layers.values() if layer.name.startswith(name + ".")]
        if not inside:
            raise UsageError(f"network {self.name} has no layer {name!r}{_nearest(name, self.layers)}")
        return inside[-1].outputs[0]

    def with_batch(self, batch: Size | None) -> Network:
        """Give the same network, numbers included, for another batch size; None leaves the batch axis out."""
        if self.rewrite is None:
            raise UsageError(f"network {self.name} was put together by hand; its batch size is fixed")
        again = self.rewrite(batch)
        again.weights.update(self.weights)
        return again

    def summary(self) -> str:
        """Give a table: layer, kind, output shape, parameters, multiply-adds, receptive field."""
        from cnnc.frontends.dsl.summary import summary

        return summary(self)

    def _require_weights(self) -> None:
        missing = [name for name in self.parameters if name not in self.weights]
        if missing:
            raise UsageError(
                f"network {self.name}: {len(missing)} parameters have no numbers yet ({missing[0]}, ...);"
                " call init(seed), load(path) or load_state_dict(...) first"
            )

    def __repr__(self) -> str:
        return f"<Network {self.name}: {self.parameter_count:,} parameters>"


class Definition(Composable):
    """A function that `@network` made a network: called, it gives a `Network`; on tensors, it is a layer.

    `resnet50()`, `resnet50(batch=4)`, `resnet50(x=(3, 64, 64))`: a keyword named after an input gives its shape,
    the others are options of the function.
    """

    def __init__(self, define: Callable[..., Any], inputs: Mapping[str, Shape], training_only: Iterable[str]) -> None:
        self.define = define
        self.inputs = dict(inputs)
        self.training_only = tuple(training_only)
        self.name = define.__name__
        functools.update_wrapper(self, define)
        unknown = sorted(set(self.inputs) - set(inspect.signature(define).parameters))
        if unknown or not self.inputs:
            raise UsageError(f"@network of {self.name}: gives shapes of {unknown}, which are no parameters of it")

    def __call__(self, *tensors: Tensor, batch: Size | None = 1, **options: Any) -> Any:
        """Make the network; on tensors, apply the function to them and give what it returns."""
        if tensors or any(isinstance(option, Tensor) for option in options.values()):
            return self.define(*tensors, **options)
        self._check_options(options)
        shapes = {name: options.pop(name, shape) for name, shape in self.inputs.items()}
        return _write_down(self, shapes, batch, options)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        known = inspect.signature(self.define).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            return
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise UsageError(f"network {self.name}: takes batch, {', '.join(known)}, not {', '.join(unknown)}{trace()}")

    def __repr__(self) -> str:
        return f"<network {self.name}>"


def network(*, training_only: Iterable[str] = (), **inputs: Shape) -> Callable[[Callable[..., Any]], Definition]:
    """Make a function of tensors a network; a keyword for each input gives its shape without the batch.

        @network(x=(3, 224, 224))
        def tiny(x: Tensor) -> Tensor:
            return x >> conv(16, 3, name="conv") >> relu >> global_avg_pool >> flatten >> linear(10, name="fc")

    The function returns a tensor, a tuple of tensors, or a dictionary of them by output name.  `training_only`
    are prefixes of parameters that published checkpoints carry and inference does not use.
    """

    def define(function: Callable[..., Any]) -> Definition:
        return Definition(function, inputs, training_only)

    return define


def _write_down(
    definition: Definition, shapes: Mapping[str, Shape], batch: Size | None, options: Mapping[str, Any]
) -> Network:
    """Run a definition on fresh inputs, and make what it wrote a network."""
    if current_scope():
        raise UsageError(f"network {definition.name} is made inside scope {'.'.join(current_scope())!r}")
    draft = Draft()
    inputs = {name: Tensor(_input(name, shape, batch), draft) for name, shape in shapes.items()}
    result = definition.define(**inputs, **options)
    outputs, names = _outputs(definition.name, result)
    structure = Graph(definition.name, tuple(t.value for t in inputs.values()), outputs, names)
    initials = {name: declared.initial for name, declared in draft.parameters.items()}
    return Network(
        definition.name,
        structure,
        draft.layers,
        initials,
        definition.training_only,
        rewrite=lambda other: _write_down(definition, shapes, other, options),
    )


def _input(name: str, shape: Shape, batch: Size | None) -> Value:
    sizes = shape.shape if isinstance(shape, TensorType) else shape
    if not isinstance(sizes, tuple | list) or not all(isinstance(size, int | Dim) for size in sizes):
        raise UsageError(
            f"input {name}: wants its shape without the batch, as in (3, 224, 224), got {shape!r}{trace()}"
        )
    whole = tuple(sizes) if batch is None else (batch, *sizes)
    if isinstance(shape, TensorType):
        return graph_input(name, whole, shape.dtype)
    return graph_input(name, whole)


def _outputs(name: str, result: Any) -> tuple[tuple[Value, ...], tuple[str, ...]]:
    """Give what a definition returned as outputs and their names (none given: the graph's own names)."""
    tensors = tuple(result.values()) if isinstance(result, Mapping) else result
    tensors = tensors if isinstance(tensors, tuple | list) else (tensors,)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ModelError(
            f"network {name}: returns tensors, alone, in a tuple or in a dictionary, not {result!r}{trace()}"
        )
    names = tuple(map(str, result)) if isinstance(result, Mapping) else ()
    return tuple(tensor.value for tensor in tensors), names


def _nearest(name: str, layers: Mapping[str, Applied]) -> str:
    import difflib

    scopes = {".".join(layer.split(".")[:i]) for layer in layers for i in range(1, layer.count(".") + 2)}
    close = difflib.get_close_matches(name, sorted(scopes), n=3)
    return f"; there are {', '.join(close)}" if close else f"; it has {len(layers)} layers, see summary()"
