"""The C calling convention of kernels: a TIR pass in the place of TVM's packed one.

    f(Buffer...) { ... parallel(n) ... }  ->  int32 f(void *..., [void *scratch,] int32 last, int32 lo, int32 hi)

Buffers become 64-byte aligned pointers.  The outermost parallel loop runs over [lo, hi) of its n iterations,
so that any thread pool can deal out slices.  Temporaries too large for the stack move into one scratch area,
which the caller provides for each thread.  What is allocated outside the parallel loop of a function that asks for the
previous slice is there, too, as that slice left it; the caller says that as `last`: the slice done last with this
scratch area, -1 if there was none in this run of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx

from cnnc.errors import VerifyError

ALIGNMENT = 64
"""Bytes every buffer and the scratch area must be aligned to."""

INDEPENDENT_LOOPS = "cnnc.independent_loops"
"""Attribute of a function whose outermost loops are parallel and independent of each other."""

STACK_LIMIT = 1024
"""Bytes from which a temporary of a slice moves from the stack to the scratch area; scope `local` always stays."""

_SERIAL = tirx.ForKind.SERIAL


@dataclass
class Abi:
    """What the pass found out about a kernel: the extent of [lo, hi), and each thread's bytes of scratch."""

    slices: int = 1
    scratch_bytes: int = 0


def c_function(func: Any, symbol: str, noalias: bool, abi: Abi) -> Any:
    """Give a lowered PrimFunc C's calling convention and the name `symbol`; fills in `abi`."""
    parameters = list(func.params)
    previous = None if tirx.is_buffer_var(parameters[-1]) else parameters.pop()
    pointers = [_pointer(param) for param in parameters]
    data = list(zip(parameters, pointers, strict=True))
    offsets = []

    large: list[Any] = []
    body = _take_large_buffers(func.body, large, STACK_LIMIT if previous is None else 0)
    scratch = tirx.Var("scratch", tvm.ir.PointerType(tvm.ir.PrimType("uint8"), "global"))
    for buffer in large:
        pointer = _pointer(buffer)
        address = tirx.handle_add_byte_offset(scratch, abi.scratch_bytes)
        offsets.append(tirx.Bind(pointer, tirx.reinterpret(pointer.ty, address)))
        data.append((buffer, pointer))
        abi.scratch_bytes += -(-_buffer_bytes(buffer) // ALIGNMENT) * ALIGNMENT

    last, lo, hi = (tirx.Var(name, "int32") for name in ("last", "lo", "hi"))
    if _has_sole_parallel_loop(body):
        body = _slice(body, lo, hi, abi, previous, last)
    elif func.attrs.get(INDEPENDENT_LOOPS) is not None:
        body = _slice_each(body, lo, hi, abi)
    else:
        body = _serial(body)
        if previous is not None:
            body = tirx.SeqStmt([tirx.Bind(previous, tirx.const(-1, "int32")), body])
        body = tirx.IfThenElse(tirx.all(tirx.EQ(lo, 0), tirx.LT(lo, hi)), body, None)
    buffers = [tirx.DeclBuffer(buffer, data=pointer) for buffer, pointer in data]
    body = tirx.SeqStmt([*buffers, body, tirx.Return(tirx.const(0, "int32"))])
    for _, pointer in data:
        body = tirx.AttrStmt(pointer, "storage_alignment", tirx.const(ALIGNMENT, "int32"), body)
    if offsets:
        body = tirx.SeqStmt([*offsets, body])
    return (
        tirx.PrimFunc(
            [*pointers, *([scratch] if large else []), last, lo, hi], body, tvm.ir.PrimType("int32"), func.attrs
        )
        .with_attr("global_symbol", symbol)
        .with_attr("tirx.noalias", noalias)
        .with_attr("calling_conv", 1)
        .without_attr("tirx.is_entry_func")
    )


def _pointer(buffer: Any) -> Any:
    """Return a pointer variable for the data of a buffer."""
    if not tirx.is_buffer_var(buffer):
        raise VerifyError(f"kernel parameter {buffer.name} is no buffer; kernels take buffers only")
    return tirx.Var(f"{buffer.name}_ptr", tvm.ir.PointerType(tvm.ir.PrimType(buffer.dtype), "global"))


def _buffer_bytes(buffer: Any) -> int:
    """Return the size of a buffer of constant shape in bytes."""
    dtype = tvm.DataType(str(buffer.dtype))
    size = -(-dtype.bits * dtype.lanes // 8)
    for extent in buffer.shape:
        size *= int(extent)
    return int(size)


def _with_children(stmt: Any, change: Callable[[Any], Any]) -> Any:
    """Rebuild a statement with `change` applied to the statements directly in it."""
    match stmt:
        case tirx.SeqStmt():
            return tirx.SeqStmt([change(part) for part in stmt.seq])
        case tirx.AttrStmt():
            return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, change(stmt.body))
        case tirx.For():
            return _loop(stmt, stmt.kind, change(stmt.body))
        case tirx.While():
            return tirx.While(stmt.condition, change(stmt.body))
        case tirx.IfThenElse():
            otherwise = None if stmt.else_case is None else change(stmt.else_case)
            return tirx.IfThenElse(stmt.condition, change(stmt.then_case), otherwise)
        case _:
            return stmt


def _loop(stmt: Any, kind: Any, body: Any) -> Any:
    return tirx.For(stmt.loop_var, stmt.min, stmt.extent, kind, body, None, stmt.annotations, stmt.step)


def _take_large_buffers(stmt: Any, large: list[Any], limit: int) -> Any:
    """Remove the allocations that the stack should not hold, and append their buffers to `large`."""
    if isinstance(stmt, tirx.AllocBuffer):
        buffer = stmt.buffer
        on_stack = buffer.ty.storage_scope == "local" or _buffer_bytes(buffer) < limit
        if on_stack:
            return stmt
        large.append(buffer)
        return tirx.Evaluate(tirx.const(0, "int32"))
    inner = STACK_LIMIT if _is_parallel(stmt) else limit
    return _with_children(stmt, lambda part: _take_large_buffers(part, large, inner))


def _is_parallel(stmt: Any) -> bool:
    return isinstance(stmt, tirx.For) and stmt.kind == tirx.ForKind.PARALLEL


def _has_sole_parallel_loop(stmt: Any) -> bool:
    """Tell whether all work is in one parallel loop, so that slices of it are slices of the work."""
    if isinstance(stmt, tirx.AttrStmt):
        return _has_sole_parallel_loop(stmt.body)
    if isinstance(stmt, tirx.SeqStmt):
        declarations = (tirx.AllocBuffer, tirx.DeclBuffer, tirx.Bind)
        work = [part for part in stmt.seq if not isinstance(part, declarations) and not _is_nothing(part)]
        return len(work) == 1 and _has_sole_parallel_loop(work[0])
    return _is_parallel(stmt)


def _is_nothing(stmt: Any) -> bool:
    return isinstance(stmt, tirx.Evaluate) and isinstance(stmt.value, tirx.IntImm)


def _slice(stmt: Any, lo: Any, hi: Any, abi: Abi, previous: Any, last: Any) -> Any:
    """Let the outermost parallel loop run over [lo, hi), and record its extent."""
    if _is_parallel(stmt):
        if int(stmt.min) != 0:
            raise VerifyError(f"parallel loop {stmt.loop_var.name} starts at {stmt.min}; it must start at 0")
        abi.slices = int(stmt.extent)
        body = _serial(stmt.body)
        if previous is not None:
            before = tirx.Select(tirx.EQ(stmt.loop_var, lo), last, stmt.loop_var - 1)
            body = tirx.SeqStmt([tirx.Bind(previous, before), body])
        return tirx.For(stmt.loop_var, lo, hi - lo, _SERIAL, body)
    return _with_children(stmt, lambda part: _slice(part, lo, hi, abi, previous, last))


def _slice_each(stmt: Any, lo: Any, hi: Any, abi: Abi) -> Any:
    """Number the iterations of independent parallel loops through, and run those in [lo, hi).

    What is no parallel loop belongs to the first slice.
    """
    abi.slices = 0
    parts = []
    for part in tirx.stmt_list(stmt):
        if isinstance(part, tirx.AllocBuffer | tirx.DeclBuffer | tirx.Bind) or _is_nothing(part):
            parts.append(part)
            continue
        count = int(part.extent) if _is_parallel(part) else 1
        first = tirx.max(lo - abi.slices, 0)
        end = tirx.min(hi - abi.slices, count)
        loop = part if _is_parallel(part) else tirx.For(tirx.Var("once", "int32"), 0, 1, _SERIAL, part)
        parts.append(tirx.For(loop.loop_var, first, tirx.max(end - first, 0), _SERIAL, _serial(loop.body)))
        abi.slices += count
    return tirx.SeqStmt(parts)


def _serial(stmt: Any) -> Any:
    """Make every parallel loop in a statement a serial one."""
    if _is_parallel(stmt):
        stmt = _loop(stmt, _SERIAL, stmt.body)
    return _with_children(stmt, _serial)
