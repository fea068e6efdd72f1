"""What kernels are known by: searches are remembered for the machine they were made for."""

from __future__ import annotations

from pathlib import Path

from cnnc.backends.cache import DiskCache, ScheduleCache
from cnnc.backends.lower.identity import ScheduleMemory
from cnnc.ir.types import TensorType
from cnnc.ops import Relu
from cnnc.ops.fused import Schedule
from cnnc.target import Target
from tests.backends.running import fused_op


def test_a_search_is_remembered_for_its_number_of_threads(tmp_path: Path):
    memory = ScheduleMemory(ScheduleCache(DiskCache(tmp_path)))
    kernel, target = fused_op(Relu(), [TensorType((2, 3))]), Target.parse("cpu:x86-64-v3")
    memory.remember(kernel, target, Schedule("one"))
    assert memory.recall(kernel, target) == Schedule("one")
    assert memory.recall(kernel, target.with_threads(2)) is None
    memory.remember(kernel, target.with_threads(2), Schedule("two"))
    assert memory.recall(kernel, target) == Schedule("one")


def test_the_digest_covers_whatever_decides_on_machine_code() -> None:
    from cnnc.backends.lower.identity import _sources

    ends = {"/".join(path.parts[-2:]) for path in _sources()}
    assert {"cpu/conv_loops.py", "host/driver.py", "ops/conv.py", "ir/layout.py", "cnnc/target.py"} <= ends
