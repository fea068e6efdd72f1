"""Layers as values: `>>` chains them, `+`, `*` and `concat` put them side by side, and they wait for an input.

A kind of layer is one function of a `Site`, a tensor and options, made a layer by `@layer`:

    @layer
    def scale(at: Site, x: Tensor, *, name: str = "") -> Tensor:
        weight = at.parameter("weight", (x.channels, 1, 1), Role.GAMMA)
        return at.call(Mul(), x, weight)

Then `scale(name="s")` is a layer, `scale(x, name="s")` its result, and `x >> scale` does with no options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, TypeAlias, overload

from cnnc.errors import ModelError, ShapeError
from cnnc.frontends.dsl.draft import Applied, Draft
from cnnc.frontends.dsl.initial import Initial, Role
from cnnc.frontends.dsl.lines import Line, trace, user_lines
from cnnc.frontends.dsl.scope import current_scope
from cnnc.frontends.dsl.tensor import Tensor, apply
from cnnc.ir.graph import Node, Value
from cnnc.ir.op import Op
from cnnc.ops.binary import Add, Mul

P = ParamSpec("P")
Function: TypeAlias = Callable[[Tensor], Tensor]


class Composable:
    """What can stand between `>>`: takes one tensor, gives one tensor."""

    def __rshift__(self, after: Function) -> Chain:
        return Chain(_parts(self) + _parts(after))

    def __rrshift__(self, before: Function) -> Chain:
        return Chain(_parts(before) + _parts(self))

    def __add__(self, other: Function) -> Branches:
        return _side_by_side(Add(), self, other)

    def __mul__(self, other: Function) -> Branches:
        return _side_by_side(Mul(), self, other)

    def __radd__(self, other: Function) -> Branches:
        return _side_by_side(Add(), as_function(other), self)

    def __rmul__(self, other: Function) -> Branches:
        return _side_by_side(Mul(), as_function(other), self)


class Chain(Composable):
    """Layers one after the other."""

    def __init__(self, parts: tuple[Function, ...]) -> None:
        self.parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layers in order."""
        for part in self.parts:
            x = part(x)
        return x


class Branches(Composable):
    """Layers side by side on the same input, their outputs joined."""

    def __init__(self, branches: tuple[Function, ...], join: Callable[..., Tensor]) -> None:
        self.branches = branches
        self.join = join

    def __call__(self, x: Tensor) -> Tensor:
        """Apply every branch to x, then join."""
        return self.join(*(branch(x) for branch in self.branches))


@dataclass(frozen=True, eq=False)
class Layer(Composable):
    """One layer with its options; it owns its parameters, so applying it twice shares them.

    Its name, scope and line are those of the place where it was made.
    """

    kind: LayerKind[...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    scope: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        """The name given, without scope; empty if none was."""
        return str(self.options.get("name", ""))

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it to a tensor; raises `ShapeError` with the line of the layer where it cannot take it."""
        if not isinstance(x, Tensor):
            raise ModelError(f"{self.kind.name}: takes a tensor, not {x!r}{trace(self.lines)}")
        owner = object() if self._is_free_to_repeat(x.draft) else self
        name = x.draft.name_of(owner, self.scope, self.name, self.kind.name, self.lines)
        site = Site(name, self, x.draft)
        result = self.kind.define(site, x, *self.args, **self.options)
        nodes, parameters = tuple(site.nodes), tuple(site.parameters)
        x.draft.record(Applied(name, self.kind.name, (result.value,), nodes, parameters, self.lines))
        return result

    def _is_free_to_repeat(self, draft: Draft) -> bool:
        """Whether it was applied before, without name and parameters: then the next time is another layer."""
        before = draft.applied(self)
        return before is not None and not self.name and not before.parameters

    def __repr__(self) -> str:
        return f"<layer {self.kind.name} {self.name}>".replace(" >", ">")


@dataclass(frozen=True, eq=False)
class Site:
    """What a layer's definition works with: the place where the layer is being applied."""

    name: str
    layer: Layer
    draft: Draft
    nodes: list[Node] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)

    def parameter(self, suffix: str, shape: tuple[int, ...], role: Role, fan_in: int = 1) -> Tensor:
        """Declare the parameter `<layer>.<suffix>`."""
        full = f"{self.name}.{suffix}"
        value = self.draft.parameter(full, shape, Initial(role, fan_in), self.layer, self.layer.lines)
        self.parameters.append(full)
        return Tensor(value, self.draft)

    def call(self, op: Op, *inputs: Tensor | Value) -> Tensor:
        """Apply an operator of `cnnc.ops`; raises `ShapeError` with the layer's name and line."""
        values = []
        for source in inputs:
            if isinstance(source, Tensor) and source.draft is not self.draft:
                raise self.error("the tensors belong to different networks")
            values.append(source.value if isinstance(source, Tensor) else source)
        value = self.draft.apply(op, values, self.name, self.layer.lines)
        self.nodes.append(value.node)
        return Tensor(value, self.draft)

    def error(self, message: str) -> ShapeError:
        """Make the error for options that do not fit the input."""
        return ShapeError(f"{self.name}: {self.layer.kind.name}: {message}{trace(self.layer.lines)}")


class LayerKind(Composable, Generic[P]):
    """A kind of layer, such as `conv`: called with options it gives a layer, with a tensor first its result.

    A kind whose options all have defaults is a layer itself: `x >> relu`.
    """

    def __init__(self, define: Callable[Concatenate[Site, Tensor, P], Tensor]) -> None:
        self.define: Callable[..., Tensor] = define
        self.name = define.__name__.rstrip("_")
        self.__name__ = define.__name__
        self.__doc__ = define.__doc__
        signature = inspect.signature(define)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[2:])

    @overload
    def __call__(self, /, *args: P.args, **options: P.kwargs) -> Layer: ...

    @overload
    def __call__(self, x: Tensor, /, *args: P.args, **options: P.kwargs) -> Tensor: ...

    def __call__(self, /, *args: Any, **options: Any) -> Any:
        """Make a layer with these options; with a tensor before them, apply it too."""
        if args and isinstance(args[0], Tensor):
            return self._layer(args[1:], options)(args[0])
        return self._layer(args, options)

    def _layer(self, args: tuple[Any, ...], options: dict[str, Any]) -> Layer:
        try:
            self.__signature__.bind(*args, **options)
        except TypeError as error:
            plain = [p.replace(annotation=p.empty) for p in self.__signature__.parameters.values()]
            raise ModelError(f"{self.name}: {error}; it is {self.name}{inspect.Signature(plain)}{trace()}") from None
        return Layer(self, args, options, current_scope(), user_lines())

    def __repr__(self) -> str:
        return f"<layer {self.name}>"


def layer(define: Callable[Concatenate[Site, Tensor, P], Tensor]) -> LayerKind[P]:
    """Make a kind of layer from its definition: a function of the site, the input and options."""
    return LayerKind(define)


@layer
def identity(at: Site, x: Tensor) -> Tensor:
    """Give the input unchanged: the short way round a residual block."""
    return x


def _parts(piece: object) -> tuple[Function, ...]:
    return piece.parts if isinstance(piece, Chain) else (as_function(piece),)


def as_function(piece: object) -> Function:
    """Give a layer or function of one tensor as a function; raises `ModelError` for anything else."""
    if isinstance(piece, Tensor) or not callable(piece):
        raise ModelError(
            f"a layer or a function of one tensor is wanted, not {piece!r};"
            f" + and * bind tighter than >>, so a sum is written (x >> layer) + y{trace()}"
        )
    return piece


def _side_by_side(op: Op, left: object, right: object) -> Branches:
    return Branches((as_function(left), as_function(right)), lambda a, b: apply(op, a, b))
