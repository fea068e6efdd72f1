"""A process that compiles kernels beside this one, seen from this one.

It imports TVM, most of what compiling a single kernel costs, while this one imports the model and runs the passes.
It only ever helps: what it does not deliver, for whatever reason, is compiled here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from base64 import b64decode
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cnnc.errors import VerifyError

if TYPE_CHECKING:
    from cnnc.backends.cpu.codegen import KernelObject
    from cnnc.ops.fused import Fused
    from cnnc.target import Target

# What is imported stays; to look through it for garbage takes a tenth of the time.
_START = "import gc; gc.disable(); from cnnc.backends.cpu import compile_worker; compile_worker.main()"
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


class CompileProcess:
    """The worker process; its temporary files, and what it prints, are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._said = folder / "stderr.txt"
        with self._said.open("wb") as log:
            self._process = subprocess.Popen(
                # -P: the working folder may hold files named like packages.
                [sys.executable, "-P", "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(folder),
                # Ctrl-C is for this process, which then ends the other.
                start_new_session=True,
            )

    def compile(self, kernels: Mapping[str, Fused], target: Target) -> Iterator[KernelObject]:
        """Yield kernels, given by symbol, as they are done; leaves out those it could not compile.

        Raises VerifyError if TVM or LLVM crashes.
        """
        from cnnc.backends.cpu.codegen import KernelObject

        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # Where it is gone, no answer comes.
        with suppress(BrokenPipeError):
            self._process.stdin.writelines(request_for(symbol, kernel, target) for symbol, kernel in kernels.items())
            self._process.stdin.flush()
        left = dict(kernels)
        while left:
            line = self._process.stdout.readline()
            if not line.endswith(b"\n"):
                self._refuse_crash(left)
                return
            answer = json.loads(line)
            del left[answer["symbol"]]
            if answer["code"] is not None:
                code = b64decode(answer["code"])
                yield KernelObject(answer["symbol"], code, answer["slices"], answer["scratch_bytes"])

    def dismiss(self) -> None:
        """End the process, whatever it is doing, and wait for nothing: to give back TVM's memory takes it a while."""
        self._process.kill()

    def close(self) -> None:
        """End the process, if it has not been dismissed, and wait until it is gone."""
        self.dismiss()
        # Leaving waits for it; requests it did not read are flushed into a broken pipe.
        with suppress(BrokenPipeError), self._process:
            pass

    def _refuse_crash(self, left: Mapping[str, Fused]) -> None:
        """Raise VerifyError if the process has crashed: compiling the same kernels here would do the same."""
        code = self._process.wait()
        if -code in _CRASHES:
            said = self._said.read_text("utf-8", "replace").strip().splitlines()
            last = f"; its last words: {said[-1]}" if said else ""
            name = signal.Signals(-code).name
            raise VerifyError(f"TVM or LLVM crashed ({name}) while it compiled one of {', '.join(left)}{last}")


@contextmanager
def compile_process(wanted: bool = True) -> Iterator[CompileProcess | None]:
    """Start the process and end it afterwards.

    Gives None where there is nothing to gain, as this process has TVM or there is no second CPU, and where it does not
    start.
    """
    if not wanted or not sys.executable or "tvm" in sys.modules or len(os.sched_getaffinity(0)) < 2:
        yield None
        return
    with ExitStack() as stack:
        process = None
        with suppress(OSError):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cnnc-", ignore_cleanup_errors=True))
            process = CompileProcess(Path(folder))
            stack.callback(process.close)
        yield process


def request_for(symbol: str, kernel: Fused, target: Target) -> bytes:
    """Describe a kernel, in one line of JSON, by what its key digests: all that its machine code depends on."""
    from cnnc.backends.lower.identity import anonymous, kernel_key
    from cnnc.ir.text import print_graph

    request = {
        "symbol": symbol,
        "key": kernel_key(kernel, target),
        "body": print_graph(anonymous(kernel.body)),
        "anchor": kernel.anchor,
        "schedule": str(kernel.schedule),
        "target": str(target),
        "threads": target.threads,
    }
    return json.dumps(request).encode() + b"\n"


def _environment(folder: Path) -> dict[str, str]:
    """Give this process's environment, with the cnnc that runs here, and none of the threads numpy would start."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    changes = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OPENBLAS_NUM_THREADS": "1",
        "TMPDIR": str(folder),
        # Kernels for CPUs need none of TVM's other back ends, whose import takes as long as the rest.
        "TVM_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    return {**os.environ, **changes}
