"""Device functions for products of groups of four warps (`wgmma`), which compute capability 9.0 alone has.

Both operands are in shared memory, in stages that begin at multiples of 1024 bytes, where a descriptor says how they
lie: rows of 128 bytes whose chunks of 16 change places by the row's number (bits 4 to 6 of an address xor bits 7 to
9), of neighbours in depth, or ACROSS it; or matrices of eight rows of a chunk, without a swizzle.  PTX ISA,
"Asynchronous warpgroup level matrix multiply-accumulate operation"; the emulation has functions of the same names.
"""

from __future__ import annotations

import re

from cnnc.backends.cuda import tensor_cores
from cnnc.ir.types import DType

PREFIX = "cnnc_wgmma_"
"""What the names of all of them begin with."""

ALIGNMENT = 1024
"""Bytes that shared memory is aligned to: after so many the swizzle repeats."""

_TYPES = {DType.F16: "f16", DType.BF16: "bf16"}

DTYPES = frozenset(_TYPES)
"""What they multiply.  tf32 is not among them: numbers would have to be rounded in shared memory."""

DESCRIPTOR = f"{PREFIX}descriptor"
"""(shared, leading, stride): describe an operand from an address on.

`stride` is the bytes from 8 lines of 128 bytes to the next 8; of operands ACROSS, `leading` those from 64 rows to the
next 64.
"""

DESCRIPTOR_OF_MATRICES = f"{PREFIX}descriptor_of_matrices"
"""(shared, leading, stride): describe an operand without a swizzle, as matrices of eight rows of a chunk each.

`leading` is the bytes from one chunk of depth to the next, `stride` those from eight rows to the next eight.
"""

PUBLISH = f"{PREFIX}publish"
"""(): what the thread has copied to shared memory, and waited for, is there for products after a barrier."""

COMMIT = f"{PREFIX}commit"
"""(): the products started since the last call are a group."""


def multiply(dtype: DType, columns: int, a_across: bool, b_across: bool) -> str:
    """Name the function that starts sums[columns / 2] += a * b, both descriptors: 64 rows, over two chunks of depth.

    Each warp has a fragment of 16 rows, a thread's numbers as in those of `mma`.
    """
    return f"{PREFIX}{_TYPES[dtype]}<{columns}, {int(a_across)}, {int(b_across)}>"


def fence(sums: int) -> str:
    """Name the function after which products may use the sums, which the thread has written."""
    return f"{PREFIX}fence<{sums}>"


def wait(groups: int, sums: int) -> str:
    """Name the function that waits until no more than this many groups of products are under way."""
    return f"{PREFIX}wait<{groups}, {sums}>"


def source(functions: str) -> str:
    """Give the functions that some code calls."""
    used = sorted(set(re.findall(rf"{PREFIX}(f16|bf16)<(\d+), ([01]), ([01])>", functions)))
    products = "".join(_multiply(kind, int(columns), a, b) for kind, columns, a, b in used)
    return _SOURCE.replace("PRODUCTS", products)


def _multiply(kind: str, columns: int, a_across: str, b_across: str) -> str:
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    return f"""\
template <> __device__ __forceinline__ void {PREFIX}{kind}<{columns}, {a_across}, {b_across}>(
    float *sums, unsigned long long a, unsigned long long b) {{
  asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
               "{{{registers}}}, %{count}, %{count + 1}, 1, 1, 1, {a_across}, {b_across};"
               : {sums}
               : "l"(a), "l"(b));
}}
"""


def _keep(sums: str) -> str:
    """Have the compiler leave sums where they are before and after a statement."""
    return f"""\
#pragma unroll
  for (int i = 0; i < {sums}; i++) {{
    asm volatile("" : "+f"(sums[i]) :: "memory");
  }}
"""


_SOURCE = f"""\
#ifndef CNNC_WGMMA
#define CNNC_WGMMA
template <int COLUMNS, int A_ACROSS, int B_ACROSS> static __device__ void {PREFIX}f16(
    float *sums, unsigned long long a, unsigned long long b);
template <int COLUMNS, int A_ACROSS, int B_ACROSS> static __device__ void {PREFIX}bf16(
    float *sums, unsigned long long a, unsigned long long b);
PRODUCTS\
static __device__ __forceinline__ void {PUBLISH}() {{ asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }}
static __device__ __forceinline__ void {COMMIT}() {{ asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }}
template <int SUMS> static __device__ __forceinline__ void {PREFIX}fence(float *sums) {{
{_keep("SUMS")}\
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}}
template <int GROUPS, int SUMS> static __device__ __forceinline__ void {PREFIX}wait(float *sums) {{
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(GROUPS) : "memory");
{_keep("SUMS")}\
}}
#endif
static __device__ __forceinline__ unsigned long long {DESCRIPTOR_OF_MATRICES}(const void *shared, int leading,
                                                                               int stride) {{
  unsigned low = ({tensor_cores.PREFIX}shared(shared) & 0x3ffffu) >> 4 | unsigned(leading) >> 4 << 16;
  return (unsigned long long)(unsigned(stride) >> 4) << 32 | low;
}}
static __device__ __forceinline__ unsigned long long {DESCRIPTOR}(const void *shared, int leading, int stride) {{
  return {DESCRIPTOR_OF_MATRICES}(shared, leading, stride) | 1ull << 62; /* swizzled over 128 bytes */
}}
"""
