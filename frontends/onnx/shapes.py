"""Input shapes: what the model declares, what the caller binds, and declared types against inferred ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import onnx

from cnnc.errors import ModelError, UnsupportedError, UsageError
from cnnc.frontends.onnx.naming import listed, nearest, shown
from cnnc.frontends.onnx.tensors import NUMPY, check_dims, dtype_name
from cnnc.ir.types import DType, TensorType, format_shape
from cnnc.options import Limits

_DTYPES = {dtype.numpy: dtype for dtype in DType}
_Declared = tuple[int | str | None, ...]
"""A declared shape: sizes, names of symbolic ones, None for those without either."""


_NO_NAMES = ("", "?", "None")
"""What exporters write for an open dimension without a name; two of them need not be equal."""


def element_type(number: int) -> DType:
    """Give the graph's dtype for an ONNX element type; raises `UnsupportedError` for one it does not have."""
    dtype = _DTYPES.get(NUMPY[number]) if number in NUMPY else None
    if dtype is None:
        raise UnsupportedError(f"elements of type {dtype_name(number)} (supported: {', '.join(DType)})")
    return dtype


def type_proto(type_: TensorType) -> onnx.TypeProto:
    """Write a graph type as ONNX has it."""
    number = next(n for n, dtype in NUMPY.items() if dtype == type_.dtype.numpy)
    return onnx.helper.make_tensor_type_proto(number, type_.static_shape)


def declared_shape(tensor_type: onnx.TypeProto.Tensor) -> _Declared | None:
    """Give a declared shape, None where the model says nothing about it.

    Old Paddle exporters write an open dimension as -1 or 0: where a shape has a -1, both are open.
    """
    if not tensor_type.HasField("shape"):
        return None
    open_marks = (-1, 0) if _has_negative(tensor_type) else ()
    return tuple(
        (None if dim.dim_value in open_marks else dim.dim_value)
        if dim.HasField("dim_value")
        else (None if dim.dim_param in _NO_NAMES else dim.dim_param)
        for dim in tensor_type.shape.dim
    )


def _has_negative(tensor_type: onnx.TypeProto.Tensor) -> bool:
    return any(dim.dim_value == -1 for dim in tensor_type.shape.dim)


def bind_inputs(
    values: Sequence[onnx.ValueInfoProto],
    shapes: Mapping[str, Sequence[int]] | None,
    batch: int | None,
    limits: Limits,
) -> list[TensorType]:
    """Give the inputs' types, every dimension a number.

    `shapes` sets whole shapes by input name, `batch` the leading dimension where the model leaves it open; equal
    symbolic names get equal numbers.  A leading dimension still open becomes 1, with a warning.  Raises `UsageError`
    for shapes that contradict the model, `UnsupportedError` for dimensions still open and for inputs that are no
    tensors.
    """
    asked = dict(shapes or {})
    names = [value.name for value in values]
    for name in asked:
        if name not in names:
            raise UsageError(
                f"there is no input {shown(name)} to give a shape{nearest(name, names)}; inputs: {listed(names)}"
            )
    if batch is not None and batch < 0:
        raise UsageError(f"batch {batch} is negative")
    declared = [_declared_or_asked(value, asked.get(value.name)) for value in values]
    symbols: dict[str, int] = {}
    for value, shape in zip(values, declared, strict=True):
        if value.name in asked:
            _unify(value.name, shape, tuple(asked[value.name]), symbols)
    for shape in declared:
        if batch is not None and shape and isinstance(shape[0], str):
            symbols.setdefault(shape[0], batch)
    _bind_leading(names, declared, asked, symbols)
    types = []
    for value, shape in zip(values, declared, strict=True):
        sizes = tuple(asked[value.name]) if value.name in asked else _bound(shape, symbols, batch)
        if batch is not None and value.name not in asked and sizes and sizes[0] not in (None, batch):
            raise UsageError(f"input {shown(value.name)} has the fixed leading dimension {sizes[0]}, not batch {batch}")
        types.append(_complete(value, shape, sizes, limits))
    return types


def _declared_or_asked(value: onnx.ValueInfoProto, asked: Sequence[int] | None) -> _Declared:
    name = shown(value.name)
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise UnsupportedError(f"input {name} is no tensor ({kind or 'no type'})")
    try:
        element_type(value.type.tensor_type.elem_type)
    except UnsupportedError as error:
        raise UnsupportedError(f"input {name}: {error}") from None
    shape = declared_shape(value.type.tensor_type)
    if asked is None and _has_negative(value.type.tensor_type):
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        raise ModelError(
            f"input {name} has a negative dimension in {sizes}; if it stands for any size, give the shape: "
            f"--shape {name[1:-1]}=1x3x224x224"
        )
    if shape is None:
        if asked is None:
            raise UnsupportedError(f"input {name} has no shape; give one: --shape {value.name}=1x3x224x224")
        return (None,) * len(asked)
    return shape


def _unify(name: str, shape: _Declared, asked: tuple[int, ...], symbols: dict[str, int]) -> None:
    text = format_shape(asked)
    if len(shape) != len(asked):
        raise UsageError(f"input {shown(name)} has {len(shape)} dimensions, the shape {text} asked for {len(asked)}")
    for size, want in zip(shape, asked, strict=True):
        if want < 0 or (isinstance(size, int) and size != want):
            raise UsageError(f"input {shown(name)} is {_format(shape)} in the model; it cannot be {text}")
        if isinstance(size, str) and symbols.setdefault(size, want) != want:
            raise UsageError(f"dimension {shown(size)} would be both {symbols[size]} and {want} (input {shown(name)})")


def _bind_leading(
    names: Sequence[str], declared: Sequence[_Declared], asked: Mapping[str, object], symbols: dict[str, int]
) -> None:
    for name, shape in zip(names, declared, strict=True):
        if name not in asked and shape and isinstance(shape[0], str) and shape[0] not in symbols:
            symbols[shape[0]] = 1
            warnings.warn(
                f"input {shown(name)}: the batch dimension {shown(shape[0])} is open; it is taken as 1 "
                "(--batch N compiles for another)",
                stacklevel=5,
            )


def _bound(shape: _Declared, symbols: Mapping[str, int], batch: int | None) -> tuple[int | None, ...]:
    sizes = [symbols.get(size) if isinstance(size, str) else size for size in shape]
    if sizes and sizes[0] is None:
        sizes[0] = 1 if batch is None else batch
    return tuple(sizes)


def _complete(
    value: onnx.ValueInfoProto, shape: _Declared, sizes: tuple[int | None, ...], limits: Limits
) -> TensorType:
    known = tuple(size for size in sizes if size is not None)
    if len(known) < len(sizes):
        example = "x".join("224" if size is None else str(size) for size in sizes)
        raise UnsupportedError(
            f"input {shown(value.name)} has open dimensions {_format(shape)}; give its shape: "
            f"--shape {shown(value.name)[1:-1]}={example}"
        )
    check_dims(known, limits)
    return TensorType(known, element_type(value.type.tensor_type.elem_type))


def _format(shape: _Declared) -> str:
    return (
        "["
        + ",".join("?" if size is None else shown(size)[1:-1] if isinstance(size, str) else str(size) for size in shape)
        + "]"
    )


def check_declared(value: onnx.ValueInfoProto, inferred: TensorType) -> None:
    """Compare what a model declares of a value with what it is; raises `ModelError` where they differ.

    Symbolic dimensions agree with anything.
    """
    if not value.HasField("type"):
        return
    kind = value.type.WhichOneof("value")
    if kind is None:
        return
    if kind != "tensor_type":
        raise ModelError(f"{shown(value.name)} is declared {kind}, but it is the tensor {inferred}")
    tensor_type = value.type.tensor_type
    shape = declared_shape(tensor_type)
    fits = NUMPY.get(tensor_type.elem_type) == inferred.dtype.numpy
    if shape is not None:
        sizes = inferred.static_shape
        fits = fits and len(shape) == len(sizes)
        fits = fits and all(not isinstance(a, int) or a == b for a, b in zip(shape, sizes, strict=False))
    if not fits:
        text = "" if shape is None else _format(shape)
        raise ModelError(
            f"{shown(value.name)} is declared {dtype_name(tensor_type.elem_type)}{text}, but it is {inferred}"
        )
