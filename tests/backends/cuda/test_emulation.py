"""The emulation itself: it computes as CUDA documents it, and finds the mistakes it is there to find."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.codegen import CudaSource, Launch
from tests.backends.cuda.emulator import BACKWARD, FORWARD, SHUFFLED, Emulator, needs_gxx

pytestmark = needs_gxx

PRELUDE = "#include <cstdint>\n#include <math_constants.h>\n"


def kernel(body: str, threads: int, blocks: int = 1, arguments: str = "float* x, float* y") -> CudaSource:
    text = f'{PRELUDE}extern "C" __global__ void __launch_bounds__({threads}) tried({arguments}) {{\n{body}\n}}\n'
    count = arguments.count("*")
    return CudaSource("tried", text, (Launch("tried", tuple(range(count)), (blocks, 1, 1), (threads, 1, 1)),))


def outcomes(source: CudaSource, x: np.ndarray, folder: Path) -> list[list[float]]:
    emulator = Emulator([source], folder)
    results = []
    for order in (FORWARD, BACKWARD, SHUFFLED, SHUFFLED + 1):
        y = np.zeros(x.size, x.dtype)
        emulator.run(source, [x, y], order)
        results.append(y.tolist())
    return results


REVERSE = """
  __shared__ alignas(64) float held[64];
  held[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  {barrier}
  y[blockIdx.x * 64 + threadIdx.x] = held[63 - threadIdx.x];
"""


def test_a_barrier_orders_threads(tmp_path: Path) -> None:
    x = np.arange(128, dtype=np.float32)
    results = outcomes(kernel(REVERSE.format(barrier="__syncthreads();"), 64, 2), x, tmp_path)
    wanted = np.concatenate([x[:64][::-1], x[64:][::-1]]).tolist()
    assert results == [wanted] * 4


def test_a_missing_barrier_shows(tmp_path: Path) -> None:
    x = np.arange(128, dtype=np.float32)
    results = outcomes(kernel(REVERSE.format(barrier=""), 64, 2), x, tmp_path)
    assert results[0] != results[1]


def test_a_barrier_that_some_threads_miss_is_an_error(tmp_path: Path) -> None:
    source = kernel("if (threadIdx.x < 5) __syncthreads(); y[threadIdx.x] = x[threadIdx.x];", 8)
    with pytest.raises(AssertionError, match="some threads wait in __syncthreads, others never reach it"):
        outcomes(source, np.zeros(8, np.float32), tmp_path)


def test_a_shuffle_that_some_lanes_miss_is_an_error(tmp_path: Path) -> None:
    source = kernel("if (threadIdx.x < 5) y[threadIdx.x] = __shfl_sync(0xffu, x[threadIdx.x], 0);", 8)
    with pytest.raises(AssertionError, match="shuffle"):
        outcomes(source, np.zeros(8, np.float32), tmp_path)


@pytest.mark.parametrize("threads", [8, 32, 40])
def test_shuffles_move_what_cuda_documents(tmp_path: Path, threads: int) -> None:
    body = """
      unsigned mask = __activemask();
      float a = __shfl_down_sync(mask, x[threadIdx.x], 3, 8);
      float b = __shfl_up_sync(mask, x[threadIdx.x], 2, 8);
      float c = __shfl_xor_sync(mask, x[threadIdx.x], 5, 8);
      float d = __shfl_sync(mask, x[threadIdx.x], 6, 8);
      y[threadIdx.x] = a + 100 * b + 10000 * c + 1000000 * d;
    """
    i = np.arange(threads)
    group, lane = i // 8 * 8, i % 8
    down = group + np.where(lane + 3 < 8, lane + 3, lane)
    up = group + np.where(lane >= 2, lane - 2, lane)
    wanted = down + 100.0 * up + 10000.0 * (group + (lane ^ 5)) + 1000000.0 * (group + 6)
    x = np.arange(threads, dtype=np.float64)
    source = kernel(body.replace("float", "double"), threads, arguments="double* x, double* y")
    assert outcomes(source, x, tmp_path) == [wanted.tolist()] * 4


@pytest.mark.parametrize(("name", "dtype"), [("half", "float16"), ("nv_bfloat16", "bfloat16")])
def test_narrow_floats_round_as_numpy(tmp_path: Path, name: str, dtype: str) -> None:
    import ml_dtypes

    kind = np.dtype(np.float16) if dtype == "float16" else np.dtype(ml_dtypes.bfloat16)
    rng = np.random.default_rng(3)
    every = np.arange(1 << 16, dtype=np.uint16).view(kind).astype(np.float32)
    between = np.ldexp(rng.standard_normal(1 << 13), rng.integers(-30, 20, 1 << 13)).astype(np.float32)
    x = np.concatenate([every, between])
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = x.astype(kind)
    body = f"""
      int i = blockIdx.x * 256 + threadIdx.x;
      {name} narrow = ({name})x[i];
      y[i] = (float)narrow;
    """
    source = kernel(body, 256, x.size // 256)
    (result, *_) = outcomes(source, x, tmp_path)
    np.testing.assert_array_equal(np.array(result, np.float32), wanted.astype(np.float32))


MULTIPLY = """
  extern __shared__ __align__(1024) char held[];
  for (int i = threadIdx.x; i < {chunks}; i += 128) cnnc_tc_copy(held + i * 16, (const char *)x + i * 16, true);
  cnnc_tc_commit();
  cnnc_tc_wait<0>();
  cnnc_wgmma_publish();
  __syncthreads();
  float sums[{columns} / 2] = {{}};
  cnnc_wgmma_fence<{columns} / 2>(sums);
  cnnc_wgmma_f16<{columns}, {across}, {across}>(sums, {a}ull, {b}ull);
  cnnc_wgmma_commit();
  cnnc_wgmma_wait<0, {columns} / 2>(sums);
  int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < {columns} / 2; i++) y[(row + i / 2 % 2 * 8) * {columns} + i / 4 * 8 + column + i % 2] = sums[i];
"""


def strided(index: int, *levels: tuple[int, int]) -> int:
    """Give the offset of an index by the extents and strides it is split into; the last extent has no end."""
    offset = 0
    for extent, stride in levels[:-1]:
        offset += index % extent * stride
        index //= extent
    return offset + index * levels[-1][1]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("wide", "mode"), [(1, 0), (2, 3), (4, 2), (8, 1)])
def test_products_of_groups_read_the_canonical_layouts(wide: int, mode: int, across: bool, tmp_path: Path) -> None:
    """Operands laid out as CUTLASS writes the layouts of descriptors: extents and strides, then the swizzle."""
    columns, rng = 128, np.random.default_rng(wide)
    a, b = (rng.integers(-4, 5, (rows, 16)).astype(np.float16) for rows in (64, columns))
    atom = wide * 128  # bytes of eight lines
    stride, leading = 2 * atom, (64 if wide == 1 else 8) * atom
    memory = np.zeros(1 << 17, np.uint8)
    descriptors = []
    for start, operand in ((1024, a), (1024 + (1 << 16), b)):
        for (row, k), number in np.ndenumerate(operand):
            if not across:
                offset = strided(row, (8, wide * 16), (0, stride))
                offset += strided(k, (8, 2), (0, leading if wide == 1 else 16))
            elif wide == 1:
                offset = strided(row, (8, 2), (0, stride)) + strided(k, (8, 16), (0, leading))
            else:
                offset = strided(row, (8, 2), (wide, 16), (0, leading)) + strided(k, (8, wide * 16), (0, stride))
            address = start + offset
            address ^= (address >> 7 & wide - 1) << 4
            memory[address - 1024 : address - 1022] = np.frombuffer(number.tobytes(), np.uint8)
        descriptors.append(start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62)
    body = MULTIPLY.format(
        chunks=memory.size // 16, columns=columns, across=int(across), a=descriptors[0], b=descriptors[1]
    )
    launch = Launch("tried", (0, 1), (1, 1, 1), (128, 1, 1), memory.size)
    source = replace(kernel(body, 128), launches=(launch,))
    y = np.zeros((64, columns), np.float32)
    Emulator([source], tmp_path).run(source, [memory, y])
    np.testing.assert_array_equal(y, a.astype(np.float32) @ b.astype(np.float32).T)
