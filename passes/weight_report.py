"""What became of the weights where they were to be stored in 16 bits: which are, and all that stays f32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cnnc.errors import UsageError
from cnnc.ir.graph import Graph, Value
from cnnc.ir.rewrite import NearMiss
from cnnc.ir.types import DType
from cnnc.ops.fused import Fused
from cnnc.ops.source import Constant
from cnnc.passes.narrow_weights import NARROW, RULE
from cnnc.target import Target


@dataclass(frozen=True)
class WideConstant:
    """A constant that is stored in f32, and its bytes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class WeightReport:
    """How constants are stored: `narrow` of them, of `narrow_bytes`, in `dtype`.

    `kept` says, one sentence each, which weights stay f32 and why; `wide` lists all constants in f32, those included
    that are no weights: biases, scales, tables.
    """

    dtype: DType
    narrow: int
    narrow_bytes: int
    kept: tuple[str, ...]
    wide: tuple[WideConstant, ...]


def weight_type(name: str, target: Target) -> DType:
    """Read the name of the type weights are stored in; raises `UsageError` for one that kernels cannot read."""
    if name not in (DType.F32, *NARROW):
        raise UsageError(f"weights {name!r} are not known; use {', '.join((DType.F32, *NARROW))}")
    dtype = DType(name)
    if dtype is DType.F16 and "f16c" not in target.features:
        raise UsageError(f"weights in f16 need F16C instructions, which {target} lacks; use bf16, or cpu:x86-64-v3")
    return dtype


def describe_weights(graphs: Sequence[Graph], dtype: DType, missed: Iterable[NearMiss]) -> WeightReport:
    """Describe the constants of graphs of kernels, `missed` being what narrow_weights left as it was.

    What graphs of several batch sizes share counts once.
    """
    read = (v for graph in graphs for v in _read_by_kernels(graph))
    constants = list({v.op: v for v in read if isinstance(v.op, Constant)}.values())
    narrow = [v for v in constants if v.dtype is dtype]
    wide = [WideConstant(_name(v), v.type.nbytes) for v in constants if v.dtype is DType.F32]
    kept = tuple(dict.fromkeys(miss.reason for miss in missed if miss.rule == RULE))
    return WeightReport(dtype, len(narrow), sum(v.type.nbytes for v in narrow), kept, tuple(wide))


def _read_by_kernels(graph: Graph) -> Iterable[Value]:
    """List what kernels read, each value once."""
    return dict.fromkeys(v for node in graph.nodes if isinstance(node.op, Fused) for v in node.inputs)


def _name(value: Value) -> str:
    label = value.op.label if isinstance(value.op, Constant) else ""
    return label or ", ".join(sorted(value.node.loc)) or str(value.type)
