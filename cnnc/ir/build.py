"""The one door through which nodes are made: `call` runs inference, so no ill-typed node exists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from cnnc.errors import CnncError, LimitError, ShapeError
from cnnc.ir.graph import Node, Value
from cnnc.ir.op import Op, as_tuple
from cnnc.ir.types import TensorType

_current_loc: ContextVar[frozenset[str]] = ContextVar("loc", default=frozenset())


@contextmanager
def located(loc: Iterable[str]) -> Iterator[None]:
    """Give the nodes made inside this source location (names of ONNX nodes, DSL `file:line`)."""
    token = _current_loc.set(frozenset(loc))
    try:
        yield
    finally:
        _current_loc.reset(token)


def call(op: Op, *inputs: Value, loc: Iterable[str] | None = None) -> Value:
    """Apply an operator and give its first output (`.node.values` has all of them).

    Raises `ShapeError`, with the source location, where the operator cannot take such inputs.
    """
    where = _current_loc.get() if loc is None else frozenset(loc)
    try:
        types = infer_types(op, tuple(v.type for v in inputs))
    except (ShapeError, LimitError) as error:
        raise _located_error(error, where) from None
    return Value(Node(op, tuple(inputs), types, where))


def infer_types(op: Op, inputs: tuple[TensorType, ...]) -> tuple[TensorType, ...]:
    """Run an operator's shape and layout inference."""
    try:
        inferred = as_tuple(op.infer(*inputs))
    except TypeError as error:
        if "positional argument" not in str(error):
            raise
        raise ShapeError(f"{op.name}: takes another number of inputs than the {len(inputs)} given") from None
    layouts = op.infer_layout(*inputs)
    return tuple(t.with_layout(layout) for t, layout in zip(inferred, layouts, strict=True))


def _located_error(error: CnncError, loc: frozenset[str]) -> CnncError:
    if not loc:
        return error
    return type(error)(f"{error} (at {', '.join(sorted(loc))})")
