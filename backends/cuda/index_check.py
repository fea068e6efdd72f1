"""Checks on the GPU of indices that are data: what `cpu/index_check` is for a CPU."""

from __future__ import annotations

import hashlib

from cnnc.backends.cuda.codegen import CudaSource, Launch
from cnnc.backends.cuda.kernels import KernelJob
from cnnc.backends.lower.identity import source_digest
from cnnc.backends.lower.run_time_indices import OUT_OF_RANGE, check_symbol
from cnnc.ir.types import DType, TensorType
from cnnc.target import Target

_THREADS = 256

_TEXT = """\
extern "C" __global__ void __launch_bounds__({threads}) {symbol}_kernel(const {type}* indices, int* status) {{
  const long long extents[{components}] = {{{extents}}};
  const long long i = (long long)blockIdx.x * {threads} + threadIdx.x;
  if (i < {count}) {{
    const long long index = indices[i];
    const long long extent = extents[i % {components}];
    if (index < -extent || index >= extent) {{
      *status = {out_of_range};
    }}
  }}
}}
"""


def index_check(type_: TensorType, extents: tuple[int, ...]) -> CudaSource:
    """Make the kernel over (indices, status) that sets the status where an index is outside of [-extent, extent)."""
    symbol = check_symbol(type_, extents)
    count = type_.elements
    text = _TEXT.format(
        threads=_THREADS,
        symbol=symbol,
        type="long long" if type_.dtype is DType.I64 else "int",
        components=len(extents),
        extents=", ".join(map(str, extents)),
        count=count,
        out_of_range=OUT_OF_RANGE,
    )
    launch = Launch(f"{symbol}_kernel", (0, 1), (-(-count // _THREADS), 1, 1), (_THREADS, 1, 1))
    return CudaSource(symbol, text, (launch,))


def check_job(type_: TensorType, extents: tuple[int, ...], target: Target) -> KernelJob:
    """Make the job of a check."""
    parts = (check_symbol(type_, extents), str(target), source_digest())
    return KernelJob(hashlib.sha256("\0".join(parts).encode()).hexdigest(), lambda: index_check(type_, extents))
