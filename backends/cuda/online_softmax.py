"""Softmax of scores that come a tile of keys at a time, in the registers where tensor cores leave sums.

    largest' = max(largest, max over n of scores)            for each tile of keys, one after the other
    total'   = exp(largest - largest') * total + sum over n of exp(scores - largest')
    sums'    = exp(largest - largest') * sums                to which the caller adds shares times values

Four neighbouring lanes have the numbers of a row, and a lane those of two rows of each fragment.  Totals are a lane's
own until the end.  Milakov and Gimelshein, 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.exponential import rough_exp_of_difference
from cnnc.backends.cuda.launches import barrier, reduce_lanes
from cnnc.backends.cuda.machine import LANES
from cnnc.backends.cuda.mma_params import MMA_COLUMNS, MMA_ROWS
from cnnc.backends.cuda.mma_ring import HALF_ROWS
from cnnc.backends.lower import loops

__all__ = ["LEAST", "OnlineSoftmax"]

LEAST = -3.4028234663852886e38
"""The least finite number."""

_QUAD = 4
"""Lanes that have a row."""


class OnlineSoftmax:
    """What a thread of a warp knows of its rows: `high` fragments, `columns` of scores and `wide` of sums side by side.

    Shares are exponentials of differences of scores times `scale`, which is above 0.
    """

    def __init__(self, fragments: tuple[int, int, int], scale: float, lane: Any) -> None:
        self.high, self.columns, self.wide = fragments
        self.scale, self.lane = scale, lane
        self.scores = loops.buffer("scores", (4 * self.high * self.columns,), scope="local")
        self.sums = loops.buffer("sums", (4 * self.high * self.wide,), scope="local")
        self.largest = loops.buffer("largest", (2 * self.high,), scope="local")
        self.total = loops.buffer("total", (2 * self.high,), scope="local")
        # Of the row at hand: the new maximum, what shares are relative to, and a factor.
        self.state = loops.buffer("state", (3,), scope="local")

    def start(self) -> Any:
        """Allocate, and begin without a key."""
        zero, lowest = tirx.const(0.0, "float32"), tirx.const(float("-inf"), "float32")

        def row(i: Any, half: Any) -> Any:
            r = i * 2 + half
            return loops.sequence(
                loops.store(self.largest, lowest, r),
                loops.store(self.total, zero, r),
                self._along((i, half), self.wide, lambda at, _: loops.store(self.sums, zero, at)),
            )

        buffers = self.scores, self.sums, self.largest, self.total, self.state
        return loops.sequence(*map(loops.alloc, buffers), self._each_row(row))

    def each_score(self, statement: Callable[[Any, Any, Any], Any]) -> Any:
        """Run `statement(register, row, column)` for each score, by its place in the warp's."""

        def along(i: Any, half: Any) -> Any:
            row = i * MMA_ROWS + half * HALF_ROWS + self.lane // _QUAD
            return self._along((i, half), self.columns, lambda at, column: statement(at, row, column))

        return self._each_row(along)

    def take_shares(self) -> Any:
        """Turn scores into shares, and scale what was added up before to the new maximum."""

        def row(i: Any, half: Any) -> Any:
            r, state = i * 2 + half, self.state

            def compare(at: Any, _: Any) -> Any:
                return loops.store(state, _larger(loops.load(state, 0), loops.load(self.scores, at)), 0)

            def share(at: Any, _: Any) -> Any:
                number = loops.load(self.scores, at)
                return loops.sequence(
                    loops.store(self.scores, self._power(number), at),
                    loops.store(self.total, loops.load(self.total, r) + number, r),
                )

            return loops.sequence(
                loops.store(state, loops.load(self.largest, r), 0),
                self._along((i, half), self.columns, compare),
                reduce_lanes(state, 0, _larger, _QUAD),
                self._raise_largest(i, half),
                self._along((i, half), self.columns, share),
            )

        return self._each_row(row)

    def add_up(self, high: int, across: int, warp: Any, then: Any) -> Any:
        """Hand what `across` neighbouring warps have of the same rows to the first, which goes on with it.

        Shared memory is to be free, and totals are to be of whole rows.
        """
        count = 4 * self.high * (self.wide + 1)
        parts = loops.buffer("parts", (across - 1, high, count, LANES), scope="shared.dyn")
        part, group, state = warp % across, warp // across, self.state
        totals_at, sums_at = 2 * self.high, 4 * self.high

        def give(source: Any, start: int) -> Any:
            return loops.unrolled(
                int(source.shape[0]),
                lambda n: loops.store(parts, loops.load(source, n), part - 1, group, start + n, self.lane),
                "n",
            )

        def take(other: Any, i: Any, half: Any) -> Any:
            r = i * 2 + half

            def given(place: Any) -> Any:
                return loops.load(parts, other, group, place, self.lane)

            def add(buffer: Any, at: Any, start: int) -> Any:
                return loops.store(buffer, loops.load(buffer, at) + given(start + at) * loops.load(state, 2), at)

            return loops.sequence(
                loops.store(state, _larger(loops.load(self.largest, r), given(r)), 0),
                self._raise_largest(i, half),
                loops.store(state, self._power(given(r)), 2),
                add(self.total, r, totals_at),
                self._along((i, half), self.wide, lambda at, _: add(self.sums, at, sums_at)),
            )

        given = give(self.largest, 0), give(self.total, totals_at), give(self.sums, sums_at)
        taken = loops.unrolled(across - 1, lambda other: self._each_row(lambda i, half: take(other, i, half)), "other")
        return loops.sequence(
            loops.alloc(parts),
            loops.when(part > 0, loops.sequence(*given)),
            barrier(),
            loops.when(part == 0, loops.sequence(taken, then)),
        )

    def whole_totals(self) -> Any:
        """Give all lanes of a row its total."""
        return self._each_row(lambda i, half: reduce_lanes(self.total, i * 2 + half, lambda a, b: a + b, _QUAD))

    def divide(self) -> Any:
        """Turn sums into means."""

        def row(i: Any, half: Any) -> Any:
            inverse = tirx.const(1.0, "float32") / loops.load(self.total, i * 2 + half)
            return loops.sequence(loops.store(self.state, inverse, 2), self._scale_sums(i, half))

        return self._each_row(row)

    def _each_row(self, statement: Callable[[Any, Any], Any]) -> Any:
        """Run `statement(fragment, half)` for each row."""
        return loops.unrolled(self.high, lambda i: loops.unrolled(2, lambda half: statement(i, half), "half"), "i")

    def _along(self, row: tuple[Any, Any], wide: int, statement: Callable[[Any, Any], Any]) -> Any:
        """Run `statement(register, column)` for each number of a row in `wide` fragments."""
        i, half = row

        def one(j: Any, which: Any) -> Any:
            return statement((i * wide + j) * 4 + half * 2 + which, j * MMA_COLUMNS + self.lane % _QUAD * 2 + which)

        return loops.unrolled(wide, lambda j: loops.unrolled(2, lambda which: one(j, which), "which"), "j")

    def _raise_largest(self, i: Any, half: Any) -> Any:
        """Scale what was added up before to the new maximum in state[0]; state[1] is then what shares are relative to.

        Where all scores so far are -inf, that is the least finite number, so that their shares are 0, and no NaN.
        """
        r, state, new = i * 2 + half, self.state, loops.load(self.state, 0)
        return loops.sequence(
            loops.store(state, _larger(tirx.const(LEAST, "float32"), new), 1),
            loops.store(state, self._power(loops.load(self.largest, r)), 2),
            loops.store(self.largest, new, r),
            loops.store(self.total, loops.load(self.total, r) * loops.load(state, 2), r),
            self._scale_sums(i, half),
        )

    def _scale_sums(self, i: Any, half: Any) -> Any:
        """Multiply the sums of a row by state[2]."""

        def scale(at: Any, _: Any) -> Any:
            return loops.store(self.sums, loops.load(self.sums, at) * loops.load(self.state, 2), at)

        return self._along((i, half), self.wide, scale)

    def _power(self, score: Any) -> Any:
        """Give the exponential of a score less what shares are relative to."""
        return rough_exp_of_difference(score - loops.load(self.state, 1), self.scale)


def _larger(a: Any, b: Any) -> Any:
    """Give the larger one in one instruction, the other where one is NaN, which the exponentials do not lose."""
    return tirx.call_pure_extern("float32", "fmaxf", a, b)
