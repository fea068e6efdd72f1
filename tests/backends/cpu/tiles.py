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
    if not {"amx_tile", "amx_bf16", "amx_int8"} <= machine_flags():
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

    def per_line(buffer: Any) -> int:
        return 64 if buffer.dtype == "int8" else 16

    def line_index(buffer: Any, indices: tuple[Any, ...], row: Any) -> list[Any]:
        """Give the indices of the first number of a line of 64 bytes, so many after the one at some indices."""
        position: Any = 0
        for extent, index in zip(buffer.shape, indices, strict=True):
            position = position * extent + index
        position, found = position + row * per_line(buffer), []
        for extent in reversed(buffer.shape[1:]):
            found.insert(0, position % extent)
            position = position // extent
        return [position, *found]

    def load(register: int, buffer: Any, *indices: Any) -> Any:
        def one(row: Any) -> Any:
            value = loops.load(buffer, *line_index(buffer, indices, row), lanes=per_line(buffer))
            return loops.store(registers[register], tirx.reinterpret("uint32x16", value), row, 0, lanes=16)

        return lines(one)

    def store(register: int, buffer: Any, *indices: Any) -> Any:
        def one(row: Any) -> Any:
            value = tirx.reinterpret(f"{buffer.dtype}x16", loops.load(registers[register], row, 0, lanes=16))
            return loops.store(buffer, value, *line_index(buffer, indices, row), lanes=16)

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

    def multiply_add_int8(total: int, a: int, b: int) -> Any:
        def digit(value: Any, number: int) -> Any:
            """Give one of four bytes of each lane, as int32."""
            raised = tirx.shift_left(value, tirx.Broadcast(tirx.const(24 - 8 * number, "uint32"), 16))
            return tirx.shift_right(tirx.reinterpret("int32x16", raised), tirx.Broadcast(tirx.const(24, "int32"), 16))

        def one(row: Any) -> Any:
            def add(k: Any) -> Any:
                xs = tirx.Broadcast(loops.load(registers[a], row, k), 16)
                ws = loops.load(registers[b], k, 0, lanes=16)
                sums = tirx.reinterpret("int32x16", loops.load(registers[total], row, 0, lanes=16))
                for number in range(4):
                    sums = sums + digit(xs, number) * digit(ws, number)
                return loops.store(registers[total], tirx.reinterpret("uint32x16", sums), row, 0, lanes=16)

            return loops.loop(16, add, "k")

        return lines(one)

    def configured(body: Any) -> Any:
        return loops.sequence(*(loops.alloc(register) for register in registers), body)

    for name, function in locals().copy().items():
        if name in amx.__all__:
            monkeypatch.setattr(amx, name, function)
