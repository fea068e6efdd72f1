"""The part of the generated driver that a model for GPUs adds: modules and launches, as `runtime/cuda.h` has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llvmlite import ir

from cnnc.backends.host.device import MODULE_ALIGNMENT, DeviceCode, DeviceLaunch, TensorMap
from cnnc.backends.host.program import Slot, Variant

MODULES_SYMBOL = "cnnc_rt_modules"
"""All modules one after the other, each aligned; an object of its own."""

SPACES = ("input", "output", "weights", "arena", "scratch", "status", "map")
"""Memory by its number in `cnnc_rt_space`."""

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_PTR = ir.PointerType()
_SIZES = ir.ArrayType(_I32, 3)
_ARGUMENT = ir.LiteralStructType([_I64, _I32])
_MOST_AXES = 5
_MAP = ir.LiteralStructType(
    [
        _ARGUMENT,
        ir.ArrayType(_I64, _MOST_AXES),
        ir.ArrayType(_I64, _MOST_AXES - 1),
        *[ir.ArrayType(_I32, _MOST_AXES)] * 2,
        *[ir.ArrayType(_I32, _MOST_AXES - 2)] * 2,
        *[_I32] * 4,
    ]
)
_LAUNCH = ir.LiteralStructType([_PTR, _PTR, _I32, _I32, _I32, _I32, _SIZES, _SIZES, _I32])


_MAP_TYPES = {"f16": 6, "bf16": 9, "u64": 4}
"""CUtensorMapDataType."""

_SWIZZLE_128 = 3
"""Of CUtensorMapSwizzle."""


class Tables(Protocol):
    """What a driver under construction offers: texts and arrays of its module."""

    @property
    def module(self) -> ir.Module:
        """The module they go into."""

    def text(self, text: str) -> ir.Constant:
        """Give a C string."""

    def array(self, element: ir.Type, values: Sequence[ir.Constant | int], hint: str) -> ir.Constant:
        """Give an array, or a null pointer for none."""


def describe_device(tables: Tables, device: DeviceCode, variants: Sequence[Variant]) -> None:
    """Add `cnnc_rt_the_device`; its fields are in the order of `cnnc_rt_device`."""
    launches: list[ir.Constant] = []
    first_launches = [0]
    argument_count = 0
    maps: list[ir.Constant] = []
    for variant in variants:
        for number, call in enumerate(variant.calls):
            for launch in call.launches:
                launches.append(_launch(tables, launch, number, argument_count, len(maps)))
                argument_count += len(launch.args)
                maps += [_map(slot, described) for slot, described in launch.maps]
        first_launches.append(len(launches))
    major, minor = device.capability
    fields: list[ir.Constant] = [
        tables.array(_PTR, _modules(tables.module, device), "modules"),
        tables.array(_LAUNCH, launches, "launches"),
        tables.array(_I32, [_I32(number) for number in first_launches], "first_launches"),
        tables.array(_MAP, maps, "maps"),
        _I32(len(device.modules)),
        _I32(len(launches)),
        _I32(argument_count),
        _I32(len(maps)),
        _I32(major),
        _I32(minor),
        _I32(int(device.portable)),
    ]
    kind = ir.LiteralStructType([value.type for value in fields])
    described = ir.GlobalVariable(tables.module, kind, "cnnc_rt_the_device")
    described.global_constant = True
    described.initializer = ir.Constant(kind, fields)


def module_pieces(device: DeviceCode) -> list[bytes]:
    """Give all modules as they lie behind `MODULES_SYMBOL`."""
    return [piece for module in device.modules for piece in (module, bytes(-len(module) % MODULE_ALIGNMENT))]


def _modules(module: ir.Module, device: DeviceCode) -> list[ir.Constant]:
    if not device.modules:
        return []
    blob = ir.GlobalVariable(module, ir.IntType(8), MODULES_SYMBOL)
    starts, at = [], 0
    for content in device.modules:
        starts.append(blob.gep([_I64(at)]))
        at += -(-len(content) // MODULE_ALIGNMENT) * MODULE_ALIGNMENT
    return starts


def _launch(tables: Tables, launch: DeviceLaunch, call: int, first_argument: int, first_map: int) -> ir.Constant:
    """Describe a launch, whose maps are counted from the first one on."""
    arguments = [_argument(slot, first_map if slot.space == "map" else 0) for slot in launch.args]
    fields = [
        tables.text(launch.function),
        tables.array(_ARGUMENT, arguments, "arguments"),
        _I32(len(arguments)),
        _I32(launch.module),
        _I32(call),
        _I32(first_argument),
        ir.Constant(_SIZES, [_I32(size) for size in launch.grid]),
        ir.Constant(_SIZES, [_I32(size) for size in launch.block]),
        _I32(launch.shared_bytes),
    ]
    return ir.Constant(_LAUNCH, fields)


def _argument(slot: Slot, first: int = 0) -> ir.Constant:
    return ir.Constant(_ARGUMENT, [_I64(first + slot.offset), _I32(SPACES.index(slot.space))])


def _map(slot: Slot, described: TensorMap) -> ir.Constant:
    rank = len(described.shape)
    fields = [
        _argument(slot),
        _padded(_I64, described.shape, _MOST_AXES),
        _padded(_I64, described.strides, _MOST_AXES - 1),
        _padded(_I32, described.box, _MOST_AXES),
        _padded(_I32, described.steps or (1,) * rank, _MOST_AXES),
        _padded(_I32, described.lower, _MOST_AXES - 2),
        _padded(_I32, described.upper, _MOST_AXES - 2),
        _I32(_MAP_TYPES[described.dtype]),
        _I32(rank),
        _I32(_SWIZZLE_128 if described.swizzled else 0),
        _I32(int(described.is_im2col)),
    ]
    return ir.Constant(_MAP, fields)


def _padded(element: ir.Type, numbers: Sequence[int], count: int) -> ir.Constant:
    """Give an array of so many numbers, with zeros after those there are."""
    return ir.Constant(ir.ArrayType(element, count), [element(n) for n in (*numbers, *[0] * (count - len(numbers)))])
