"""Sliding windows: output sizes, padding, and the checks that convolutions and pools share.

All tuples are by spatial axis; `pad` is (begin of each axis..., end of each axis...), as ONNX has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.op import ForeignNode
from cnnc.ir.types import Dim, Size, TensorType, upper_bound

MAX_SPATIAL = 3
"""Windows slide over one to three axes."""


@dataclass(frozen=True)
class Window:
    """Where windows lie: window o reads the input at o * stride - pad_begin + k * dilation, k < kernel."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.stride)

    @property
    def begin(self) -> tuple[int, ...]:
        """Padding before each axis."""
        return self.pad[: self.rank]

    @property
    def end(self) -> tuple[int, ...]:
        """Padding after each axis."""
        return self.pad[self.rank :]

    @property
    def reach(self) -> tuple[int, ...]:
        """The extent of the dilated kernel."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    def check(self, name: str, x: TensorType) -> None:
        """Raise `ShapeError` for windows that make no sense on this input, naming the operator."""
        if not 1 <= self.rank <= MAX_SPATIAL:
            raise ShapeError(f"{name}: stride {self.stride} is for {self.rank} spatial axes; 1 to 3 are possible")
        if x.rank != self.rank + 2:
            raise ShapeError(
                f"{name}: stride {self.stride} needs an input of rank {self.rank + 2} (N, C, ...), not {x}"
            )
        for what, values, count, least in (
            ("kernel", self.kernel, self.rank, 1),
            ("stride", self.stride, self.rank, 1),
            ("dilation", self.dilation, self.rank, 1),
            ("pad", self.pad, 2 * self.rank, 0),
        ):
            if len(values) != count:
                raise ShapeError(f"{name}: {what} {values} needs {count} entries for {self.rank} spatial axes")
            if min(values) < least:
                raise ShapeError(f"{name}: {what} {values} has an entry below {least}")

    def output(self, name: str, spatial: Sequence[Size], ceil_mode: bool = False) -> tuple[Size, ...]:
        """Give the number of windows along each axis.

        floor((size + pads - reach) / stride) + 1; with `ceil_mode` the last window may hang over the end, but
        must start inside the input or the padding before it.  Raises `ShapeError` where the window is larger
        than the padded input.
        """
        result = []
        for axis, size in enumerate(spatial):
            begin, end, reach, stride = self.begin[axis], self.end[axis], self.reach[axis], self.stride[axis]
            if upper_bound(size) + begin + end < reach:
                raise ShapeError(
                    f"{name}: the window of {reach} (kernel {self.kernel[axis]}, dilation {self.dilation[axis]})"
                    f" is larger than spatial axis {axis} of {size} padded by {begin}+{end}"
                )
            if not ceil_mode or stride == 1:
                result.append((size + (begin + end - reach)) // stride + 1)
                continue
            if isinstance(size, Dim):
                raise ShapeError(f"{name}: ceil_mode with stride {stride} needs a fixed size, not {size}")
            count = -(-(size + begin + end - reach) // stride) + 1
            result.append(count - 1 if (count - 1) * stride >= size + begin else count)
        return tuple(result)

    def check_no_empty(self, name: str, spatial: Sequence[Size]) -> None:
        """Raise `ShapeError` if a window could hold nothing but padding, whose maximum or mean does not exist."""
        for axis, size in enumerate(spatial):
            begin, end, reach = self.begin[axis], self.end[axis], self.reach[axis]
            if max(begin, end) >= reach:
                raise ShapeError(
                    f"{name}: padding {begin}+{end} of spatial axis {axis} must be below the window, {reach}"
                )
            if begin and isinstance(size, int) and self.dilation[axis] > size:
                raise ShapeError(
                    f"{name}: dilation {self.dilation[axis]} steps over the whole spatial axis {axis} of {size}"
                )

    def position(self, index: Sequence[Any], tap: Sequence[Any]) -> tuple[Any, ...]:
        """Write where tap `tap` of window `index` lies in the input (may be outside)."""
        return tuple(
            i * s + k * d - b for i, k, s, d, b in zip(index, tap, self.stride, self.dilation, self.begin, strict=True)
        )

    def in_bounds(self, position: Sequence[Any], spatial: Sequence[int], output: Sequence[int]) -> list[Any]:
        """Write the conditions that a position is inside the input, leaving out those that always hold."""
        conditions = []
        for axis, (where, size, count) in enumerate(zip(position, spatial, output, strict=True)):
            if self.begin[axis]:
                conditions.append(where >= 0)
            if (count - 1) * self.stride[axis] - self.begin[axis] + self.reach[axis] > size:
                conditions.append(where < size)
        return conditions

    def seen_by(
        self, te: Any, position: Sequence[Any], tap: Sequence[Any], count: Sequence[int]
    ) -> tuple[list[Any], list[Any]]:
        """Write which window, of `count` along each axis, sees a position by a tap, and when there is one."""
        windows, conditions = [], []
        for index, k, s, d, b, n in zip(position, tap, self.stride, self.dilation, self.begin, count, strict=True):
            where = index + b - k * d
            conditions += [where >= 0, where < (n - 1) * s + 1]
            if s > 1:
                conditions.append(te.equal(te.floormod(where, s), 0))
            windows.append(te.floordiv(where, s) if s > 1 else where)
        return windows, conditions

    def taps(self) -> list[tuple[int, ...]]:
        """List the taps of the kernel in row-major order."""
        return [tuple(int(i) for i in tap) for tap in np.ndindex(*self.kernel)]

    def padded(self, x: np.ndarray, output: Sequence[int], value: float | int) -> np.ndarray:
        """Pad an input so that every tap of every window lies inside (`ceil_mode` windows hang over)."""
        widths = [(0, 0), (0, 0)]
        for axis, count in enumerate(output):
            last = (count - 1) * self.stride[axis] + self.reach[axis]
            begin = self.begin[axis]
            widths.append((begin, max(last - begin - x.shape[axis + 2], 0)))
        return np.pad(x, widths, constant_values=value) if any(map(any, widths)) else x

    def tap_view(self, padded: np.ndarray, tap: Sequence[int], output: Sequence[int]) -> np.ndarray:
        """Give what one tap reads for all windows, as a view of the padded input."""
        slices = [
            slice(k * d, k * d + (count - 1) * s + 1, s) if count else slice(0, 0)
            for k, d, s, count in zip(tap, self.dilation, self.stride, output, strict=True)
        ]
        return padded[(slice(None), slice(None), *slices)]


def read_window(node: ForeignNode, spatial: Sequence[Size], kernel: Sequence[int]) -> Window:
    """Read strides, dilations, pads and auto_pad of an ONNX node; raises the node's own errors."""
    rank = len(spatial)
    if len(kernel) != rank:
        raise node.invalid(f"kernel_shape {tuple(kernel)} is not for {rank} spatial axes")
    stride = spatial_attr(node, "strides", rank, 1)
    dilation = spatial_attr(node, "dilations", rank, 1)
    window = Window(tuple(kernel), stride, (0,) * (2 * rank), dilation)
    pad = spatial_attr(node, "pads", 2 * rank, 0)
    mode = node.attr("auto_pad", "NOTSET") or "NOTSET"
    if mode == "NOTSET":
        return Window(window.kernel, stride, pad, dilation)
    automatic = _auto_pad(node, mode, spatial, window)
    if any(pad) and pad != automatic:
        raise node.invalid(f"pads {pad} contradict auto_pad {mode}, which gives {automatic}")
    return Window(window.kernel, stride, automatic, dilation)


def spatial_attr(node: ForeignNode, name: str, count: int, default: int) -> tuple[int, ...]:
    """Read a list attribute that has `count` entries, or all `default` where it is absent or empty."""
    values = tuple(node.attr(name, ())) or (default,) * count
    if len(values) != count:
        raise node.invalid(f"{name} {values} must have {count} entries")
    return values


def _auto_pad(node: ForeignNode, mode: str, spatial: Sequence[Size], window: Window) -> tuple[int, ...]:
    """Give the pads by which the output has ceil(size / stride) entries (SAME), or none (VALID)."""
    if mode == "VALID":
        return window.pad
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise node.invalid(f"auto_pad {mode!r} is none of NOTSET, SAME_UPPER, SAME_LOWER, VALID")
    totals = []
    for size, reach, stride in zip(spatial, window.reach, window.stride, strict=True):
        if stride < 1:
            raise node.invalid(f"strides {window.stride} has an entry below 1")
        if stride == 1:
            totals.append(max(reach - 1, 0))
        elif isinstance(size, int):
            needed = (-(-size // stride) - 1) * stride + reach - size
            if needed < -1:
                # ONNX Runtime crops here or fails, depending on the operator; TensorFlow does not crop.
                raise node.unsupported(f"auto_pad {mode} with stride {stride} so far above the window {reach}")
            totals.append(max(needed, 0))
        else:
            raise node.unsupported(f"auto_pad {mode} with stride {stride} over size {size}, known only at run time")
    return split_padding(totals, more_at_end=mode == "SAME_UPPER")


def split_padding(totals: Sequence[int], more_at_end: bool) -> tuple[int, ...]:
    """Share padding between both ends; of an odd amount the larger part goes to the end, or to the beginning."""
    small = [total // 2 for total in totals]
    large = [total - total // 2 for total in totals]
    return (*small, *large) if more_at_end else (*large, *small)
