"""The host driver: the memory plan, calls and description of a model as LLVM IR.

Everything here mirrors `runtime/cnnc_rt.h`; the fields in `_describe` are in the order of `cnnc_rt_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import llvmlite.binding as llvm
from llvmlite import ir

from cnnc.backends.host.device_driver import describe_device
from cnnc.backends.host.program import DTYPES, TABLE_SYMBOL, KernelCall, Port, Program, Slot, Variant

TRIPLE = "x86_64-unknown-linux-gnu"

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_PTR = ir.PointerType()
_TENSOR = ir.LiteralStructType([_PTR, _I32, _I32, _PTR, _I64])
_KERNEL = ir.LiteralStructType([_PTR, _PTR, _I32, _I32, _I64, _I64, _PTR, _PTR])
_STEP = ir.LiteralStructType([_PTR, _I32])
_VARIANT = ir.LiteralStructType([_PTR, _PTR, _PTR, _I32, _I32, _I32])
_THUNK = ir.FunctionType(_I32, [_PTR, _PTR, _I32, _I32, _I32])
# The fields of cnnc_rt_bases.
_BASES = {"input": 0, "output": 1, "arena": 2, "weights": 3}

# public suffix -> (runtime function, result, parameters)
_EXPORTS: dict[str, tuple[str, ir.Type, list[ir.Type]]] = {
    "abi_version": ("cnnc_rt_abi_version", _I32, []),
    "create": ("cnnc_rt_create", _I32, [_I32, _PTR]),
    "destroy": ("cnnc_rt_destroy", _I32, [_PTR]),
    "error_text": ("cnnc_rt_error_text", _PTR, [_I32]),
    "input": ("cnnc_rt_input", _PTR, [_I32]),
    "input_count": ("cnnc_rt_input_count", _I32, []),
    "kernel": ("cnnc_rt_kernel_at", _PTR, [_I32]),
    "kernel_count": ("cnnc_rt_kernel_count", _I32, []),
    "kernel_ns": ("cnnc_rt_kernel_ns", _I64, [_PTR, _I32, _PTR]),
    "meta": ("cnnc_rt_meta", _PTR, []),
    "output": ("cnnc_rt_output", _PTR, [_I32]),
    "output_count": ("cnnc_rt_output_count", _I32, []),
    "profile": ("cnnc_rt_profile", _I32, [_PTR, _I32]),
    "run": ("cnnc_rt_run", _I32, [_PTR, _PTR, _PTR]),
    "threads": ("cnnc_rt_threads", _I32, [_PTR]),
}
# What a binary for several batch sizes has besides.
_BATCH_EXPORTS: dict[str, tuple[str, ir.Type, list[ir.Type]]] = {
    "batch_at": ("cnnc_rt_batch_at", _I32, [_I32]),
    "batch_count": ("cnnc_rt_batch_count", _I32, []),
    "batch_input": ("cnnc_rt_batch_input", _PTR, [_I32, _I32]),
    "batch_kernel": ("cnnc_rt_batch_kernel", _PTR, [_I32, _I32]),
    "batch_kernel_count": ("cnnc_rt_batch_kernel_count", _I32, [_I32]),
    "batch_kernel_ns": ("cnnc_rt_batch_kernel_ns", _I64, [_PTR, _I32, _I32, _PTR]),
    "batch_output": ("cnnc_rt_batch_output", _PTR, [_I32, _I32]),
    "run_batch": ("cnnc_rt_run_batch", _I32, [_PTR, _I32, _PTR, _PTR]),
}
# What a binary for GPUs has besides; the latter for several batch sizes.
_STREAM_EXPORTS: dict[str, tuple[str, ir.Type, list[ir.Type]]] = {
    "run_async": ("cnnc_rt_run_async", _I32, [_PTR, _PTR, _PTR, _PTR]),
    "wait": ("cnnc_rt_wait", _I32, [_PTR]),
}
_BATCH_STREAM_EXPORTS: dict[str, tuple[str, ir.Type, list[ir.Type]]] = {
    "run_batch_async": ("cnnc_rt_run_batch_async", _I32, [_PTR, _I32, _PTR, _PTR, _PTR]),
}
SUFFIXES = (*_EXPORTS, *_BATCH_EXPORTS, *_STREAM_EXPORTS, *_BATCH_STREAM_EXPORTS)


def exported_symbols(program: Program) -> tuple[str, ...]:
    """Return the symbols a binary of this program shows to its users, sorted."""
    return tuple(sorted([TABLE_SYMBOL, *(f"{program.prefix}_{suffix}" for suffix in _exports(program))]))


def _exports(program: Program) -> dict[str, tuple[str, ir.Type, list[ir.Type]]]:
    exports = {**_EXPORTS, **(_BATCH_EXPORTS if program.others else {})}
    if program.device is not None:
        exports |= {**_STREAM_EXPORTS, **(_BATCH_STREAM_EXPORTS if program.others else {})}
    return exports


def driver_ir(program: Program) -> str:
    """Return the driver of a program as LLVM IR text."""
    return str(_Driver(program).build())


def emit_driver(program: Program) -> bytes:
    """Return the driver of a program as a position-independent ELF object for any x86-64 CPU.

    Baseline code on purpose: it runs before the check of the CPU's features.
    """
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(driver_ir(program))
    module.verify()
    # Not optimised: it hands calls on, and what could be saved is less than the time that takes LLVM.
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu="x86-64", opt=0, reloc="pic", codemodel="small")
    return bytes(machine.emit_object(module))


@dataclass
class _Driver:
    """Builds one module; texts and thunks that are alike are made once."""

    program: Program
    module: ir.Module = field(default_factory=lambda: ir.Module("cnnc"))
    texts: dict[bytes, ir.GlobalVariable] = field(default_factory=dict)
    thunks: dict[tuple[str, tuple[Slot, ...]], ir.Function] = field(default_factory=dict)

    def build(self) -> ir.Module:
        self.module.triple = TRIPLE
        self._describe()
        if self.program.device is not None:
            describe_device(self, self.program.device, self.program.variants)
        for suffix, (target, result, parameters) in _exports(self.program).items():
            self._export(suffix, target, result, parameters)
        return self.module

    def _declare(self, name: str, result: ir.Type, parameters: Sequence[ir.Type]) -> ir.Function:
        known = self.module.globals.get(name)
        if isinstance(known, ir.Function):
            return known
        return ir.Function(self.module, ir.FunctionType(result, list(parameters)), name)

    # --- code -------------------------------------------------------------------------------------------------

    def _thunk(self, call: KernelCall) -> ir.Function:
        """Return the function that works out where the arguments of this call lie, and calls the kernel."""
        if (call.symbol, call.args) in self.thunks:
            return self.thunks[call.symbol, call.args]
        kernel = self._declare(call.symbol, _I32, [_PTR] * len(call.args) + [_I32] * 3)
        thunk = ir.Function(self.module, _THUNK, f"cnnc_rt_thunk_{len(self.thunks)}")
        thunk.linkage = "internal"
        bases, scratch, *slices = thunk.args
        b = ir.IRBuilder(thunk.append_basic_block())
        loaded: dict[str, ir.Value] = {"scratch": scratch}
        pointers = []
        for slot in call.args:
            if slot.space not in loaded:
                loaded[slot.space] = _load(b, bases, _BASES[slot.space])
            base = loaded[slot.space]
            is_index = slot.space in ("input", "output")
            pointers.append(_load(b, base, slot.offset) if is_index else _offset(b, base, slot.offset))
        b.ret(b.call(kernel, [*pointers, *slices], tail=True))
        self.thunks[call.symbol, call.args] = thunk
        return thunk

    def _export(self, suffix: str, target: str, result: ir.Type, parameters: list[ir.Type]) -> None:
        inner = self._declare(target, result, parameters)
        outer = self._declare(f"{self.program.prefix}_{suffix}", result, parameters)
        b = ir.IRBuilder(outer.append_basic_block())
        b.ret(b.call(inner, outer.args, tail=True))

    # --- data -------------------------------------------------------------------------------------------------

    def _constant(self, value: ir.Constant, hint: str) -> ir.GlobalVariable:
        made = ir.GlobalVariable(self.module, value.type, self.module.get_unique_name(f"cnnc_rt_{hint}"))
        made.linkage = "internal"
        made.global_constant = True
        made.initializer = value
        return made

    def text(self, text: str) -> ir.GlobalVariable:
        """Give a C string."""
        # A C string ends at its first NUL and must be bytes; names come from models, so either may be tried.
        data = text.replace("\0", "\\0").encode("utf-8", "backslashreplace") + b"\0"
        if data not in self.texts:
            array = ir.ArrayType(ir.IntType(8), len(data))
            self.texts[data] = self._constant(ir.Constant(array, bytearray(data)), "text")
        return self.texts[data]

    def array(self, element: ir.Type, values: Sequence[ir.Constant | int], hint: str) -> ir.Constant:
        """Give an array, or a null pointer for none."""
        if not values:
            return ir.Constant(_PTR, None)
        return self._constant(ir.Constant(ir.ArrayType(element, len(values)), list(values)), hint)

    def _ports(self, ports: Sequence[Port], hint: str) -> ir.Constant:
        rows = []
        for port in ports:
            dims = self.array(_I64, [_I64(extent) for extent in port.shape], "dims")
            number = DTYPES[port.dtype][0]
            fields = [self.text(port.name), _I32(number), _I32(len(port.shape)), dims, _I64(port.nbytes)]
            rows.append(ir.Constant(_TENSOR, fields))
        return self.array(_TENSOR, rows, hint)

    def _kernels(self, calls: Sequence[KernelCall]) -> ir.Constant:
        rows = []
        for call in calls:
            layers = self.array(_PTR, [self.text(layer) for layer in call.layers], "layers")
            fields = [
                self.text(call.symbol),
                layers,
                _I32(len(call.layers)),
                _I32(call.slices),
                _I64(call.flops),
                _I64(call.bytes),
                self.text(call.algorithm),
                self.text(call.schedule),
            ]
            rows.append(ir.Constant(_KERNEL, fields))
        return self.array(_KERNEL, rows, "kernels")

    def _variants(self, variants: Sequence[Variant]) -> ir.Constant:
        rows = []
        first_step = 0
        for variant in variants:
            fields = [
                self._ports(variant.inputs, "inputs"),
                self._ports(variant.outputs, "outputs"),
                self._kernels(variant.calls),
                _I32(variant.batch),
                _I32(len(variant.calls)),
                _I32(first_step),
            ]
            rows.append(ir.Constant(_VARIANT, fields))
            first_step += len(variant.calls) + 1
        return self.array(_VARIANT, rows, "variants")

    def _steps(self, variants: Sequence[Variant]) -> ir.Constant:
        if self.program.device is not None:
            return ir.Constant(_PTR, None)
        rows = []
        for variant in variants:
            rows += [ir.Constant(_STEP, [self._thunk(call), _I32(call.slices)]) for call in variant.calls]
            rows.append(ir.Constant(_STEP, [ir.Constant(_PTR, None), _I32(1)]))
        return self.array(_STEP, rows, "steps")

    def _describe(self) -> None:
        program = self.program
        weights: ir.Constant = ir.Constant(_PTR, None)
        if program.weight_bytes:
            weights = ir.GlobalVariable(self.module, ir.IntType(8), "cnnc_rt_weights")
        fields: list[ir.Constant] = [
            self.text(program.name),
            self.text(program.prefix),
            self.text(program.cpu),
            self.text(program.meta),
            self.array(_PTR, [self.text(feature) for feature in program.features], "features"),
            self._variants(program.variants),
            self._steps(program.variants),
            weights,
            _I64(program.weight_bytes),
            _I64(program.arena_bytes),
            _I64(program.scratch_bytes),
            _I32(len(program.features)),
            _I32(len(program.inputs)),
            _I32(len(program.outputs)),
            _I32(len(program.variants)),
            _I32(sum(len(variant.calls) + 1 for variant in program.variants)),
        ]
        model = ir.GlobalVariable(
            self.module, ir.LiteralStructType([value.type for value in fields]), "cnnc_rt_the_model"
        )
        model.global_constant = True
        model.initializer = ir.Constant(model.value_type, fields)
        table = ir.GlobalVariable(self.module, ir.IntType(8), "cnnc_rt_the_table")
        exported = ir.GlobalVariable(self.module, _PTR, TABLE_SYMBOL)
        exported.global_constant = True
        exported.initializer = table


def _offset(b: ir.IRBuilder, base: ir.Value, offset: int) -> ir.Value:
    return b.gep(base, [_I64(offset)], source_etype=ir.IntType(8)) if offset else base


def _load(b: ir.IRBuilder, array: ir.Value, index: int) -> ir.Value:
    at = b.gep(array, [_I64(index)], source_etype=_PTR) if index else array
    return b.load(at, typ=_PTR)
