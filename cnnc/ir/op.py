"""Operators as a concept: the class every operator derives from, and the registry by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType

if TYPE_CHECKING:
    from cnnc.ir.graph import Value

OPERATORS: dict[str, type[Op]] = {}
"""Every operator class by its printed name; filled as the classes are defined."""


class Kind(IntEnum):
    """How an output element depends on the inputs; fusion reads nothing else (as in Hidet, ASPLOS'23, section 4.2)."""

    ELEMENTWISE = 0
    """Output element i needs input elements i only (after broadcasting)."""
    INJECTIVE = 1
    """Each output element needs one element of an input, anywhere: reshape, transpose, slice, concat."""
    REDUCTION = 2
    """An output element needs many input elements; a fused elementwise consumer is welcome."""
    OPAQUE = 3
    """Nothing may be fused across it."""


@dataclass(frozen=True)
class Example:
    """One use of an operator for the generic tests.

    `types` are the inputs'; `draw` makes the input arrays, for operators that do not take any number
    (indices, positive numbers); without it floats are uniform in [-1, 1) and integers in [-8, 8).
    """

    op: Op
    types: tuple[TensorType, ...]
    draw: Callable[[np.random.Generator], tuple[np.ndarray, ...]] | None = None

    def inputs(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Draw fresh inputs."""
        if self.draw is not None:
            return self.draw(rng)
        return tuple(random_array(rng, type_) for type_ in self.types)


def random_array(rng: np.random.Generator, type_: TensorType) -> np.ndarray:
    """Draw an array of a type: floats uniform in [-1, 1), integers in [-8, 8), unsigned in [0, 8)."""
    shape = type_.static_shape
    drawn: Any
    if type_.dtype.is_float:
        drawn = rng.random(shape) * 2 - 1
    elif type_.dtype is DType.BOOL:
        drawn = rng.random(shape) < 0.5
    else:
        drawn = rng.integers(0 if type_.dtype is DType.U8 else -8, 8, shape)
    return np.asarray(drawn).astype(type_.dtype.numpy)


@dataclass(frozen=True)
class Op:
    """An operator with its attributes: the fields of the dataclass.

    A subclass is an operator, an instance is the operator with attributes; instances are immutable and
    compare by value.  The docstring of a subclass gives the equation.  (`**_` in the signatures lets
    subclasses name their inputs; nothing is ever passed by keyword.)
    """

    kind: ClassVar[Kind] = Kind.OPAQUE

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            OPERATORS[snake_case(cls.__name__)] = cls

    @property
    def name(self) -> str:
        """The printed name: the class name in snake case."""
        return snake_case(type(self).__name__)

    @property
    def outputs(self) -> int:
        """The number of outputs, which attributes may decide."""
        return 1

    def infer(self, *types: Any, **_: Any) -> TensorType | tuple[TensorType, ...]:
        """Give the outputs' shapes and dtypes; raises `ShapeError` for inputs the operator cannot take.

        Layouts are not its business: see `infer_layout`.
        """
        raise TypeError(f"{self.name} defines no infer")

    def infer_layout(self, *types: Any, **_: Any) -> tuple[Layout | None, ...]:
        """Give the outputs' layouts; raises `ShapeError` for layouts the operator cannot take.

        The default takes and gives plain row-major tensors only.
        """
        for position, type_ in enumerate(types):
            if type_.layout is not None:
                raise ShapeError(f"{self.name}: input {position} is in layout {type_.layout}; it takes plain ones")
        return (None,) * self.outputs

    def reference(self, *arrays: Any, **_: Any) -> np.ndarray | tuple[np.ndarray, ...]:
        """Compute in numpy, on logical arrays, in the precision of the inputs: the definition."""
        raise TypeError(f"{self.name} defines no reference")

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Describe the outputs as tensor expressions.

        `xs` are TE tensors of the inputs' *physical* shapes, `types` the inputs' types; `te` is the vocabulary
        handed in by the back end (see `cnnc.backends.lower`), so that operators never import TVM.
        """
        raise TypeError(f"{self.name} defines no compute")

    def index_extents(self, *types: Any, **_: Any) -> dict[int, tuple[int, ...]]:
        """Say which inputs are indices that are data: position -> the extents the last axis' components index into.

        One extent means that every element is an index into it.  The back end has them checked at run time.
        """
        return {}

    def flops(self, *types: Any, **_: Any) -> int:
        """Count the arithmetic (a multiply-add is 2); by default one for each output element."""
        return sum(t.elements for t in as_tuple(self.infer(*types)))

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give uses of the operator that every generic test runs."""
        return ()


T = TypeVar("T")


def as_tuple(results: T | tuple[T, ...]) -> tuple[T, ...]:
    """Wrap a lone result."""
    return results if isinstance(results, tuple) else (results,)


@cache
def snake_case(name: str) -> str:
    """Write a class name as operators are printed: `ConvTranspose` -> `conv_transpose`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


class ForeignNode(Protocol):
    """What an operator's ONNX reader sees of the node it translates."""

    op_type: str
    opset: int
    name: str
    outputs: int
    """The number of outputs that are used."""

    def attr(self, name: str, default: Any = None) -> Any:
        """Give an attribute as int, float, str, tuple of those or numpy array; `default` where absent."""

    def const(self, value: Value | None) -> np.ndarray | None:
        """Give a compile-time constant input as an array (None for an absent input); otherwise unsupported."""

    def invalid(self, message: str) -> Exception:
        """Make the error for a node that means nothing (exit 3); `raise node.invalid(...)`."""

    def unsupported(self, message: str) -> Exception:
        """Make the error for a valid node that is not compiled (exit 4)."""


OnnxReader = Callable[..., Any]
ONNX_READERS: dict[tuple[str, str], OnnxReader] = {}
"""(domain, operator) -> function(node, *inputs) -> Value or tuple of Values; absent inputs are None."""


def onnx(*op_types: str, domain: str = "") -> Callable[[OnnxReader], OnnxReader]:
    """Register the ONNX meaning of an operator, beside the operator itself."""

    def register(reader: OnnxReader) -> OnnxReader:
        for op_type in op_types:
            ONNX_READERS[domain, op_type] = reader
        return reader

    return register
