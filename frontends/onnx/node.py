"""What an operator's ONNX reader sees of a node: attributes, opset, constants, and ways to refuse.

It is the front end's `cnnc.ir.op.ForeignNode`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto

from cnnc.errors import ModelError, UnsupportedError
from cnnc.frontends.onnx.external import ExternalFolder
from cnnc.frontends.onnx.functions import plain_domain
from cnnc.frontends.onnx.naming import shown
from cnnc.frontends.onnx.tensors import decode_tensor
from cnnc.ir.graph import Value
from cnnc.ops.source import Constant
from cnnc.options import Limits


class OnnxNode:
    """One node as an operator's reader sees it.

    It notes which attributes were asked for: one that is given, differs from its default and was never looked at
    would be ignored silently, so the importer refuses the node instead.
    """

    def __init__(
        self,
        proto: onnx.NodeProto,
        opset: int,
        name: str,
        outputs: int,
        attributes: Mapping[str, AttributeProto],
        limits: Limits,
        folder: ExternalFolder | None,
    ) -> None:
        self.proto = proto
        self.op_type = proto.op_type
        self.domain = plain_domain(proto.domain)
        self.opset = opset
        self.name = name
        self.outputs = outputs
        self.attributes = attributes
        self.limits = limits
        self.folder = folder
        self._read: set[str] = set()

    def attr(self, name: str, default: Any = None) -> Any:
        """Give an attribute as int, float, str, tuple of those or numpy array; `default` where absent."""
        self._read.add(name)
        attribute = self.attributes.get(name)
        return default if attribute is None else self._value(attribute)

    def const(self, value: Value | None) -> np.ndarray | None:
        """Give a compile-time constant input as an array (None for an absent input); otherwise unsupported."""
        if value is None:
            return None
        if not isinstance(value.op, Constant):
            raise self.unsupported(
                f"needs an input that is known at compile time; {value.type} is computed at run time"
            )
        return value.op.value.array

    def invalid(self, message: str) -> Exception:
        """Make the error for a node that means nothing (exit 3)."""
        return ModelError(message)

    def unsupported(self, message: str) -> Exception:
        """Make the error for a valid node that is not compiled (exit 4)."""
        return UnsupportedError(message)

    def unread(self) -> list[str]:
        """Give the attributes that are given, but were not asked for and are not at their default."""
        defaults = schema_defaults(self)
        names = []
        for name, attribute in self.attributes.items():
            default = defaults.get(name)
            if name in self._read or (default is not None and self._value(default) == self._value(attribute)):
                continue
            names.append(name)
        return names

    def resolved_proto(self) -> onnx.NodeProto:
        """Give the node as a protobuf of its own, with its attributes' values in place of references."""
        proto = onnx.NodeProto.FromString(self.proto.SerializeToString())
        del proto.attribute[:]
        for name, attribute in self.attributes.items():
            proto.attribute.add().CopyFrom(attribute)
            proto.attribute[-1].name = name
        return proto

    def _value(self, attribute: AttributeProto) -> Any:
        kind = attribute.type
        if kind == AttributeProto.INT:
            return attribute.i
        if kind == AttributeProto.FLOAT:
            return attribute.f
        if kind == AttributeProto.STRING:
            return self._text(attribute.name, attribute.s)
        if kind == AttributeProto.INTS:
            return tuple(attribute.ints)
        if kind == AttributeProto.FLOATS:
            return tuple(attribute.floats)
        if kind == AttributeProto.STRINGS:
            return tuple(self._text(attribute.name, s) for s in attribute.strings)
        if kind == AttributeProto.TENSOR:
            return decode_tensor(attribute.t, self.limits, self.folder)
        raise self.unsupported(f"attribute {shown(attribute.name)} of type {AttributeProto.AttributeType.Name(kind)}")

    def _text(self, name: str, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.invalid(f"attribute {shown(name)} is not valid UTF-8") from None


def schema_defaults(node: OnnxNode) -> Mapping[str, AttributeProto]:
    """Give the attribute values that hold for an ONNX operator where a node gives none."""
    return _schema_defaults(node.op_type, node.opset, node.domain)


@lru_cache(maxsize=1024)
def _schema_defaults(op_type: str, opset: int, domain: str) -> Mapping[str, AttributeProto]:
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return {}
    return {
        name: attribute.default_value
        for name, attribute in schema.attributes.items()
        if attribute.default_value.type != AttributeProto.UNDEFINED
    }


def resolve_attributes(node: onnx.NodeProto, given: Mapping[str, AttributeProto] | None) -> dict[str, AttributeProto]:
    """Give a node's attributes by name, references to the calling function's attributes replaced by their values.

    A reference to an attribute that the call leaves out leaves it out here too, as ONNX says.
    """
    resolved: dict[str, AttributeProto] = {}
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            resolved[attribute.name] = attribute
            continue
        value = (given or {}).get(attribute.ref_attr_name)
        if value is None:
            continue
        if attribute.type != value.type:
            raise ModelError(
                f"attribute {shown(attribute.name)} is {AttributeProto.AttributeType.Name(attribute.type)}, but the "
                f"call gives {AttributeProto.AttributeType.Name(value.type)} for {shown(attribute.ref_attr_name)}"
            )
        resolved[attribute.name] = value
    return resolved


def used_outputs(names: Sequence[str], live: set[str]) -> int:
    """Count a node's outputs up to the last one that anything reads."""
    return max((i + 1 for i, name in enumerate(names) if name in live), default=0)
