"""The emulation of copies of boxes: what they move, by a reference in numpy; and the mistakes it finds."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cnnc.backends.cuda.codegen import CudaSource, Launch
from cnnc.backends.host.device import TensorMap
from tests.backends.cuda.emulator import BACKWARD, FORWARD, SHUFFLED, Emulator, encoded, needs_gxx

pytestmark = needs_gxx

PRELUDE = "#include <cstdint>\n#include <math_constants.h>\n"
THREADS = 64

COPY = """
  extern __shared__ __align__(1024) char held[];
  void *barrier = held + {nbytes};
  if (threadIdx.x == 0) {{
    cnnc_tma_init(barrier, 1);
    cnnc_tma_fence();
  }}
  __syncthreads();
  if (threadIdx.x == 0) {{
    cnnc_tma_expect(barrier, {nbytes});
    {copy}
  }}
  cnnc_tma_wait(barrier, 0);
  for (int i = threadIdx.x; i < {nbytes}; i += blockDim.x) y[i] = held[i];
"""


def kernel(described: TensorMap, nbytes: int, copy: str, body: str = COPY) -> CudaSource:
    """Make a kernel that copies a box into shared memory, and that into its result."""
    text = body.format(nbytes=nbytes, copy=copy)
    parameters = "const __grid_constant__ cnnc_tma_map map, char* y"
    text = f'{PRELUDE}extern "C" __global__ void __launch_bounds__({THREADS}) tried({parameters}) {{\n{text}\n}}\n'
    launch = Launch(
        "tried", (("map", 0), 1), (1, 1, 1), (THREADS, 1, 1), shared_bytes=nbytes + 16, maps=((0, described),)
    )
    return CudaSource("tried", text, (launch,))


def copied(source: CudaSource, x: np.ndarray, nbytes: int, folder: Path) -> np.ndarray:
    """Run in several orders of threads, which must agree."""
    emulator = Emulator([source], folder)
    results = []
    for order in (FORWARD, BACKWARD, SHUFFLED, SHUFFLED + 1):
        y = np.zeros(nbytes, np.uint8)
        emulator.run(source, [x, y], order)
        results.append(y)
        assert np.array_equal(y, results[0]), order
    return results[0]


def aligned(values: np.ndarray) -> np.ndarray:
    """Put an array where it begins at a multiple of 16 bytes."""
    raw = np.zeros(values.nbytes + 64, np.uint8)
    view = raw[-raw.ctypes.data % 64 :][: values.nbytes].view(values.dtype).reshape(values.shape)
    view[...] = values
    return view


def numbers(shape: Sequence[int], dtype: str) -> np.ndarray:
    kind = np.uint64 if dtype == "u64" else np.uint16
    return aligned(np.random.default_rng(len(shape)).integers(1, 1 << 16, shape).astype(kind))


def strides_of(shape: Sequence[int], nbytes: int) -> tuple[int, ...]:
    return tuple(int(stride) for stride in np.cumprod([nbytes * shape[0], *shape[1:-1]]))


def at(x: np.ndarray, index: Sequence[int]) -> int:
    """Give an element by its place from the innermost axis; 0 outside."""
    inside = all(0 <= place < extent for place, extent in zip(index, x.shape[::-1], strict=True))
    return int(x[tuple(reversed(index))]) if inside else 0


def swizzled(y: np.ndarray, swizzle: bool) -> np.ndarray:
    """Put the chunks of each line of 128 bytes back, which are exchanged by the line's number in eight."""
    if not swizzle:
        return y
    lines = y.reshape(-1, 8, 16)
    order = np.arange(8) ^ (np.arange(len(lines)) % 8)[:, None]
    return np.take_along_axis(lines, order[:, :, None], 1).reshape(-1)


class Box(NamedTuple):
    """A box of a tiled map: the tensor's type and extents, the box's, its steps, where it begins, and the swizzle."""

    dtype: str
    shape: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    place: tuple[int, ...]
    swizzled: bool


TILED = [
    Box("f16", (72, 20), (64, 16), (), (0, 0), True),
    Box("f16", (72, 20), (64, 16), (), (64, 10), True),
    Box("bf16", (40, 9, 3), (64, 12, 1), (), (-8, -2, 2), True),
    Box("f16", (24, 7, 5), (8, 16, 2), (), (16, 3, -1), False),
    Box("u64", (300, 11), (256, 4), (), (100, 9), False),
    Box("u64", (6, 30), (16, 1), (), (2, 30), False),
    Box("f16", (16, 9, 8, 3), (8, 4, 5, 2), (1, 2, 3, 1), (8, -1, 2, 1), False),
    Box("f16", (8, 5, 4, 3, 6), (8, 2, 3, 2, 4), (1, 1, 2, 1, 1), (0, 4, -1, 1, 3), False),
]


@pytest.mark.parametrize("case", TILED, ids=str)
def test_boxes(case: Box, tmp_path: Path) -> None:
    dtype, shape, box, steps, place, swizzle = case
    x = numbers(shape[::-1], dtype)
    described = TensorMap(dtype, shape, strides_of(shape, x.itemsize), box, swizzle, steps=steps)
    assert described.is_possible
    counts = [-(-extent // step) for extent, step in zip(box, steps or (1,) * len(box), strict=True)]
    wanted = [
        at(x, [p + i * s for p, i, s in zip(place, index[::-1], steps or (1,) * len(box), strict=True)])
        for index in product(*map(range, counts[::-1]))
    ]
    nbytes = len(wanted) * x.itemsize
    call = f"cnnc_tma_tiled_{len(shape)}(held, &map, barrier, {', '.join(map(str, place))});"
    result = copied(kernel(described, nbytes, call), x, nbytes, tmp_path)
    assert swizzled(result, swizzle).view(x.dtype).tolist() == wanted
    assert any(wanted) != (place == (2, 30)), "one box is outside altogether"


class Windows(NamedTuple):
    """Pixels of windows: the tensor's extents, channels and pixels, corners, steps, where they begin, and the tap."""

    shape: tuple[int, ...]
    box: tuple[int, int]
    lower: tuple[int, ...]
    upper: tuple[int, ...]
    steps: tuple[int, ...]
    place: tuple[int, ...]
    offset: tuple[int, ...]


IM2COL = [
    Windows((64, 9, 14, 3), (8, 64), (-1, -1), (-1, -1), (1, 1, 1, 1), (8, 7, 4, 0), (0, 0)),
    Windows((64, 9, 14, 3), (8, 64), (0, 0), (-2, -2), (1, 1, 1, 1), (56, 6, 4, 0), (2, 2)),
    Windows((64, 8, 14, 2), (16, 32), (-1, -1), (-1, -1), (1, 2, 2, 1), (0, 5, 5, 0), (1, 1)),
    Windows((16, 6, 5, 4), (8, 100), (-3, -2), (1, 0), (1, 3, 2, 1), (8, -3, 2, 1), (4, 3)),
    Windows((8, 7, 5, 2, 3), (8, 80), (-1, -2, 0), (-1, 0, 0), (1, 1, 2, 1, 1), (0, 3, -2, 1, 1), (2, 1, 0)),
    Windows((8, 3, 3, 4, 2), (8, 64), (-2, 0, -1), (2, -1, -2), (1, 1, 1, 2, 1), (0, 4, 1, 1, 0), (0, 1, 2)),
    Windows((8, 3, 2, 1, 4), (8, 16), (0, 0, 0), (0, 0, 0), (1, 1, 1, 1, 1), (0, 0, 0, 0, 4), (0, 0, 0)),
]


@pytest.mark.parametrize("case", IM2COL, ids=str)
def test_pixels_of_windows(case: Windows, tmp_path: Path) -> None:
    """The reference lists all bases of windows first, and finds the one to begin at."""
    shape, box, lower, upper, steps, place, offset = case
    x = numbers(shape[::-1], "f16")
    described = TensorMap("f16", shape, strides_of(shape, 2), box, lower=lower, upper=upper, steps=steps)
    assert described.is_possible
    axes = [
        range(low, extent + up, step) for low, up, extent, step in zip(lower, upper, shape[1:], steps[1:], strict=False)
    ]
    bases = [(*reversed(inner), image) for image in range(shape[-1] + 64) for inner in product(*reversed(axes))]
    first = bases.index(place[1:])
    wanted = [
        at(x, [place[0] + c, *(b + o for b, o in zip(base, (*offset, 0), strict=True))])
        for base in bases[first : first + box[1]]
        for c in range(box[0])
    ]
    nbytes = 2 * len(wanted)
    assert nbytes == 2 * box[0] * box[1]
    call = f"cnnc_tma_im2col_{len(shape)}(held, &map, barrier, {', '.join(map(str, (*place, *offset)))});"
    result = copied(kernel(described, nbytes, call), x, nbytes, tmp_path)
    assert result.view(np.uint16).tolist() == wanted


# Mistakes

SHAPE, BOX = (64, 8), (64, 8)
PLAIN = TensorMap("f16", SHAPE, strides_of(SHAPE, 2), BOX, swizzled=True)
NBYTES = 1024
CALL = "cnnc_tma_tiled_2(held, &map, barrier, 0, 0);"

FAULTS = {
    "no fence": ("cnnc_tma_fence();", "", "no fence says that the barrier was made"),
    "no barrier of the block": (
        "__syncthreads();",
        "",
        "used before a barrier of the block|there is none at this address",
    ),
    "bytes that are too few": ("expect(barrier, 1024)", "expect(barrier, 512)", "within a phase|never ends"),
    "bytes that are too many": ("expect(barrier, 1024)", "expect(barrier, 2048)", "a phase that never ends"),
    "no bytes": ("expect(barrier, 1024)", "expect(barrier, 0)", "before its copies have landed|within a phase"),
    "no arrival": ("cnnc_tma_expect(barrier, 1024);", "", "never ends"),
    "another parity": ("wait(barrier, 0)", "wait(barrier, 1)", "another phase than the next"),
    "a phase more": ("wait(barrier, 0);", "wait(barrier, 0); cnnc_tma_wait(barrier, 1);", "a phase that never ends"),
    "no wait": ("cnnc_tma_wait(barrier, 0);", "", "ends before its copies have landed"),
    "a second arrival": ("init(barrier, 1)", "init(barrier, 2)", "a phase that never ends"),
    "an address that is not aligned": ("(held, &map", "(held + 64, &map", "multiples of 128"),
    "an address outside": ("(held, &map", "(held + 128, &map", "copies to shared memory"),
    "a barrier that is overwritten": ("cnnc_tma_fence();", "cnnc_tma_fence(); held[1026] = 1;", "was written over it"),
    "a barrier that is not aligned": ("held + 1024;", "held + 1028;", "in eight bytes of shared memory"),
    "a map of another rank": (
        "cnnc_tma_tiled_2(held, &map, barrier, 0, 0)",
        "cnnc_tma_tiled_3(held, &map, barrier, 0, 0, 0)",
        "another rank",
    ),
    "another mode": (
        "cnnc_tma_tiled_2(held, &map, barrier, 0, 0)",
        "cnnc_tma_im2col_4(held, &map, barrier, 0, 0, 0, 0, 0, 0)",
        "rank or mode",
    ),
    "no map": ("&map", "(const cnnc_tma_map *)held", "no map at this address"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_mistakes_are_found(fault: str, tmp_path: Path) -> None:
    """In each order of threads, or else the numbers are wrong, or depend on it."""
    old, new, message = FAULTS[fault]
    whole = kernel(PLAIN, NBYTES, CALL)
    source = replace(whole, text=whole.text.replace(old, new))
    assert source.text != whole.text
    x = numbers(SHAPE[::-1], "f16")
    emulator = Emulator([source], tmp_path)
    for order in (FORWARD, BACKWARD):
        y = np.zeros(NBYTES, np.uint8)
        if fault == "no wait" and order == BACKWARD:
            continue  # There it happens to be right.
        with pytest.raises(AssertionError, match=message):
            emulator.run(source, [x, y], order)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("0, 9, 0, 0, 0, 0", "not in the bounding box"),
        ("0, 0, -1, 0, 0, 0", "not in the bounding box"),
        ("0, 0, 0, 0, 256, 0", "an offset is out of range"),
    ],
)
def test_windows_stay_in_the_bounding_box(place: str, message: str, tmp_path: Path) -> None:
    shape = (8, 9, 9, 2)
    described = TensorMap(
        "f16", shape, strides_of(shape, 2), (8, 64), lower=(-1, 0), upper=(-1, -2), steps=(1, 1, 1, 1)
    )
    source = kernel(described, NBYTES, f"cnnc_tma_im2col_4(held, &map, barrier, {place});")
    with pytest.raises(AssertionError, match=message):
        Emulator([source], tmp_path).run(source, [numbers(shape[::-1], "f16"), np.zeros(NBYTES, np.uint8)])


# The driver's checks

WINDOW = TensorMap(
    "f16", (8, 9, 9, 4, 2), (16, 144, 2592, 1296), (8, 64), lower=(-1, -1, 0), upper=(-1, -1, 0), steps=(1, 2, 2, 1, 1)
)

IMPOSSIBLE = [
    replace(PLAIN, shape=(0, 8)),
    replace(PLAIN, shape=(2**32 + 1, 8), strides=(2**34,)),
    replace(PLAIN, strides=(136,)),
    replace(PLAIN, strides=(1 << 40,)),
    replace(PLAIN, strides=(48,)),
    replace(PLAIN, box=(128, 8)),
    replace(PLAIN, box=(4, 8)),
    replace(PLAIN, box=(64, 257)),
    replace(PLAIN, box=(64, 0)),
    replace(PLAIN, steps=(1, 9)),
    replace(PLAIN, shape=(64, 2, 2, 2, 2, 2), strides=(128,) * 5, box=(64, 1, 1, 1, 1, 1)),
    replace(WINDOW, lower=(-17, -1, 0)),
    replace(WINDOW, upper=(-1, 16, 0)),
    replace(WINDOW, upper=(-10, -1, 0)),
    replace(WINDOW, steps=(1, 9, 2, 1, 1)),
    replace(WINDOW, box=(264, 64)),
    replace(WINDOW, box=(8, 1025)),
    replace(WINDOW, shape=(8, 9), strides=(16,), lower=(), upper=(), box=(8, 264), steps=()),
]


def test_impossible_maps_are_refused_by_us_and_by_the_driver(tmp_path: Path) -> None:
    """What `is_possible` lets through the driver makes, and no more."""
    emulator = Emulator([kernel(PLAIN, NBYTES, CALL)], tmp_path)
    library = ctypes.CDLL(emulator.path)
    pointer = aligned(np.zeros(4096, np.uint8)).ctypes.data
    for described in (PLAIN, WINDOW):
        assert described.is_possible
        assert encoded(library, described, pointer)[1] == 0
        assert encoded(library, described, pointer + 8)[1] == 1, "an address that is not aligned"
    for described in IMPOSSIBLE:
        assert not described.is_possible, described
        assert encoded(library, described, pointer)[1] == 1, described
