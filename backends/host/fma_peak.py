"""Measures the peak of f32 multiply-adds of one core: a loop of independent FMAs in registers, made with LLVM."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

from cnnc.target import Target

_CHAINS = 12
_ITERATIONS = 400_000
_REPEATS = 9


def measure_fma_peak() -> float:
    """Give f32 operations a second (a multiply-add is 2); takes about 0.1 s."""
    target = Target.parse("cpu")
    engine = _compile(target)
    function = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64)(engine.get_function_address("fma_loop"))
    function(_ITERATIONS)
    best = min(_timed(function) for _ in range(_REPEATS))
    return 2 * target.vector_lanes * _CHAINS * _ITERATIONS / best


def _timed(function: Callable[[int], float]) -> float:
    start = time.perf_counter()
    function(_ITERATIONS)
    return time.perf_counter() - start


def _compile(target: Target) -> Any:
    """Build `float fma_loop(int64 n)`: n rounds over 12 chains, enough to hide the latency of two FMA units."""
    import llvmlite.binding as llvm
    from llvmlite import ir

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = ir.Module("fma_peak")
    vector = ir.VectorType(ir.FloatType(), target.vector_lanes)
    counter = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.FloatType(), [counter]), "fma_loop")
    entry, loop, done = (function.append_basic_block(name) for name in ("entry", "loop", "done"))
    ir.IRBuilder(entry).branch(loop)
    builder = ir.IRBuilder(loop)
    index = builder.phi(counter)
    index.add_incoming(counter(0), entry)
    factor = ir.Constant(vector, [0.999] * target.vector_lanes)
    intrinsic = f"llvm.fma.v{target.vector_lanes}f32"
    fma = ir.Function(module, ir.FunctionType(vector, [vector] * 3), intrinsic)
    sums = []
    for chain in range(_CHAINS):
        phi = builder.phi(vector)
        phi.add_incoming(ir.Constant(vector, [float(chain)] * target.vector_lanes), entry)
        sums.append(phi)
    results = [builder.call(fma, [phi, factor, factor]) for phi in sums]
    following = builder.add(index, counter(1))
    index.add_incoming(following, loop)
    for phi, result in zip(sums, results, strict=True):
        phi.add_incoming(result, loop)
    builder.cbranch(builder.icmp_signed("<", following, function.args[0]), loop, done)
    builder = ir.IRBuilder(done)
    total = results[0]
    for result in results[1:]:
        total = builder.fadd(total, result)
    builder.ret(builder.extract_element(total, ir.IntType(32)(0)))
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=target.llvm_cpu, opt=3)
    return _engine(llvm.parse_assembly(str(module)), machine)


def _engine(module: Any, machine: Any) -> Any:
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine
