"""Kernels read nothing beyond their inputs: the page after each is one that may not be touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import ctypes, mmap, sys
import numpy as np
import cnnc
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ops import Abs, Conv, Gelu, Mul, Relu, Sigmoid, constant, graph_input

followers = {{"relu": Relu(), "gelu": Gelu(), "sigmoid": Sigmoid(), "abs": Abs()}}
shape = (1, {channels}, 40, 40)
x = graph_input("x", shape)
scaled = call(Mul(), x, constant(np.float32(1 / 255)))
y = scaled if {name!r} == "scaled" else call(followers[{name!r}], x)
w = np.random.default_rng(0).standard_normal((16, {channels}, 3, 3)).astype(np.float32)
graph = Graph("n", (x,), (call(Conv((1, 1), (1, 1, 1, 1), (1, 1)), y, constant(w)),), ("y",))
module = cnnc.compile(graph, records=False, cache=False)

size = 4 * int(np.prod(shape))
whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
memory = mmap.mmap(-1, whole + 64 * mmap.PAGESIZE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(address + whole), 64 * mmap.PAGESIZE, 0) == 0
array = np.frombuffer(memory, np.float32, size // 4, whole - size).reshape(shape)
array[:] = 1
module.run({{"x": array}})
print("inside")
"""


@pytest.mark.parametrize("name", ["relu", "gelu", "sigmoid", "abs", "scaled"])
@pytest.mark.parametrize("channels", [9, 20])
def test_what_is_fused_behind_a_change_of_layout(name: str, channels: int) -> None:
    """Channels beside the block: lanes that are padding must not be read from the plain input."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(name=name, channels=channels)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "inside\n", (done.returncode, done.stderr[-2000:])


PROLOGUE = """
import ctypes, mmap, subprocess
from cnnc.backends.cpu.codegen import compile_kernel
from cnnc.backends.cpu.templates import template
from cnnc.target import Target
from tests.backends.cpu.test_prologue import ConvShape, cheapest, kernel

libc = ctypes.CDLL(None, use_errno=True)
target = Target.parse("cpu:x86-64-v3")
shape = ConvShape(1, {channels}, 10, 10, 16, {size}, {size}, pad=({size} // 2,) * 4, block=8)
fused = kernel(shape, {tile})
schedule = cheapest(fused, "winograd" if {tile} else "conv_direct")
made = compile_kernel(template(schedule.template).build(fused, schedule, target), "k", target)
open("{folder}/k.o", "wb").write(made.code)
subprocess.run(["gcc", "-shared", "-o", "{folder}/k.so", "{folder}/k.o", "-lm"], check=True)

kept = []

def guarded(nbytes):
    whole = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + 64 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + whole), 64 * mmap.PAGESIZE, 0) == 0
    kept.append(memory)
    return ctypes.c_void_p(address + (whole - nbytes) // 64 * 64)

types = [v.type for v in (*fused.body.inputs, *fused.body.outputs)]
pointers = [guarded(t.nbytes) for t in types]
pointers += [guarded(made.scratch_bytes)] if made.scratch_bytes else []
assert ctypes.CDLL("{folder}/k.so").k(*pointers, -1, 0, made.slices) == 0
print("inside")
"""


@pytest.mark.parametrize(("size", "tile"), [(1, 0), (3, 0), (3, 4)])
@pytest.mark.parametrize("channels", [9, 16])
def test_what_is_fused_before_a_convolution(tmp_path: Path, size: int, tile: int, channels: int) -> None:
    """Images, weights, vectors and what a slice keeps for itself, each before a page that may not be touched."""
    child = PROLOGUE.format(size=size, tile=tile, channels=channels, folder=tmp_path)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", child], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "inside\n", (done.returncode, done.stderr[-2000:])
