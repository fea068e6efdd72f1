"""Tensors stored in a model: checked against their type and size, then decoded to numpy.

The check needs no data in memory and runs over every tensor of a model; decoding happens for those that are used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

from cnnc.errors import LimitError, ModelError, UnsupportedError
from cnnc.frontends.onnx.external import ExternalFolder
from cnnc.frontends.onnx.naming import shown
from cnnc.options import Limits, format_bytes

NUMPY: dict[int, np.dtype] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.DOUBLE: np.dtype(np.float64),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    TensorProto.INT8: np.dtype(np.int8),
    TensorProto.UINT8: np.dtype(np.uint8),
    TensorProto.INT16: np.dtype(np.int16),
    TensorProto.UINT16: np.dtype(np.uint16),
    TensorProto.INT32: np.dtype(np.int32),
    TensorProto.INT64: np.dtype(np.int64),
    TensorProto.UINT32: np.dtype(np.uint32),
    TensorProto.UINT64: np.dtype(np.uint64),
    TensorProto.BOOL: np.dtype(np.bool_),
}
"""The element types that can be decoded, by ONNX's number (the graph's own dtypes are fewer)."""

_BITS = {number: dtype.itemsize * 8 for number, dtype in NUMPY.items()} | {
    TensorProto.COMPLEX64: 64,
    TensorProto.COMPLEX128: 128,
}
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_TYPED_FIELD: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.STRING: "string_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.COMPLEX128: "double_data",
}
"""The field that holds a type's values where raw_data does not; int32_data for all others."""
_BIT_PATTERNS: tuple[int, ...] = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
"""Types whose int32_data entries are bit patterns, not values."""


_NUMBERS = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}


def dtype_name(number: int) -> str:
    """Give ONNX's name of an element type number; raises `ModelError` for a number it does not have."""
    if number not in _NUMBERS:
        raise ModelError(f"element type {number} does not exist in ONNX")
    return TensorProto.DataType.Name(number)


def check_dims(dims: Iterable[int], limits: Limits) -> int:
    """Give the element count of a shape, in exact integers; raises `ModelError` or `LimitError`."""
    sizes = tuple(dims)
    if len(sizes) > limits.rank:
        raise LimitError(f"{len(sizes)} dimensions (limit rank={limits.rank})")
    for size in sizes:
        if size < 0:
            raise ModelError(f"shape {list(sizes)} has a negative dimension")
        if size > limits.dim:
            raise LimitError(f"shape {list(sizes)} has a dimension above {limits.dim} (limit dim={limits.dim})")
    return math.prod(sizes)


def check_tensor(tensor: TensorProto, limits: Limits) -> int:
    """Check one stored tensor without decoding it, and give the bytes it takes.

    Raises `ModelError` where type, shape and stored values do not fit together, `LimitError` for one too large.
    """
    return _inspect(tensor, limits)[0]


def _inspect(tensor: TensorProto, limits: Limits) -> tuple[int, bytes]:
    """Check one stored tensor; gives its bytes in memory, and its raw_data (protobuf copies it at each access)."""
    name = dtype_name(tensor.data_type)
    count = check_dims(tensor.dims, limits)
    bits = _BITS.get(tensor.data_type)
    nbytes = (count * (bits or 8) + 7) // 8
    if nbytes > limits.tensor:
        raise LimitError(
            f"shape {list(tensor.dims)} of {name} takes {format_bytes(nbytes)} "
            f"(limit tensor={format_bytes(limits.tensor)})"
        )
    if tensor.HasField("segment"):
        raise ModelError("is stored in segments, which ONNX has never defined")
    raw = tensor.raw_data
    lengths = {"raw_data": len(raw)} | {field: len(getattr(tensor, field)) for field in _TYPED_FIELDS}
    used = [field for field, length in lengths.items() if length]
    if tensor.data_location == TensorProto.EXTERNAL:
        if used:
            raise ModelError(f"has external data and {used[0]}; only one can hold")
        _external_entries(tensor)
        return nbytes, raw
    if tensor.external_data:
        raise ModelError("has external_data entries, but its data_location is not EXTERNAL")
    if len(used) > 1:
        raise ModelError(f"has values in {' and in '.join(used)}; only one can hold")
    _check_amount(tensor, lengths, used[0] if used else None, count)
    return nbytes, raw


def _check_amount(tensor: TensorProto, lengths: Mapping[str, int], field: str | None, count: int) -> None:
    name, bits = dtype_name(tensor.data_type), _BITS.get(tensor.data_type)
    if field == "raw_data":
        if tensor.data_type == TensorProto.STRING:
            raise ModelError("strings cannot be in raw_data")
        if bits is None:
            return  # packed 4-bit numbers and 8-bit floats: never decoded
        wanted, unit = (count * bits + 7) // 8, "bytes in raw_data"
    else:
        right = _TYPED_FIELD.get(tensor.data_type, "int32_data")
        if field not in (None, right):
            raise ModelError(f"keeps {name} values in {field}; they belong in {right}")
        if bits is None and tensor.data_type != TensorProto.STRING:
            return
        each = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
        field, wanted, unit = right, count * each, f"values in {right}"
    if wanted != lengths[field]:
        raise ModelError(f"shape {list(tensor.dims)} of {name} needs {wanted} {unit}, not {lengths[field]}")


def _external_entries(tensor: TensorProto) -> dict[str, str]:
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in entries:
            raise ModelError(f"external data has {shown(entry.key)} twice")
        entries[entry.key] = entry.value
    if not entries.get("location"):
        raise ModelError("external data without a location")
    return entries


def decode_tensor(tensor: TensorProto, limits: Limits, folder: ExternalFolder | None) -> np.ndarray:
    """Check and decode one stored tensor, reading external data where it has any.

    Raises as `check_tensor`, and `UnsupportedError` for element types that have no numbers here (strings, 4-bit,
    8-bit floats, complex).
    """
    raw = _inspect(tensor, limits)[1]
    dtype = NUMPY.get(tensor.data_type)
    if dtype is None:
        raise UnsupportedError(f"elements of type {dtype_name(tensor.data_type)}")
    array = _array(tensor, raw, dtype, folder)
    if array.size > 1 and dtype.kind in "fV" and not np.isfinite(array).all():
        warnings.warn(f"{tensor_title(tensor)} has NaN or infinite values", stacklevel=2)
    return array


def _array(tensor: TensorProto, raw: bytes, dtype: np.dtype, folder: ExternalFolder | None) -> np.ndarray:
    shape = tuple(tensor.dims)
    if tensor.data_location == TensorProto.EXTERNAL:
        if folder is None:
            raise ModelError("external data, but the model came as bytes: give its path, or load the data into it")
        nbytes = math.prod(shape) * dtype.itemsize
        return _from_raw(folder.read(_external_entries(tensor), nbytes), dtype).reshape(shape)
    if raw:
        return _from_raw(raw, dtype).reshape(shape)
    return _from_typed(tensor, dtype).reshape(shape)


def _from_raw(raw: bytes, dtype: np.dtype) -> np.ndarray:
    if dtype == np.bool_ and raw.translate(None, b"\0\1"):
        raise ModelError("BOOL values in raw_data other than 0 and 1")
    return np.frombuffer(raw, dtype)  # little-endian on both sides: every target of cnnc is


def _from_typed(tensor: TensorProto, dtype: np.dtype) -> np.ndarray:
    field = _TYPED_FIELD.get(tensor.data_type, "int32_data")
    values = np.array(getattr(tensor, field), _FIELD_DTYPES[field])
    if values.dtype == dtype:
        return values
    low, high = (0, 0xFFFF) if tensor.data_type in _BIT_PATTERNS else _value_range(dtype)
    if values.size and not (low <= int(values.min()) and int(values.max()) <= high):
        raise ModelError(f"{field} has values outside {low}..{high}, the range of {dtype_name(tensor.data_type)}")
    if tensor.data_type in _BIT_PATTERNS:
        return values.astype(np.uint16).view(dtype)
    return values.astype(dtype)


_FIELD_DTYPES = {
    "float_data": np.float32,
    "double_data": np.float64,
    "int32_data": np.int32,
    "int64_data": np.int64,
    "uint64_data": np.uint64,
}


def _value_range(dtype: np.dtype) -> tuple[int, int]:
    if dtype == np.bool_:
        return 0, 1
    bounds = np.iinfo(dtype)
    return int(bounds.min), int(bounds.max)


def tensor_title(tensor: TensorProto) -> str:
    """Name a stored tensor in a message."""
    return f"initializer {shown(tensor.name)}" if tensor.name else "a tensor without a name"


def total_bytes(tensors: Iterable[onnx.TensorProto], limits: Limits) -> int:
    """Check every tensor and their sum against the limits; messages name the tensor."""
    total = 0
    for tensor in tensors:
        try:
            total += check_tensor(tensor, limits)
        except (ModelError, LimitError) as error:
            raise type(error)(f"{tensor_title(tensor)}: {error}") from None
        if total > limits.memory:
            raise LimitError(f"the weights take more than {format_bytes(limits.memory)} (limit memory)")
    return total
