"""Read a model file: path to bytes to `ModelProto`, once, from regular files only.

Whatever is read is what is compiled; a file replaced meanwhile changes nothing.  Nothing is unpickled or
unpacked: other formats are recognised by their first bytes and refused by name.
"""

from __future__ import annotations

import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError

from cnnc.errors import CnncError, EnvironmentProblem, LimitError, ModelError
from cnnc.frontends.onnx.external import ExternalFolder
from cnnc.frontends.onnx.naming import listed
from cnnc.frontends.onnx.wire import survey
from cnnc.options import Limits, format_bytes

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"PK\x03\x04", "a zip archive (PyTorch .pt, Keras .keras or .npz): export it with torch.onnx.export"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (0, b"\x1f\x8b", "gzip data: unpack it first"),
    (0, b"BZh", "bzip2 data: unpack it first"),
    (0, b"\xfd7zXZ", "xz data: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstandard data: unpack it first"),
    (0, b"\x89HDF", "an HDF5 file (Keras .h5): export it with tf2onnx"),
    (0, b"\x93NUMPY", "a numpy array file"),
    (0, b"\x7fELF", "a compiled ELF binary"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the model: fetch it with `git lfs pull`"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (4, b"ORTM", "an onnxruntime .ort model: convert the original .onnx instead"),
    (8, b'{"', "a safetensors file: weights without a network"),
)


@dataclass(frozen=True)
class ModelFile:
    """A model as read: its protobuf, and where it came from."""

    proto: onnx.ModelProto
    label: str
    """How messages name it: the path as given, or `<model>`."""
    folder: ExternalFolder | None
    """Where external data may be read from; None for a model that came as bytes."""


def read_model(source: str | os.PathLike[str] | bytes | onnx.ModelProto, limits: Limits) -> ModelFile:
    """Read and parse a model from a path, its bytes, or a `ModelProto` (which is copied).

    Raises `ModelError` (3) for what is no ONNX file, `LimitError` (5) for one too large, `EnvironmentProblem` (6)
    where the file cannot be opened.
    """
    if isinstance(source, onnx.ModelProto):
        return _parse(_serialized(source, limits), "<model>", None, limits)
    if isinstance(source, bytes):
        return _parse(source, "<model>", None, limits)
    path = Path(source)
    label = repr(str(path))[1:-1]
    try:
        data = _read_file(path, limits)
    except CnncError as error:
        raise type(error)(f"{label}: {error}") from None
    return _parse(data, label, ExternalFolder(path.parent), limits)


def _serialized(model: onnx.ModelProto, limits: Limits) -> bytes:
    size = model.ByteSize()
    if size > limits.file:
        raise LimitError(f"<model>: {format_bytes(size)} of protobuf (limit file={format_bytes(limits.file)})")
    try:
        return model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ModelError(f"<model>: cannot be serialised: {_one_line(error)}") from None


def _read_file(path: Path, limits: Limits) -> bytes:
    text = os.fspath(path)
    if "\0" in text:
        raise ModelError("the path contains a NUL character")
    try:
        # A look before opening: to open a FIFO or a device can block or have effects; the descriptor is
        # checked again below, so a swap in between gains nothing.
        _require_regular(os.stat(path).st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise EnvironmentProblem(f"cannot be opened: {error.strerror or error}") from None
    try:
        status = os.fstat(descriptor)
        _require_regular(status.st_mode)
        if status.st_size > limits.file:
            raise LimitError(f"{format_bytes(status.st_size)} (limit file={format_bytes(limits.file)})")
        return _read_all(descriptor, status.st_size, limits)
    except OSError as error:
        raise EnvironmentProblem(f"cannot be read: {error.strerror or error}") from None
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, expected: int, limits: Limits) -> bytes:
    """Read to the end: as a rule in one piece, for the system reads at most 2 GiB at once."""
    chunks: list[bytes] = []
    total = 0
    while chunk := os.read(descriptor, max(expected - total + 1, 1 << 16)):
        total += len(chunk)
        if total > limits.file:
            raise LimitError(f"grew past {format_bytes(limits.file)} while it was read")
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _require_regular(mode: int) -> None:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    if not stat.S_ISREG(mode):
        raise ModelError(f"is {kinds.get(stat.S_IFMT(mode), 'no regular file')}, not a model file")


def _parse(data: bytes, label: str, folder: ExternalFolder | None, limits: Limits) -> ModelFile:
    try:
        _refuse_other_formats(data)
        if len(data) > limits.file:
            raise LimitError(f"{format_bytes(len(data))} (limit file={format_bytes(limits.file)})")
        unknown = survey(data, limits).unknown
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelError(f"{label}: not an ONNX file: {_one_line(error)}") from None
    except CnncError as error:
        raise type(error)(f"{label}: {error}") from None
    if unknown:
        warnings.warn(f"{label}: fields this ONNX version does not have are ignored: {listed(unknown)}", stacklevel=3)
    return ModelFile(proto, label, folder)


def _refuse_other_formats(data: bytes) -> None:
    if not data:
        raise ModelError("empty file")
    for offset, signature, what in _SIGNATURES:
        if data[offset : offset + len(signature)] == signature:
            raise ModelError(f"not an ONNX file but {what}")
    if data[0] == 0x80 and len(data) > 1 and data[1] in range(2, 6) and data[-1:] == b".":
        raise ModelError("not an ONNX file but a Python pickle (PyTorch .pt or .pkl): export it with torch.onnx.export")
    if data[:512].lstrip()[:1] in (b"{", b"<", b"[", b"i") and _is_text(data[:512]):
        raise ModelError(
            "not an ONNX file but text (JSON, XML or protobuf text): ONNX in protobuf's binary form is needed"
        )


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in (9, 10, 13) for byte in head)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
