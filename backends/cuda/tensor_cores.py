"""Device functions for tensor cores and asynchronous copies: one instruction of PTX each, which CUDA C has no word for.

Fragments lie in registers as the PTX ISA's section "Matrix multiply-accumulate operation using mma instruction" draws
them; a row of 16 bytes is 8 numbers of 16 bits, or 4 of 32.  The emulation has functions of the same names.
"""

from __future__ import annotations

from cnnc.backends.cuda.machine import CHUNK_BYTES
from cnnc.ir.types import DType

PREFIX = "cnnc_tc_"
"""What the names of all of them begin with."""

MMA = {DType.F16: f"{PREFIX}mma_f16", DType.BF16: f"{PREFIX}mma_bf16", DType.F32: f"{PREFIX}mma_tf32"}
"""sum[4] += a[4] * b[2]: 16 rows by 8 columns, over two rows of 16 bytes; f32 numbers are to be rounded to tf32."""

COPY = f"{PREFIX}copy"
"""(shared, global, valid): start to copy 16 bytes; zeros where not valid, and then nothing is read."""

COMMIT = f"{PREFIX}commit"
"""(): the copies started since the last call are a group."""

LOAD = f"{PREFIX}load"
"""(registers[4], shared): load four 8x8 matrices of 16 bits; lane 8 * i + r gives the address of row r of matrix i."""

LOAD_TRANSPOSED = f"{PREFIX}load_transposed"
"""The same, each matrix transposed."""

PACK = {DType.F16: f"{PREFIX}pack_f16", DType.BF16: f"{PREFIX}pack_bf16"}
"""(first, second): two f32 numbers as 16-bit ones of a register, each rounded to the nearest."""

EXP2 = f"{PREFIX}exp2"
"""(x): 2**x with a relative error of 2**-22; 0 where that is below the least normal number."""


def copy_piece(pieces: int) -> str:
    """Name the function (shared chunk, number, global, valid) that starts to copy one of so many pieces of a chunk."""
    return f"{PREFIX}copy_piece<{CHUNK_BYTES // pieces}>"


def wait(groups: int) -> str:
    """Name the function that waits until no more than this many groups of a thread's copies are on their way."""
    return f"{PREFIX}wait<{groups}>"


def round_tf32(registers: int) -> str:
    """Name the function that rounds the f32 numbers in registers to tf32."""
    return f"{PREFIX}round<{registers}>"


def _mma(name: str, shape: str, types: str) -> str:
    return f"""\
static __device__ __forceinline__ void {name}(float *sum, const unsigned *a, const unsigned *b) {{
  asm volatile("mma.sync.aligned.{shape}.row.col.f32.{types}.f32 "
               "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}}
"""


def _load(name: str, how: str) -> str:
    return f"""\
static __device__ __forceinline__ void {name}(unsigned *to, const void *from) {{
  asm volatile("ldmatrix.sync.aligned.m8n8.x4{how}.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"({PREFIX}shared(from)) : "memory");
}}
"""


def _pack(name: str, kind: str) -> str:
    return f"""\
static __device__ __forceinline__ unsigned {name}(float first, float second) {{
  unsigned both;
  asm("cvt.rn.{kind}.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}}
"""


SOURCE = f"""\
#ifndef CNNC_TENSOR_CORES
#define CNNC_TENSOR_CORES
static __device__ __forceinline__ unsigned {PREFIX}shared(const void *pointer) {{
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}}
static __device__ __forceinline__ void {COPY}(void *to, const void *from, bool valid) {{
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"({PREFIX}shared(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}}
template <int BYTES>
static __device__ __forceinline__ void {PREFIX}copy_piece(void *to, int number, const void *from, bool valid) {{
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :: "r"({PREFIX}shared(to) + number * BYTES), "l"(from), "n"(BYTES), "r"(valid ? BYTES : 0) : "memory");
}}
static __device__ __forceinline__ void {COMMIT}() {{ asm volatile("cp.async.commit_group;" ::: "memory"); }}
template <int GROUPS> static __device__ __forceinline__ void {PREFIX}wait() {{
  asm volatile("cp.async.wait_group %0;" :: "n"(GROUPS) : "memory");
}}
{_load(LOAD, "")}\
{_load(LOAD_TRANSPOSED, ".trans")}\
template <int COUNT> static __device__ __forceinline__ void {PREFIX}round(unsigned *registers) {{
#pragma unroll
  for (int i = 0; i < COUNT; i++) {{
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(registers[i]) : "f"(__uint_as_float(registers[i])));
  }}
}}
{_mma(MMA[DType.F16], "m16n8k16", "f16.f16")}\
{_mma(MMA[DType.BF16], "m16n8k16", "bf16.bf16")}\
{_mma(MMA[DType.F32], "m16n8k8", "tf32.tf32")}\
{_pack(PACK[DType.F16], "f16x2")}\
{_pack(PACK[DType.BF16], "bf16x2")}\
static __device__ __forceinline__ float {EXP2}(float x) {{
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}}
#endif
"""
