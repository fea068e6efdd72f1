"""Pooling on a GPU's ordinary cores: the maximum, minimum or mean of windows, and reductions of whole images.

    y[n, c, oh, ow] = max (min, sum) over r, s of x[n, c, oh * stride - pad + r * dilation, ...]

Windows are computed in strips of registers (see strips.py).  An image is shared by threads that take neighbours, up to
four at a time, and then add up what they found, always in the same order.  Padding takes part in nothing; a NaN in a
window is its maximum and minimum.  A mean is the sum with a division after it, which is the epilogue's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from cnnc.backends.cuda.direct import VECTOR, Work, image_block, moved_bytes, seconds
from cnnc.backends.cuda.operands import STORED, follows_in_registers, stored_operand
from cnnc.backends.cuda.strips import MOST_TAPS, StripParams, Windows
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.graph import Node, Value
from cnnc.ir.op import Op
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.pool import AveragePool, MaxPool, MinPool
from cnnc.ops.reduce import ReduceMax, ReduceMean, ReduceMin, ReduceSum
from cnnc.target import Target

PoolKind = Literal["max", "min", "sum"]

_KINDS: dict[type[Op], PoolKind] = {
    **{MaxPool: "max", MinPool: "min", AveragePool: "sum"},
    **{ReduceMax: "max", ReduceMin: "min", ReduceSum: "sum", ReduceMean: "sum"},
}

_STEPS: dict[PoolKind, int] = {"max": 3, "min": 3, "sum": 1}
"""Instructions to take in a number: two comparisons and a choice, or an addition."""

BLOCK = 128
"""Threads of a block, if an image has no more."""

FEW = 32
"""Threads whose results one of them adds up."""


@dataclass(frozen=True)
class Pool:
    """Windows up to 7x7, with an elementwise epilogue."""

    name: str = "pool"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take f32 and 16-bit images, plain or in blocks of channels."""
        return target.is_gpu and matched(kernel) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give every strip."""
        windows, _ = _matched(kernel)
        return [schedule_of(self.name, strip) for strip in windows.space()]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds."""
        windows, kind = _matched(kernel)
        return windows.cost(kernel, params_of(StripParams, schedule), target, step=_STEPS[kind], weights=0)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.pool_loops import gather_of
        from cnnc.backends.cuda.strip_loops import strip_func

        windows, kind = _matched(kernel)
        return strip_func(kernel, windows, params_of(StripParams, schedule), gather_of(kind))


@dataclass(frozen=True)
class ImageParams:
    """The threads that share an image, a power of two."""

    threads: int

    @property
    def images(self) -> int:
        """The images of a block."""
        return max(1, BLOCK // self.threads)


@dataclass(frozen=True)
class Images:
    """A reduction of whole images: the operator, what it reads, how many channels lie together, what it computes."""

    node: Node
    image: Value
    block: int
    kind: PoolKind

    @property
    def pixels(self) -> int:
        """The pixels of an image."""
        return math.prod(self.image.type.static_shape[2:])

    @property
    def lanes(self) -> int:
        """The numbers that a thread loads at once: channels, or pixels where channels do not lie together."""
        return VECTOR if self.block > 1 else math.gcd(self.pixels, VECTOR)

    @property
    def parts(self) -> int:
        """The threads that share a pixel."""
        return max(self.block // VECTOR, 1)

    @property
    def items(self) -> int:
        """What the threads of a part share."""
        return self.pixels if self.block > 1 else self.pixels // self.lanes

    @property
    def count(self) -> int:
        """The images, of a block of channels each."""
        return math.prod(self.image.type.physical_shape[:2])


@dataclass(frozen=True)
class GlobalPool:
    """The maximum, minimum, sum and mean of whole images, with an elementwise epilogue."""

    name: str = "pool_global"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take f32 and 16-bit images, plain or in blocks of channels."""
        return target.is_gpu and matched_images(kernel) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give numbers of threads, up to where each has one load."""
        images = _matched_images(kernel)
        most = max(images.items * images.parts, _FEWEST)
        counts = [1 << power for power in range(11)]
        return [schedule_of(self.name, ImageParams(t)) for t in counts if _FEWEST <= t < 2 * most]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds."""
        images, params = _matched_images(kernel), params_of(ImageParams, schedule)
        turns = math.ceil(images.items * images.parts / params.threads)
        each = 3 + images.lanes * (_STEPS[images.kind] + (images.image.dtype.itemsize < 4))
        others = params.threads // images.parts
        added = others if others <= FEW else FEW + others // FEW
        block = params.images * params.threads
        # One warp for each image adds up, and the others wait for it.
        adding = min(1.0, 32 * params.images / block)
        work = Work(
            math.ceil(images.count / params.images),
            block,
            _START + turns * each + added * (1 + _STEPS[images.kind]) * adding,
            1 + turns / _IN_FLIGHT + added / _NEAR,
            32,
        )
        return seconds(work, moved_bytes(kernel), target)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.pool_loops import images_func

        return images_func(kernel, _matched_images(kernel), params_of(ImageParams, schedule))


_FEWEST = 4
"""Threads of an image: each part of a block of channels needs one."""

_START = 40
"""Instructions of a thread around its sums."""

_IN_FLIGHT, _NEAR = 4, 64
"""Loads that a thread has under way at once, and loads from shared memory in the time of one that goes further."""


@lru_cache(256)
def matched(kernel: Fused) -> tuple[Windows, PoolKind] | None:
    """Find a kernel's windows and what is made of them; None where it is no pool, or none for this template."""
    node = follows_in_registers(kernel, (MaxPool, MinPool, AveragePool))
    image = _image(node, kernel)
    if node is None or image is None or not isinstance(node.op, MaxPool | MinPool | AveragePool):
        return None
    block = image_block(image.type)
    if block is None or max(node.op.kernel) > MOST_TAPS:
        return None
    (kh, kw), (down, across), (top, left, *_), (dh, dw) = node.op.kernel, node.op.stride, node.op.pad, node.op.dilation
    return Windows(node, image, block, (kh, kw), (down, across), (top, left), (dh, dw)), _KINDS[type(node.op)]


@lru_cache(256)
def matched_images(kernel: Fused) -> Images | None:
    """Find a kernel's reduction of whole images, also by a window that is all of one; None where there is none."""
    node = follows_in_registers(kernel, tuple(_KINDS))
    image = _image(node, kernel)
    if node is None or image is None:
        return None
    block = image_block(image.type)
    return (
        Images(node, image, block, _KINDS[type(node.op)]) if block is not None and _is_global(node.op, image) else None
    )


def _image(node: Node | None, kernel: Fused) -> Value | None:
    """Give what a pool reads from memory."""
    if node is None or len(node.types) != 1 or node.types[0].dtype not in STORED:
        return None
    return stored_operand(node.inputs[0], kernel.body)


def _is_global(op: Op, image: Value) -> bool:
    if isinstance(op, ReduceMax | ReduceMean | ReduceMin | ReduceSum):
        return op.axes == (2, 3)
    if not isinstance(op, MaxPool | MinPool | AveragePool):
        return False
    whole = op.kernel == image.type.static_shape[2:]
    return whole and set(op.pad) == {0} and set(op.dilation) == {1} and not op.ceil_mode


def _matched(kernel: Fused) -> tuple[Windows, PoolKind]:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found


def _matched_images(kernel: Fused) -> Images:
    found = matched_images(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found
