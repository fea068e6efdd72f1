"""Walk the bytes of a protobuf message before it is parsed.

Parsing first and asking later is unsafe: 2 MB of empty nodes become gigabytes of objects, a length that points past
the end gives a message without a position, and names that are no UTF-8 come out as bytes.  The walk reads only tags
and lengths (field table from the message descriptors), so it bounds what parsing will cost and says where a file is
damaged.  Wire format: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx

from cnnc.errors import LimitError, ModelError
from cnnc.frontends.onnx.naming import shown
from cnnc.options import Limits, format_bytes

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_TYPE_DOUBLE, _TYPE_FLOAT, _TYPE_STRING, _TYPE_MESSAGE, _TYPE_BYTES = 1, 2, 9, 11, 12
_MAX_MESSAGES = 100
"""Protobuf's own parsers stop at this nesting."""
_FREE_TEXT = frozenset({"doc_string", "value", "denotation", "producer_name", "producer_version"})
"""String fields that are no names: neither their length nor their characters matter to a compile."""


@dataclass(frozen=True)
class _Field:
    name: str
    wire: int
    packable: bool
    is_text: bool
    child: _Message | None


@dataclass
class _Message:
    """The fields of one message type, by number (mutable while the table is built: types refer to one another)."""

    name: str
    fields: dict[int, _Field] = field(default_factory=dict)


@dataclass
class _Frame:
    message: _Message
    end: int
    label: str
    counts: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Survey:
    """What the walk counted."""

    fields: int
    nodes: int
    unknown: tuple[str, ...]
    """Fields that this version of ONNX does not have, by path; parsing drops them."""


def _message_table(descriptor: Any, known: dict[str, _Message]) -> _Message:
    if descriptor.full_name in known:
        return known[descriptor.full_name]
    message = known[descriptor.full_name] = _Message(descriptor.name)
    for entry in descriptor.fields:
        wire = {_TYPE_DOUBLE: _FIXED64, _TYPE_FLOAT: _FIXED32}.get(entry.type, _VARINT)
        child = None
        if entry.type in (_TYPE_STRING, _TYPE_BYTES, _TYPE_MESSAGE):
            wire = _BYTES
        if entry.type == _TYPE_MESSAGE:
            child = _message_table(entry.message_type, known)
        is_text = entry.type == _TYPE_STRING
        packable = entry.is_repeated and wire != _BYTES
        message.fields[entry.number] = _Field(entry.name, wire, packable, is_text, child)
    return message


_MODEL = _message_table(onnx.ModelProto.DESCRIPTOR, {})


class _Walk:
    """One walk over one file; an explicit stack, so that nesting cannot exhaust Python's."""

    def __init__(self, data: bytes, limits: Limits) -> None:
        self.data = data
        self.limits = limits
        self.stack = [_Frame(_MODEL, len(data), "")]
        self.fields = 0
        self.nodes = 0
        self.graphs = 0
        self.unknown: list[str] = []

    def run(self) -> Survey:
        """Walk to the end; raises `ModelError` for damage, `LimitError` for too much of anything."""
        position = 0
        while self.stack:
            frame = self.stack[-1]
            if position < frame.end:
                position = self._field(frame, position)
                continue
            self.stack.pop()
            self.graphs -= frame.message.name == "GraphProto"
        return Survey(self.fields, self.nodes, tuple(self.unknown))

    def _field(self, frame: _Frame, start: int) -> int:
        self.fields += 1
        if self.fields > self.limits.fields:
            raise LimitError(f"more than {self.limits.fields} protobuf fields (limit fields={self.limits.fields})")
        # One-byte tags and lengths, nearly all of them, are read in place: millions are read here.
        tag = self.data[start]
        position = start + 1
        if tag > 0x7F:
            tag, position = self._varint(frame, start)
        number, wire = tag >> 3, tag & 7
        known = frame.message.fields.get(number)
        if known is None or (wire != known.wire and not (wire == _BYTES and known.packable)):
            return self._unknown(frame, number, wire, known, start, position)
        if wire == _VARINT:
            return self._varint(frame, position)[1]
        if wire != _BYTES:
            return self._fixed(frame, wire, position)
        if position < frame.end and self.data[position] < 0x80:
            length = self.data[position]
            position += 1
        else:
            length, position = self._varint(frame, position)
        end = position + length
        if end > frame.end:
            raise self._overrun(frame, known.name, length, position)
        if known.child is not None:
            self._enter(frame, number, known, known.child, end)
            return position
        if known.is_text:
            self._text(known.name, position, end)
        return end

    def _enter(self, frame: _Frame, number: int, entry: _Field, child: _Message, end: int) -> None:
        index = frame.counts.get(number, 0)
        frame.counts[number] = index + 1
        self.stack.append(_Frame(child, end, f"{entry.name}[{index}]"))
        if child.name == "NodeProto":
            self.nodes += 1
            if self.nodes > self.limits.nodes:
                raise LimitError(f"more than {self.limits.nodes} nodes (limit nodes={self.limits.nodes})")
        elif child.name == "GraphProto":
            self.graphs += 1
            if self.graphs > self.limits.subgraph_depth + 1:
                raise LimitError(
                    f"subgraphs nest deeper than {self.limits.subgraph_depth} "
                    f"(limit subgraph_depth={self.limits.subgraph_depth})"
                )
        if len(self.stack) > _MAX_MESSAGES:
            raise LimitError(f"protobuf messages nest deeper than {_MAX_MESSAGES}")

    def _text(self, name: str, start: int, end: int) -> None:
        raw = self.data[start:end]
        if name not in _FREE_TEXT:
            if len(raw) > self.limits.name:
                raise LimitError(f"{self._path()}: {name} is {len(raw)} bytes long (limit name={self.limits.name})")
            if b"\0" in raw:
                raise ModelError(f"{self._path()}: {name} contains a NUL character: {shown(raw.decode('latin-1'))}")
        try:
            raw.decode()
        except UnicodeDecodeError:
            text = shown(raw.decode("latin-1"))
            raise ModelError(f"{self._path()}: {name} is not valid UTF-8: {text} (read as Latin-1)") from None

    def _varint(self, frame: _Frame, position: int) -> tuple[int, int]:
        value = shift = 0
        while position < frame.end:
            byte = self.data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
            if shift >= 70:
                raise self._damaged("an integer has more than 10 bytes", position)
        raise self._overrun(frame, "an integer", 1, position)

    def _fixed(self, frame: _Frame, wire: int, position: int) -> int:
        end = position + (8 if wire == _FIXED64 else 4)
        if end > frame.end:
            raise self._overrun(frame, "a number", end - position, position)
        return end

    def _unknown(self, frame: _Frame, number: int, wire: int, known: _Field | None, start: int, position: int) -> int:
        if number == 0 or wire not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise self._damaged(f"field number {number} with wire type {wire}", start)
        if known is not None:
            raise self._damaged(f"field {known.name} has wire type {wire}, not {known.wire}", start)
        if len(self.unknown) < 8:
            self.unknown.append(f"{self._path()}, field number {number}")
        if wire == _VARINT:
            return self._varint(frame, position)[1]
        if wire != _BYTES:
            return self._fixed(frame, wire, position)
        length, position = self._varint(frame, position)
        if position + length > frame.end:
            raise self._overrun(frame, f"field number {number}", length, position)
        return position + length

    def _path(self) -> str:
        return ".".join(frame.label for frame in self.stack[1:]) or "the model"

    @property
    def _looks_like_onnx(self) -> bool:
        return self.data[:1] == b"\x08" and not self.unknown

    def _damaged(self, what: str, position: int) -> ModelError:
        if len(self.stack) == 1 and not self._looks_like_onnx:
            return ModelError(f"not an ONNX file: {what} at byte {position} of {len(self.data)}")
        return ModelError(f"damaged at byte {position} of {len(self.data)}, in {self._path()}: {what}")

    def _overrun(self, frame: _Frame, name: str, length: int, position: int) -> ModelError | LimitError:
        left = frame.end - position
        if len(self.stack) > 1 or not self._looks_like_onnx:
            return self._damaged(f"{name} takes {length} bytes where {left} are left", position)
        total = position + length
        if total > self.limits.file:
            return LimitError(
                f"its field {name} claims {format_bytes(length)} (limit file={format_bytes(self.limits.file)})"
            )
        return ModelError(
            f"cut short: the file has {len(self.data)} bytes, its field {name} ends at byte {total} "
            f"({total - len(self.data)} bytes are missing)"
        )


def survey(data: bytes, limits: Limits) -> Survey:
    """Check that the bytes are a well-formed `ModelProto` within the limits, without parsing them.

    Raises `ModelError` (3) for damage, naming the byte and the field, `LimitError` (5) for more than the limits allow.
    """
    return _Walk(data, limits).run()
