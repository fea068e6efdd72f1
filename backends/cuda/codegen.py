"""CUDA source from one scheduled kernel: s_tir PrimFunc -> `__global__` functions and how to launch them.

A kernel is one or more launches in order, over the PrimFunc's buffers and, where one launch hands numbers to the next,
over scratch memory.  Nothing of TVM is needed to compile the source or to launch it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cnnc.backends.cuda import tensor_cores, tma, wgmma
from cnnc.backends.cuda.tensor_maps import maps_of
from cnnc.backends.host.device import TensorMap
from cnnc.backends.load_tvm import load_tvm
from cnnc.errors import VerifyError
from cnnc.target import Target

ALIGNMENT = 256
"""Bytes that buffers in scratch memory are aligned to: a whole transaction of a GPU's memory."""

MOST_THREADS = 1024
"""Threads of a block, by the CUDA programming guide."""

MOST_BLOCKS = (2**31 - 1, 65535, 65535)
"""Blocks of a grid in each dimension."""

RESIDENT_BLOCKS = "cnnc.resident_blocks"
"""Attribute of a PrimFunc: how many of its blocks a multiprocessor is to run at once.

Its threads may then use the registers that this leaves them; otherwise ptxas aims at more blocks, and spills for them.
"""

KERNEL = 'extern "C" __global__'
"""What the functions of a source begin with, after those they call."""


@dataclass(frozen=True)
class Launch:
    """One launch of a `__global__` function.

    An argument is the position of a buffer of the PrimFunc, ("scratch", byte offset), or ("map", number) of `maps`, of
    which each is of the buffer at a position.
    """

    function: str
    arguments: tuple[int | tuple[str, int], ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    maps: tuple[tuple[int, TensorMap], ...] = ()


@dataclass(frozen=True)
class CudaSource:
    """A kernel as text; `launches` run in order, over `scratch_bytes` that hold nothing between runs."""

    symbol: str
    text: str = field(repr=False)
    launches: tuple[Launch, ...]
    scratch_bytes: int = 0


def cuda_source(func: Any, symbol: str, target: Target, *, noalias: bool = True) -> CudaSource:
    """Lower a scheduled s_tir PrimFunc to CUDA source whose functions begin with `symbol`.

    `noalias=False` makes code that stays right when an output is computed in place of an input.
    """
    tvm = load_tvm()
    from cnnc.backends.cuda.lowering import lower_to_device

    host, device = lower_to_device(func, symbol, target, noalias)
    launches, scratch_bytes = _Launches(host, maps_of(func)).read()
    if not launches:
        return CudaSource(symbol, "", ())
    text = str(tvm.get_global_func("target.build.cuda")(device, tvm_target(target)).inspect_source())
    if RESIDENT_BLOCKS in func.attrs:
        text = _BOUNDS.sub(rf"__launch_bounds__(\1, {int(func.attrs[RESIDENT_BLOCKS])})", text)
    return CudaSource(symbol, _with_own_prelude(text), launches, scratch_bytes)


_BOUNDS = re.compile(r"__launch_bounds__\((\d+)\)")


def tvm_target(target: Target) -> Any:
    """Give TVM's form of the target."""
    return load_tvm().target.Target({"kind": "cuda", "arch": target.arch}, host="llvm")


class _Launches:
    """Reads the launches from the host's part of a lowered kernel."""

    def __init__(self, host: Any, maps: tuple[tuple[int, TensorMap], ...]) -> None:
        self._host = host
        self._maps = maps
        # What a buffer of the host is: a parameter, of which the last are maps, or a place in scratch memory.
        first_map = len(host.params) - len(maps)
        self._places: dict[Any, int | tuple[str, int]] = {
            p: i if i < first_map else ("map", i - first_map) for i, p in enumerate(host.params)
        }
        self._scratch_bytes = 0

    def read(self) -> tuple[tuple[Launch, ...], int]:
        """Give the launches in order, and the bytes of scratch memory they need."""
        from tvm import tirx

        launches = []
        for statement in _statements(self._host.body):
            if isinstance(statement, tirx.AllocBuffer):
                self._places[statement.buffer] = ("scratch", self._scratch_bytes)
                self._scratch_bytes += -(-_buffer_bytes(statement.buffer) // ALIGNMENT) * ALIGNMENT
            elif isinstance(statement, tirx.DeclBuffer):
                self._places[statement.buffer] = self._places[statement.data.args[0]]
            elif isinstance(statement, tirx.Evaluate) and isinstance(statement.value, tirx.IntImm):
                continue
            elif _is_launch(statement):
                launches.append(self._launch(statement.value))
            else:
                raise VerifyError(f"the host's part of a kernel does more than launch: {statement}")
        return tuple(launches), self._scratch_bytes

    def _launch(self, call: Any) -> Launch:
        name, *rest = call.args
        tags = [str(tag) for tag in call.attrs.launch_params]
        buffers = rest[: len(rest) - len(tags)]
        sizes = dict(zip(tags, (int(size) for size in rest[len(buffers) :]), strict=True))
        arguments = tuple(self._places[buffer.args[0]] for buffer in buffers)
        takes_maps = any(isinstance(place, tuple) and place[0] == "map" for place in arguments)
        launch = Launch(
            str(name.value),
            arguments,
            (sizes.get("blockIdx.x", 1), sizes.get("blockIdx.y", 1), sizes.get("blockIdx.z", 1)),
            (sizes.get("threadIdx.x", 1), sizes.get("threadIdx.y", 1), sizes.get("threadIdx.z", 1)),
            sizes.get("tirx.use_dyn_shared_memory", 0),
            self._maps if takes_maps else (),
        )
        return _checked(launch)


def _checked(launch: Launch) -> Launch:
    """Refuse what no GPU can launch."""
    x, y, z = launch.block
    too_many = any(blocks > most for blocks, most in zip(launch.grid, MOST_BLOCKS, strict=True))
    if x * y * z > MOST_THREADS or too_many:
        raise VerifyError(f"{launch.function}: a grid of {launch.grid} blocks of {launch.block} threads is too large")
    return launch


def _statements(body: Any) -> Iterator[Any]:
    """List the statements of a straight-line function."""
    from tvm import tirx

    if isinstance(body, tirx.SeqStmt):
        for part in body.seq:
            yield from _statements(part)
    elif isinstance(body, tirx.AttrStmt):
        yield from _statements(body.body)
    else:
        yield body


def _is_launch(statement: Any) -> bool:
    from tvm import tirx

    return isinstance(statement, tirx.Evaluate) and statement.value.op.name == "tirx.call_ffi_kernel"


def _buffer_bytes(buffer: Any) -> int:
    dtype = load_tvm().DataType(str(buffer.dtype))
    size = -(-dtype.bits * dtype.lanes // 8)
    for extent in buffer.shape:
        size *= int(extent)
    return int(size)


# The source

_PRELUDE = """\
#include <cstdint>
#include <math_constants.h>
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short
// The second where either is NaN, unlike CUDA's own.
template <class T> static __device__ __forceinline__ T cnnc_max(T a, T b) { return a > b ? a : b; }
template <class T> static __device__ __forceinline__ T cnnc_min(T a, T b) { return a < b ? a : b; }
"""


_SHARED = re.compile("|".join((tensor_cores.PREFIX, wgmma.PREFIX, tma.PREFIX)))
"""Calls of functions that find addresses in shared memory as the first of these does."""


def _with_own_prelude(text: str) -> str:
    """Put what the functions need in the place of TVM's prelude, which needs more of the toolkit and of nvcc's time."""
    start = text.index(KERNEL)
    functions = text[start:]
    includes: Sequence[str] = [
        f"#include <{header}>\n{_vector_of_four(word) if f'{word}4' in functions else ''}"
        for word, header in (("half", "cuda_fp16.h"), ("nv_bfloat16", "cuda_bf16.h"))
        if word in functions
    ]
    asynchronous = tensor_cores.SOURCE if _SHARED.search(functions) else ""
    asynchronous += wgmma.source(functions) if wgmma.PREFIX in functions else ""
    if tma.PREFIX in functions:
        asynchronous, functions = asynchronous + tma.SOURCE, tma.with_maps(functions)
    return _PRELUDE + "".join(includes) + asynchronous + functions


def _vector_of_four(element: str) -> str:
    """Define a vector that CUDA has for f32 only, loaded and stored at once."""
    guard = f"CNNC_{element.upper()}4"
    return f"#ifndef {guard}\n#define {guard}\nstruct __align__(8) {element}4 {{ {element} x, y, z, w; }};\n#endif\n"
