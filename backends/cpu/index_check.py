"""Checks of indices that are data, as machine code for a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cnnc.backends.cpu.codegen import KernelObject
from cnnc.backends.host.driver import TRIPLE
from cnnc.backends.lower.run_time_indices import OUT_OF_RANGE, check_symbol
from cnnc.ir.types import DType, TensorType


def index_check(type_: TensorType, extents: tuple[int, ...]) -> KernelObject:
    """Make the kernel `int32 check(void* indices, int32 last, int32 lo, int32 hi)`: 0, or `OUT_OF_RANGE`.

    Negative indices count from the end, so [-extent, extent) is inside.
    """
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    symbol = check_symbol(type_, extents)
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu="x86-64", opt=2, reloc="pic", codemodel="small")
    module = llvm.parse_assembly(str(_check_module(symbol, type_, extents)))
    return KernelObject(symbol, machine.emit_object(module), slices=1)


def _check_module(symbol: str, type_: TensorType, extents: Sequence[int]) -> Any:
    """Write a loop over rows of `len(extents)` components that gathers what is outside into one flag."""
    from llvmlite import ir

    module = ir.Module(symbol)
    module.triple = TRIPLE
    status, integer = ir.IntType(32), ir.IntType(64 if type_.dtype is DType.I64 else 32)
    function = ir.Function(module, ir.FunctionType(status, [ir.PointerType(), status, status, status]), symbol)
    entry, loop, done = (function.append_basic_block(name) for name in ("entry", "loop", "done"))
    ir.IRBuilder(entry).branch(loop)
    builder = ir.IRBuilder(loop)
    index = builder.phi(ir.IntType(64))
    index.add_incoming(ir.IntType(64)(0), entry)
    flag = builder.phi(ir.IntType(1))
    flag.add_incoming(ir.IntType(1)(0), entry)
    outside: Any = flag
    for component, extent in enumerate(extents):
        at = builder.add(index, ir.IntType(64)(component))
        value = builder.load(builder.gep(function.args[0], [at], source_etype=integer), typ=integer)
        below = builder.icmp_signed("<", value, integer(-extent))
        above = builder.icmp_signed(">=", value, integer(extent))
        outside = builder.or_(outside, builder.or_(below, above))
    following = builder.add(index, ir.IntType(64)(len(extents)))
    index.add_incoming(following, loop)
    flag.add_incoming(outside, loop)
    count = math.prod(type_.static_shape)
    builder.cbranch(builder.icmp_signed("<", following, ir.IntType(64)(count)), loop, done)
    builder = ir.IRBuilder(done)
    builder.ret(builder.select(outside, status(OUT_OF_RANGE), status(0)))
    return module
