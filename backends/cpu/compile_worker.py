"""The process that compiles kernels for another one.

It reads kernels from stdin and answers on stdout, in the order they are done, each one line of JSON; the other end is
`compile_process.py`.  Whatever TVM prints goes to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import IO, Any

from cnnc.backends.cpu.build import kernel_job
from cnnc.backends.cpu.codegen import KernelJob, compile_kernels
from cnnc.backends.load_tvm import load_tvm
from cnnc.backends.lower.identity import kernel_key
from cnnc.errors import VerifyError
from cnnc.ir.parse import parse_graph
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target


def main() -> None:
    """Serve requests until stdin ends, and then end at once: nobody is left to answer to."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    load_tvm()
    from cnnc.backends.lower import vector_math

    vector_math.register()
    gc.freeze()
    gc.enable()
    server = _Server(answers)
    for line in sys.stdin:
        server.accept(json.loads(line))
    os._exit(0)


class _Server:
    """Makes the TIR of kernels one by one, as they come, and their machine code on all CPUs."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "codegen")

    def accept(self, request: dict[str, Any]) -> None:
        """Compile one kernel, and answer some time later."""
        symbol = request["symbol"]
        try:
            kernel, target = requested(request)
            job = kernel_job(symbol, kernel, target)
        except Exception as error:
            self._refuse(symbol, error)
            return
        self._pool.submit(self._compile, job, target)

    def _compile(self, job: KernelJob, target: Target) -> None:
        try:
            (kernel,) = compile_kernels([job], target)
        except Exception as error:
            self._refuse(job.symbol, error)
            return
        self._answer({**asdict(kernel), "code": b64encode(kernel.code).decode()})

    def _refuse(self, symbol: str, error: Exception) -> None:
        """Leave a kernel to the other process, where the same error can be raised as it should."""
        print(f"{symbol}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        self._answer({"symbol": symbol, "code": None})

    def _answer(self, answer: dict[str, Any]) -> None:
        with self._lock:
            print(json.dumps(answer), file=self._answers, flush=True)


def requested(request: dict[str, Any]) -> tuple[Fused, Target]:
    """Give the kernel that a request describes; raises VerifyError if it is not quite that one."""
    kernel = Fused(parse_graph(request["body"]), request["anchor"], Schedule.parse(request["schedule"]))
    target = Target.parse(request["target"], request["threads"])
    if kernel_key(kernel, target) != request["key"]:
        raise VerifyError("the kernel, the target or this compiler's source is not what the other process has")
    return kernel, target
