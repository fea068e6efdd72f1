"""Time candidates for one kernel as the kernel runs inside its network.

All candidates of a round stand in one small program, run by the same C runtime, with the same threads and slices, and
timed by its clocks.  What is in the caches decides the time of many kernels, so before each candidate

    poison    fills the output with NaN, so that no candidate passes with the numbers of another
    traffic   reads as many bytes as the network touches between two runs of the kernel (at most a few times the
              last cache): weights are as far away as in the network, and nothing is left of the last candidate
    produce   writes the activations, in the order the network does, slice by slice on all threads: what the kernel
              before has just written is as near as in the network

run as kernels of their own.  Timed so, the schedules a network uses take what `cnnc profile` shows for them in the
network; without the traffic, late layers take a quarter less.  Candidates take turns, A B C A B C, since the speed of a
shared machine drifts, and what counts is the least time of each: what other processes take away, a time slice at once
where they want all cores, is longer than most kernels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from cnnc.backends.cpu.codegen import KernelJob, KernelObject, compile_kernel, compile_kernels
from cnnc.backends.cpu.templates import template
from cnnc.backends.host.jit import JitModel
from cnnc.backends.host.library import aligned_empty
from cnnc.backends.host.program import ALIGNMENT, KernelCall, Port, Program, Slot, Space
from cnnc.backends.lower.identity import kernel_symbol
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.op import Op
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Neg, ReduceSum
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.source import Input
from cnnc.profiler.accuracy import relative_error
from cnnc.target import Target

TOLERANCE = 1e-5
"""Relative L2 error between two schedules of a kernel: they add up the same products in another order."""

_ROW = 1024
"""f32 in a row of the traffic."""

_ROWS = 64
"""The rows of the traffic are a multiple of this, so that the kernel that reads them divides among threads."""

_PLAIN = Schedule("generic")


@dataclass(frozen=True)
class Setting:
    """How a kernel stands in its network.

    `weights` are the positions of inputs that are constants, `order` those of activations, the one written last at the
    end; `traffic` is the bytes the network touches between two runs of the kernel.
    """

    weights: tuple[int, ...]
    order: tuple[int, ...]
    traffic: int


@dataclass(frozen=True)
class Candidate:
    """A schedule with its machine code."""

    schedule: Schedule
    code: KernelObject


Faults: TypeAlias = dict[Schedule, str]
"""What is wrong with candidates that do not compile, or whose numbers differ from the default's: bugs of cnnc."""


@dataclass(frozen=True)
class Timing:
    """The least seconds of the rounds, and their ratio to the default's."""

    candidate: Candidate
    seconds: float
    ratio: float


@dataclass(frozen=True)
class Measured:
    """The timings of the candidates that are right, the default first, and what is wrong with the others."""

    timings: Sequence[Timing]
    faults: Faults


class KernelBench:
    """Compiles and times candidates for one kernel of f32 and one output; all get the same random inputs.

    Weights may be in 16 bits, or digits of int8.
    """

    def __init__(self, kernel: Fused, target: Target, setting: Setting, seed: int) -> None:
        self._kernel = kernel
        self._target = target
        self._setting = setting
        self._types = [value.type for value in kernel.body.inputs]
        self._output = kernel.body.outputs[0].type
        rng = np.random.default_rng(seed)
        # Copies negate what they copy, for want of an operator that does nothing; random numbers do not mind.
        self._arrays = [_random(type_, position in setting.weights, rng) for position, type_ in enumerate(self._types)]
        rows = -(-max(setting.traffic, 1) // (4 * _ROW * _ROWS)) * _ROWS
        self._traffic = _filled((rows, _ROW), 1.0)
        self._reader = _plain_kernel(ReduceSum((1,)), TensorType((rows, _ROW)), target)
        sizes = {_elements(type_) for type_ in (*(self._types[p] for p in setting.order), self._output)}
        self._copiers = {size: _plain_kernel(Neg(), TensorType((size,)), target) for size in sizes}
        self._poison = _filled((_elements(self._output),), np.nan)

    def compile(self, schedules: Sequence[Schedule]) -> tuple[list[Candidate], Faults]:
        """Give the candidates, and the schedules that do not compile, each with the reason."""
        try:
            codes = compile_kernels([self._job(s) for s in schedules], self._target)
            return [Candidate(s, code) for s, code in zip(schedules, codes, strict=True)], {}
        except Exception:
            # Whatever a template or LLVM raises is about one of them; the others are as good as before.
            return self._compile_each(schedules)

    def measure(self, candidates: Sequence[Candidate], rounds: int, budget: float) -> Measured:
        """Time candidates, the first of them being the default, in interleaved rounds.

        There are at most `rounds` of them, and fewer (but 5) where they would take more than `budget` seconds.
        """
        everything = (*(c.code for c in candidates), self._reader, *self._copiers.values())
        codes = {code.symbol: code for code in everything}
        scratch = max(code.scratch_bytes for code in codes.values())
        program, timed = self._program(candidates, scratch)
        model = JitModel(program, [codes[symbol].code for symbol in sorted(codes)])
        inputs = [*(self._arrays[p] for p in self._setting.order), self._poison, self._traffic]
        with model.create(self._target.threads) as context:
            start = time.perf_counter()
            wrong = self._differences(candidates, context.run(inputs))
            affordable = int(budget / (time.perf_counter() - start))
            seconds: list[list[float]] = []
            for _ in range(min(max(affordable, 5), rounds)):
                context.profile(True)
                context.run(inputs)
                times = context.kernel_times()
                seconds.append([times[index].ns * 1e-9 for index in timed])
        least = [min(turn[i] for turn in seconds) for i in range(len(candidates))]
        timings = [
            Timing(c, t, t / least[0]) for c, t in zip(candidates, least, strict=True) if c.schedule not in wrong
        ]
        return Measured(timings, wrong)

    def _job(self, schedule: Schedule) -> KernelJob:
        kernel = replace(self._kernel, schedule=schedule)
        func = template(schedule.template).build(kernel, schedule, self._target)
        return KernelJob(func, kernel_symbol(kernel, self._target))

    def _compile_each(self, schedules: Sequence[Schedule]) -> tuple[list[Candidate], Faults]:
        good: list[Candidate] = []
        bad: Faults = {}
        for schedule in schedules:
            try:
                good.append(Candidate(schedule, compile_kernels([self._job(schedule)], self._target)[0]))
            except Exception as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                bad[schedule] = f"does not compile: {first}"
        return good, bad

    def _program(self, candidates: Sequence[Candidate], scratch: int) -> tuple[Program, list[int]]:
        """Give the program, and which of its calls are the candidates."""
        order, weights = self._setting.order, self._setting.weights
        arena, constants = _Places("arena"), _Places("weights")
        places = {p: arena.place(self._types[p].nbytes) for p in order}
        places |= {p: constants.place(self._types[p].nbytes) for p in weights}
        output, sums = arena.place(self._output.nbytes), arena.place(4 * len(self._traffic))
        poison, traffic = Slot("input", len(order)), Slot("input", len(order) + 1)
        copy_output = self._copiers[_elements(self._output)]
        calls: list[KernelCall] = []
        timed: list[int] = []
        for turn, candidate in enumerate(candidates):
            calls += [_call(copy_output, poison, output), _call(self._reader, traffic, sums)]
            for number, p in enumerate(order):
                calls.append(_call(self._copiers[_elements(self._types[p])], Slot("input", number), places[p]))
            timed.append(len(calls))
            calls.append(_call(candidate.code, *(places[p] for p in range(len(self._types))), output))
            calls.append(_call(copy_output, output, Slot("output", turn)))
        program = Program(
            name="tune",
            inputs=(
                *(Port(f"x{p}", "f32", (_elements(self._types[p]),)) for p in order),
                Port("poison", "f32", self._poison.shape),
                Port("traffic", "f32", self._traffic.shape),
            ),
            outputs=tuple(Port(f"y{turn}", "f32", self._poison.shape) for turn in range(len(candidates))),
            calls=tuple(calls),
            arena_bytes=arena.size,
            scratch_bytes=scratch,
            weights=[piece for p in weights for piece in _padded(self._arrays[p])],
            cpu=self._target.llvm_cpu,
            features=self._target.features,
        )
        return program, timed

    def _differences(self, candidates: Sequence[Candidate], results: Sequence[np.ndarray]) -> Faults:
        """Find the schedules whose output, pad lanes included, is not the default's."""
        errors = {c.schedule: relative_error(got, results[0]) for c, got in zip(candidates, results, strict=True)}
        return {s: f"gives other numbers: relative error {e:.2e}" for s, e in errors.items() if e > TOLERANCE}


class _Places:
    """Aligned places one after the other in one memory of a program."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self.size = 0

    def place(self, nbytes: int) -> Slot:
        """Give the next place."""
        slot = Slot(self._space, self.size)
        self.size += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return slot


def _call(code: KernelObject, *slots: Slot) -> KernelCall:
    scratch = (Slot("scratch", 0),) if code.scratch_bytes else ()
    return KernelCall(code.symbol, (*slots, *scratch), slices=code.slices)


@lru_cache(256)
def _plain_kernel(op: Op, type_: TensorType, target: Target) -> KernelObject:
    """Compile a kernel of one operator on one input."""
    x = call(Input("x0", type_))
    kernel = Fused(Graph("kernel", (x,), call(op, x).node.values), op.name, _PLAIN)
    func = template(_PLAIN.template).build(kernel, _PLAIN, target)
    return compile_kernel(func, kernel_symbol(kernel, target), target)


def _elements(type_: TensorType) -> int:
    """Count the elements in memory, pad lanes included."""
    return type_.nbytes // type_.dtype.itemsize


def _filled(shape: tuple[int, ...], value: float) -> np.ndarray:
    array = aligned_empty(shape, "f32")
    array.fill(value)
    return array


def _random(type_: TensorType, is_weight: bool, rng: np.random.Generator) -> np.ndarray:
    """Draw a tensor as it lies in memory; weights so that the sums they make are of the size of activations.

    Digits of fixed-point weights are any.
    """
    if type_.dtype is DType.I8:
        values = rng.integers(-128, 128, type_.static_shape, np.int8)
    else:
        values = rng.standard_normal(type_.static_shape, dtype=np.float32)
        if is_weight and values.ndim > 1:
            values *= (len(values) / values.size) ** 0.5
    packed = values if type_.layout is None else type_.layout.pack(values)
    array = aligned_empty((packed.size,), type_.dtype)
    array[:] = packed.reshape(-1)
    return array


def _padded(array: np.ndarray) -> list[memoryview]:
    """Give an array as pieces of a block of weights."""
    data = array.view(np.uint8)
    return [data.data, memoryview(bytes(-data.size % ALIGNMENT))]
