"""Loop nests in TIR, written down rather than scheduled: a thin layer over `tvm.tirx`.

Templates whose register tiles, border cases and loop orders are known in advance say them with these functions;
that is shorter than the schedule that would lead there, and compiles faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx import ForKind

__all__ = [
    "WRITTEN_LOOPS",
    "alloc",
    "buffer",
    "const",
    "function",
    "load",
    "loop",
    "parallel",
    "prefetch",
    "previous_slice",
    "sequence",
    "store",
    "unrolled",
    "vectorized",
    "when",
    "widened",
]

Body = Callable[[Any], Any]

WRITTEN_LOOPS = "cnnc.written_loops"
"""Attribute of a function made here: instructions may use more of a temporary than loads and stores show."""


def const(value: Any) -> Any:
    """Make an int32 expression of a Python integer; expressions pass."""
    return tirx.const(value, "int32") if isinstance(value, int) else value


def buffer(name: str, shape: Sequence[int], dtype: str = "float32", scope: str = "") -> Any:
    """Declare a buffer; scope `local` keeps it in registers or on the stack."""
    return tirx.decl_buffer(tuple(shape), dtype, name, scope=scope)


def alloc(declared: Any) -> Any:
    """Allocate a declared buffer for the statements after this one."""
    return tirx.AllocBuffer(declared)


def sequence(*statements: Any) -> Any:
    """Run statements one after the other; None stands for no statement."""
    present = [statement for statement in statements if statement is not None]
    if not present:
        return None
    return present[0] if len(present) == 1 else tirx.SeqStmt(present)


def _loop(extent: Any, body: Body, name: str, kind: Any, start: Any) -> Any:
    if isinstance(extent, int) and extent == 1:
        return body(const(start))
    var = tirx.Var(name, "int32")
    return tirx.For(var, const(start), const(extent), kind, body(var))


def loop(extent: Any, body: Body, name: str = "i", start: Any = 0) -> Any:
    """Run `body(index)` for each index of [start, start + extent)."""
    return _loop(extent, body, name, ForKind.SERIAL, start)


def unrolled(extent: int, body: Body, name: str = "u", start: int = 0) -> Any:
    """Run `body(index)` as straight-line code; kept a loop until late, so that passes see little code."""
    return _loop(extent, body, name, ForKind.UNROLLED, start)


def vectorized(lanes: int, body: Body, name: str = "lane") -> Any:
    """Run `body(lane)` in all lanes of a vector at once."""
    return _loop(lanes, body, name, ForKind.VECTORIZED, 0)


def parallel(extent: int, body: Body) -> Any:
    """Run independent slices, as `[lo, hi)` of the kernel's C function."""
    var = tirx.Var("slice", "int32")
    return tirx.For(var, const(0), const(extent), ForKind.PARALLEL, body(var))


def previous_slice() -> Any:
    """Declare the slice that left what is allocated outside the parallel loop as a slice finds it; below 0 for none.

    It is the last parameter of the function.
    """
    return tirx.Var("previous", "int32")


def when(condition: Any, then: Any, otherwise: Any = None) -> Any:
    """Branch at run time, or now if the condition is a Python bool."""
    if isinstance(condition, bool):
        return then if condition else otherwise
    return tirx.IfThenElse(condition, then, otherwise)


def _indices(indices: Sequence[Any], lanes: int) -> list[Any]:
    plain = [const(index) for index in indices]
    if lanes > 1:
        plain[-1] = tirx.Ramp(plain[-1], const(1), lanes)
    return plain


def load(source: Any, *indices: Any, lanes: int = 1) -> Any:
    """Read one element, or `lanes` neighbours along the last axis."""
    return tirx.BufferLoad(source, _indices(indices, lanes))


def widened(source: Any, *indices: Any, lanes: int = 1) -> Any:
    """Read as `load` does, in float32: weights may be stored in 16 bits."""
    value = load(source, *indices, lanes=lanes)
    if source.dtype == "float32":
        return value
    return tirx.Cast(f"float32x{lanes}" if lanes > 1 else "float32", value)


def store(target: Any, value: Any, *indices: Any, lanes: int = 1) -> Any:
    """Write one element, or `lanes` neighbours along the last axis."""
    return tirx.BufferStore(target, value, _indices(indices, lanes))


def prefetch(source: Any, *indices: Any, write: bool = False) -> Any:
    """Ask for the cache line of an element, to `write` it perhaps; an address beyond the buffer does no harm."""
    address = tirx.address_of(load(source, *indices))
    intent, keep_near, data = (tirx.const(number, "int32") for number in (int(write), 2, 1))
    return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, intent, keep_near, data))


def function(params: Sequence[Any], body: Any) -> Any:
    """Make a PrimFunc of buffers, perhaps `previous_slice`, and a body; temporaries stay as large as declared."""
    return tirx.PrimFunc(list(params), body).with_attr(WRITTEN_LOOPS, True)
