"""Check one node against its operator's schema: inputs, outputs, attributes and their types."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import onnx
from onnx import AttributeProto

from cnnc.errors import ModelError
from cnnc.frontends.onnx.functions import FunctionKey, function_key, plain_domain
from cnnc.frontends.onnx.naming import nearest, shown

_SINGLE = {"f": "FLOAT", "i": "INT", "s": "STRING", "t": "TENSOR", "g": "GRAPH"} | {
    "tp": "TYPE_PROTO",
    "sparse_tensor": "SPARSE_TENSOR",
}
_REPEATED = {"floats": "FLOATS", "ints": "INTS", "strings": "STRINGS", "tensors": "TENSORS", "graphs": "GRAPHS"} | {
    "type_protos": "TYPE_PROTOS",
    "sparse_tensors": "SPARSE_TENSORS",
}
_TYPES = frozenset(AttributeProto.AttributeType.values()) - {AttributeProto.UNDEFINED}


@dataclass(frozen=True)
class Signature:
    """What a node of one operator may look like."""

    attributes: Mapping[str, str]
    """Attribute types by name, as ONNX writes them: INT, FLOATS, ...; empty text for any."""
    required: Collection[str]
    inputs: tuple[int, int]
    """Fewest and most."""
    outputs: tuple[int, int]
    needed: tuple[bool, ...]
    """For each input position, whether it may not be left out by an empty name."""


@lru_cache(maxsize=1024)
def standard_signature(op_type: str, opset: int) -> Signature | None:
    """Give the signature of an ONNX operator at an opset; None for one that ONNX does not have.

    Raises `ModelError` for an operator that exists, but not at this opset.
    """
    try:
        schema: Any = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        if not onnx.defs.has(op_type, ""):
            return None
        first = min(
            s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == op_type and not s.domain
        )
        raise ModelError(f"came with opset {first}, the model declares opset {opset}") from None
    if schema.deprecated:
        raise ModelError(f"was taken out of ONNX with opset {schema.since_version}, the model declares opset {opset}")
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    return Signature(
        attributes={name: attribute.type.name for name, attribute in schema.attributes.items()},
        required=frozenset(name for name, attribute in schema.attributes.items() if attribute.required),
        inputs=(schema.min_input, schema.max_input),
        outputs=(schema.min_output, schema.max_output),
        needed=tuple(parameter.option == single for parameter in schema.inputs),
    )


def function_signature(function: onnx.FunctionProto) -> Signature:
    """Give the signature of a model's own function (all its inputs may be left out)."""
    defaults = {attribute.name: _type_name(attribute) for attribute in function.attribute_proto}
    return Signature(
        attributes=dict.fromkeys(function.attribute, "") | defaults,
        required=frozenset(function.attribute),
        inputs=(0, len(function.input)),
        outputs=(0, len(function.output)),
        needed=(),
    )


def check_node(
    node: onnx.NodeProto,
    opset: int,
    functions: Mapping[FunctionKey, onnx.FunctionProto],
    parameters: Collection[str] | None,
) -> None:
    """Check a node against its schema or the function it calls; unknown operators are left to the importer.

    `parameters` are the attributes of the function the node stands in, None outside of functions.
    Raises `ModelError`; the message does not name the node.
    """
    if not node.op_type:
        raise ModelError("has no operator")
    names: set[str] = set()
    for attribute in node.attribute:
        if attribute.name in names:
            raise ModelError(f"attribute {shown(attribute.name)} is given twice")
        names.add(attribute.name)
        check_attribute(attribute, parameters)
    function = functions.get(function_key(node))
    if function is not None:
        _check(node, function_signature(function))
    elif plain_domain(node.domain) == "":
        signature = standard_signature(node.op_type, opset)
        if signature is not None:
            _check(node, signature)


def check_attribute(attribute: AttributeProto, parameters: Collection[str] | None) -> None:
    """Check that an attribute has a name and exactly the value its type says, or refers to a function's attribute."""
    name = shown(attribute.name)
    if not attribute.name:
        raise ModelError("an attribute has no name")
    stored = [kind for field, kind in _SINGLE.items() if attribute.HasField(field)]
    stored += [kind for field, kind in _REPEATED.items() if len(getattr(attribute, field))]
    if attribute.ref_attr_name:
        if stored:
            raise ModelError(f"attribute {name} both has a value and refers to {shown(attribute.ref_attr_name)}")
        if parameters is None:
            raise ModelError(f"attribute {name} refers to a function's attribute, but stands in no function")
        if attribute.ref_attr_name not in parameters:
            hint = nearest(attribute.ref_attr_name, parameters)
            raise ModelError(
                f"attribute {name} refers to {shown(attribute.ref_attr_name)}, which its function does not have{hint}"
            )
        return
    declared = _type_name(attribute)
    if len(stored) > 1:
        raise ModelError(f"attribute {name} has values of several types: {', '.join(stored)}")
    if stored and stored[0] != declared:
        raise ModelError(f"attribute {name} is declared {declared}, but holds {stored[0]}")
    if not stored and declared in ("TENSOR", "GRAPH", "TYPE_PROTO", "SPARSE_TENSOR"):
        raise ModelError(f"attribute {name} is declared {declared}, but holds nothing")


def _type_name(attribute: AttributeProto) -> str:
    if attribute.type not in _TYPES:
        raise ModelError(f"attribute {shown(attribute.name)} has no type ({attribute.type})")
    return AttributeProto.AttributeType.Name(attribute.type)


def _check(node: onnx.NodeProto, signature: Signature) -> None:
    for attribute in node.attribute:
        wanted = signature.attributes.get(attribute.name)
        if wanted is None:
            hint = nearest(attribute.name, signature.attributes)
            raise ModelError(f"has no attribute {shown(attribute.name)}{hint}")
        if wanted and _type_name(attribute) != wanted:
            raise ModelError(f"attribute {shown(attribute.name)} is {_type_name(attribute)}, not {wanted}")
    given = {attribute.name for attribute in node.attribute}
    for name in signature.required:
        if name not in given:
            raise ModelError(f"needs the attribute {shown(name)}")
    _check_count("inputs", len(node.input), signature.inputs)
    _check_count("outputs", len(node.output), signature.outputs)
    for position, (name, needed) in enumerate(zip(node.input, signature.needed, strict=False)):
        if needed and not name:
            raise ModelError(f"input {position} is left out, but has no default")


def _check_count(what: str, got: int, bounds: tuple[int, int]) -> None:
    fewest, most = bounds
    if not fewest <= got <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} or more" if most > 1 << 20 else f"{fewest} to {most}"
        raise ModelError(
            f"takes {wanted} {what}, not {got}" if what == "inputs" else f"gives {wanted} {what}, not {got}"
        )
