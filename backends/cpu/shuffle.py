"""Channels dealt out in turn, on blocked channels (NCHWc): which lane goes where is known, so vectors are permuted.

    y[n, b, p, l] = x[n, s / block, p, s % block],   s = the channel that channel b * block + l of y is

Every block of y is made of the same few vectors of x at every pixel, picked apart by one or two permutations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from cnnc.backends.lower.template import schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ir.types import DType
from cnnc.ops.blocked import channel_layout
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.shuffle import ShuffleChannels
from cnnc.target import Target

__all__ = ["Shuffle", "ShuffleParams", "sources"]

_BYTES_PER_SECOND = 2e10

_PIXELS = 64
"""Pixels of a slice: their vectors are read for more than one block, from L1."""


@dataclass(frozen=True)
class ShuffleParams:
    """Pixels of a slice."""

    pixels: int


@dataclass(frozen=True)
class Shuffle:
    """The template: `shuffle_channels` of images in blocks."""

    name: str = "shuffle"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a kernel that is nothing but a shuffle of float32 images of fixed size."""
        return _find(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the one schedule there is."""
        _, _, height, width = kernel.body.outputs[0].type.static_shape
        return (schedule_of(self.name, ShuffleParams(min(_PIXELS, height * width))),)

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run from what it writes, and reads for that."""
        return 2.0 * kernel.body.outputs[0].type.nbytes / _BYTES_PER_SECOND / target.threads

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        node = _find(kernel, target)
        if node is None:
            raise VerifyError(f"{self.name} cannot compute kernel {kernel.anchor}")
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        return _build(kernel, node, schedule["pixels"], target.vector_lanes)


def _find(kernel: Fused, target: Target) -> Node | None:
    """Give the shuffle that the kernel is, whose operands are the kernel's inputs."""
    node = kernel.body.outputs[0].node
    if target.kind != "cpu" or len(kernel.body.outputs) != 1 or not isinstance(node.op, ShuffleChannels):
        return None
    types = [v.type for v in (*node.inputs, *node.values)]
    blocked = channel_layout(4, target.vector_lanes)
    if any(not t.is_static or t.dtype is not DType.F32 or t.rank != 4 or t.layout != blocked for t in types):
        return None
    inside = set(kernel.body.inputs).issuperset(node.inputs)
    return node if inside and all(t.elements for t in types) else None


def sources(op: ShuffleChannels, sizes: Iterable[int]) -> list[tuple[int, int]]:
    """Give, for each channel of the output, the input it is from, of so many channels each, and its channel there."""
    starts = [0, *accumulate(sizes)]
    found = []
    for channel in range(op.size):
        source = op.source(channel, starts[-1])
        part = max(i for i, start in enumerate(starts[:-1]) if start <= source)
        found.append((part, source - starts[part]))
    return found


def _build(kernel: Fused, node: Node, pixels: int, block: int) -> Any:
    from tvm import tirx

    from cnnc.backends.lower import loops

    assert isinstance(node.op, ShuffleChannels)
    out = node.types[0]
    images, channels, height, width = out.static_shape
    whole = height * width

    def buffer(name: str, channels: int) -> Any:
        return loops.buffer(name, (images, -(-channels // block), whole, block))

    buffers = {v: buffer(f"x{i}", v.type.static_shape[1]) for i, v in enumerate(kernel.body.inputs)}
    y = buffer("y", channels)
    places = sources(node.op, [v.type.static_shape[1] for v in node.inputs])
    chunks = -(-whole // pixels)

    def one_block(image: Any, number: int, first: Any, count: Any) -> Any:
        lanes = places[number * block : (number + 1) * block]
        vectors = list(dict.fromkeys((part, channel // block) for part, channel in lanes))
        picked = [vectors.index((part, channel // block)) * block + channel % block for part, channel in lanes]
        picked += [len(vectors) * block] * (block - len(lanes))

        def pixel(p: Any) -> Any:
            read = [loops.load(buffers[node.inputs[part]], image, b, first + p, 0, lanes=block) for part, b in vectors]
            if len(lanes) < block:
                read.append(tirx.Broadcast(tirx.const(0.0, "float32"), block))
            value = tirx.Shuffle(read, [loops.const(lane) for lane in picked])
            return loops.store(y, value, image, number, first + p, 0, lanes=block)

        return loops.loop(count, pixel, "pixel")

    def one_slice(index: Any) -> Any:
        image, first = index // chunks, index % chunks * pixels
        count = pixels if whole % pixels == 0 else tirx.min(loops.const(pixels), whole - first)
        blocks = range(math.ceil(channels / block))
        return loops.sequence(*(one_block(image, number, first, count) for number in blocks))

    return loops.function([*buffers.values(), y], loops.parallel(images * chunks, one_slice))
