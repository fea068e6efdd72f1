"""AMX's tile registers for tests: as loops over memory, where the CPU has none, and by permission, where it has."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from cnnc.target import Target, machine_flags

SAPPHIRE_RAPIDS = Target.parse("cpu:sapphirerapids")

ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18


def present() -> bool:
    """Whether this process may use tile registers; asks the system for them."""
    if not {"amx_tile", "amx_bf16"} <= machine_flags():
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put loops over eight buffers in the place of the instructions, rounding as their description says."""
    from tvm import tirx

    from cnnc.backends.cpu import amx
    from cnnc.backends.lower import loops

    registers = [loops.buffer(f"tile{number}", (16, 16), "uint32") for number in range(8)]

    def lines(body: Any) -> Any:
        return loops.loop(16, body, "tile_row")

    def zero(register: int) -> Any:
        nothing = tirx.Broadcast(tirx.const(0, "uint32"), 16)
        return lines(lambda row: loops.store(registers[register], nothing, row, 0, lanes=16))

    def place(buffer: Any, indices: tuple[Any, ...]) -> tuple[Any, Any]:
        """View a buffer as lines of 16 numbers: the buffer, and the line at some indices."""
        position: Any = 0
        for extent, index in zip(buffer.shape, indices, strict=True):
            position = position * extent + index
        return buffer, position

    def line_index(buffer: Any, first: Any, row: Any) -> list[Any]:
        """Give the indices of a line, its last one left out."""
        position, indices = first // 16 + row, []
        for extent in reversed(buffer.shape[:-1]):
            indices.insert(0, position % extent if len(indices) < len(buffer.shape) - 2 else position)
            position = position // extent
        return indices

    def load(register: int, buffer: Any, *indices: Any) -> Any:
        source, first = place(buffer, indices)

        def one(row: Any) -> Any:
            value = loops.load(source, *line_index(source, first, row), 0, lanes=16)
            return loops.store(registers[register], tirx.reinterpret("uint32x16", value), row, 0, lanes=16)

        return lines(one)

    def store(register: int, buffer: Any, *indices: Any) -> Any:
        target, first = place(buffer, indices)

        def one(row: Any) -> Any:
            value = tirx.reinterpret(f"{target.dtype}x16", loops.load(registers[register], row, 0, lanes=16))
            return loops.store(target, value, *line_index(target, first, row), 0, lanes=16)

        return lines(one)

    def multiply_add(total: int, a: int, b: int) -> Any:
        def halves(value: Any) -> tuple[Any, Any]:
            low = tirx.shift_left(value, tirx.Broadcast(tirx.const(16, "uint32"), 16))
            high = tirx.bitwise_and(value, tirx.Broadcast(tirx.const(0xFFFF0000, "uint32"), 16))
            return tirx.reinterpret("float32x16", low), tirx.reinterpret("float32x16", high)

        def one(row: Any) -> Any:
            sums = loops.buffer("sums", (2, 16), scope="local")

            def add(k: Any) -> Any:
                xs = halves(tirx.Broadcast(loops.load(registers[a], row, k), 16))
                ws = halves(loops.load(registers[b], k, 0, lanes=16))
                return loops.sequence(
                    *(
                        loops.store(sums, loops.load(sums, half, 0, lanes=16) + x * w, half, 0, lanes=16)
                        for half, (x, w) in enumerate(zip(xs, ws, strict=True))
                    )
                )

            nothing = tirx.Broadcast(tirx.const(0.0, "float32"), 16)
            before = tirx.reinterpret("float32x16", loops.load(registers[total], row, 0, lanes=16))
            even, odd = (loops.load(sums, half, 0, lanes=16) for half in range(2))
            return loops.sequence(
                loops.alloc(sums),
                *(loops.store(sums, nothing, half, 0, lanes=16) for half in range(2)),
                loops.loop(16, add, "k"),
                loops.store(registers[total], tirx.reinterpret("uint32x16", before + (even + odd)), row, 0, lanes=16),
            )

        return lines(one)

    def configured(body: Any) -> Any:
        return loops.sequence(*(loops.alloc(register) for register in registers), body)

    for name, function in locals().copy().items():
        if name in amx.__all__:
            monkeypatch.setattr(amx, name, function)
