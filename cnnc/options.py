"""What a compile may be told: optimisation levels, types to multiply in, and limits on what a model may ask for."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

LEVELS = (0, 1, 2, 3)
"""The optimisation levels; `passes/pipeline.py` says what each does."""

DTYPES = ("f32", "tf32", "f16", "bf16")
"""The types that convolutions and products of matrices may multiply in; they add up in f32."""


@dataclass(frozen=True)
class Limits:
    """What a model may ask for; passing one raises `LimitError` (exit 5).  Sizes are in bytes.

    The defaults admit every published convolutional network by a wide margin.
    """

    file: int = 2 * GIB
    """Size of the model file; external data is apart (see `memory`)."""
    nodes: int = 100_000
    """Nodes, those in functions and branches included, before and after functions are expanded."""
    fields: int = 2_000_000
    """Protobuf fields in the file: bounds the memory and time that parsing it takes."""
    name: int = 512
    """Length of any name in the model, in UTF-8 bytes."""
    rank: int = 8
    """Dimensions of a tensor."""
    dim: int = 2**31 - 1
    """The largest dimension."""
    tensor: int = 16 * GIB
    """One tensor."""
    memory: int = 16 * GIB
    """All weights together, and the tensors alive at any moment together."""
    expansions: int = 100_000
    """Calls of local functions, calls inside calls included."""
    function_depth: int = 64
    """How deep calls of local functions nest."""
    subgraph_depth: int = 16
    """How deep the branches of If nodes nest."""
    folding: int = 16 * MIB
    """A result computed at compile time, unless it is smaller than what it is computed from."""


def format_bytes(count: int) -> str:
    """Write a byte count for people: `1.5 GiB`."""
    if count < KIB:
        return f"{count} bytes"
    size, unit = float(count), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.1f} {_UNITS[unit]}"


_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
