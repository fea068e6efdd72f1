"""Device functions for copies of whole boxes of a tensor into shared memory (TMA), which one thread starts.

A copy is told of the tensor by a map (see `TensorMap`), a parameter of the kernel that the driver has made, and counts
the bytes it has written at a barrier in shared memory (`mbarrier`).  A phase of such a barrier ends when as many
threads have arrived as it was made for, and as many bytes as they expected; what copies wrote is then there for those
who wait, and for products of groups of warps, without a fence.  Compute capability 9.0 and up; PTX ISA, "Data movement
and conversion instructions: tensor copy" and "Parallel synchronization: mbarrier".  The emulation has functions of the
same names.
"""

from __future__ import annotations

import re

from cnnc.backends.cuda import tensor_cores

PREFIX = "cnnc_tma_"
"""What the names of all of them begin with."""

MAP = "tensor_map"
"""What the names of parameters that are maps begin with."""

MAP_WORDS = 16
"""Of eight bytes, in a map."""

BARRIER_BYTES = 8

INIT = f"{PREFIX}init"
"""(barrier, arrivals): make a barrier, whose phases so many arrivals end."""

FENCE = f"{PREFIX}fence"
"""(): barriers that the thread has made are there for copies, and after a barrier of the block for other threads."""

EXPECT = f"{PREFIX}expect"
"""(barrier, bytes): arrive, and have the phase last until copies have written so many bytes."""

WAIT = f"{PREFIX}wait"
"""(barrier, parity): wait until the phase is over whose number has this parity, the present one or that before it."""

IM2COL = f"{PREFIX}im2col_5"
"""(shared, map, barrier, c, w, h, d, n, offset w, h, d): copy pixels of windows, from the one at w, h, d, n on."""


def tiled(rank: int) -> str:
    """Name the function (shared, map, barrier, first element of each axis) that copies a box of this rank."""
    return f"{PREFIX}tiled_{rank}"


def with_maps(functions: str) -> str:
    """Have functions of a source take maps themselves, where TVM has pointers to them.

    So they lie in the memory of parameters, and no fence is needed before their use.
    """
    functions = re.sub(
        rf"uint64_t\* __restrict__ ({MAP}\d+)_ptr\b", rf"const __grid_constant__ {PREFIX}map \1", functions
    )
    return re.sub(rf"\(&\(({MAP}\d+)_ptr\[0\]\)\)", r"&\1", functions)


def _tiled(rank: int) -> str:
    parameters = ", ".join(f"int x{i}" for i in range(rank))
    places = ", ".join(f"%{3 + i}" for i in range(rank))
    values = ", ".join(f'"r"(x{i})' for i in range(rank))
    return f"""\
static __device__ __forceinline__ void {tiled(rank)}(void *to, const {PREFIX}map *map, void *barrier, {parameters}) {{
  asm volatile("cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {{{places}}}], [%2];"
               :: "r"({tensor_cores.PREFIX}shared(to)), "l"(map), "r"({tensor_cores.PREFIX}shared(barrier)), {values}
               : "memory");
}}
"""


SOURCE = f"""\
#ifndef CNNC_TMA
#define CNNC_TMA
struct __align__(64) {PREFIX}map {{ unsigned long long opaque[{MAP_WORDS}]; }};
static __device__ __forceinline__ void {INIT}(void *barrier, int arrivals) {{
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :: "r"({tensor_cores.PREFIX}shared(barrier)), "r"(arrivals) : "memory");
}}
static __device__ __forceinline__ void {FENCE}() {{
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}}
static __device__ __forceinline__ void {EXPECT}(void *barrier, int bytes) {{
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"({tensor_cores.PREFIX}shared(barrier)), "r"(bytes) : "memory");
}}
static __device__ __forceinline__ void {WAIT}(void *barrier, int parity) {{
  asm volatile("{{\\n"
               ".reg .pred over;\\n"
               "again:\\n"
               "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\\n"
               "@!over bra again;\\n"
               "}}"
               :: "r"({tensor_cores.PREFIX}shared(barrier)), "r"(parity) : "memory");
}}
{_tiled(2)}\
{_tiled(3)}\
static __device__ __forceinline__ void {IM2COL}(void *to, const {PREFIX}map *map, void *barrier, int c, int w, int h,
                                                  int d, int n, int right, int down, int back) {{
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
               "[%0], [%1, {{%3, %4, %5, %6, %7}}], [%2], {{%8, %9, %10}};"
               :: "r"({tensor_cores.PREFIX}shared(to)), "l"(map), "r"({tensor_cores.PREFIX}shared(barrier)), "r"(c),
                  "r"(w), "r"(h), "r"(d), "r"(n), "h"((unsigned short)right), "h"((unsigned short)down),
                  "h"((unsigned short)back)
               : "memory");
}}
#endif
"""
