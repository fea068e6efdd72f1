"""Running compiled models in this process, from a shared library and from memory."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnc.backends.host.jit import JitModel
from cnnc.backends.host.library import LoadedModel, SharedModel, aligned_empty
from cnnc.backends.host.link import build_shared
from cnnc.backends.host.program import KernelCall, Port, Program, Slot
from cnnc.errors import CheckFailed, EnvironmentProblem, ModelError, UsageError, VerifyError


@pytest.fixture(scope="module", params=["shared", "jit"])
def load(request: pytest.FixtureRequest, kernels: bytes, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from programs to loaded models."""

    def shared(program: Program) -> LoadedModel:
        path = tmp_path_factory.mktemp("so") / "model.so"
        build_shared(program, [kernels], path)
        return SharedModel(path)

    def jit(program: Program) -> LoadedModel:
        return JitModel(program, [kernels])

    return shared if request.param == "shared" else jit


@pytest.fixture(scope="module")
def model(load: Any, small: Any) -> LoadedModel:
    loaded: LoadedModel = load(small.program)
    return loaded


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 13])
def test_numbers_are_right_for_every_number_of_threads(model: LoadedModel, small: Any, threads: int) -> None:
    with model.create(threads) as context:
        assert context.threads == threads
        for seed in range(3):
            x = small.inputs(seed)
            y, best = context.run([x])
            wanted, wanted_best = small.expected(x)
            np.testing.assert_allclose(y, wanted, rtol=1e-5)
            np.testing.assert_array_equal(best, wanted_best)


def test_description_survives_the_binary(model: LoadedModel, small: Any) -> None:
    program = small.program
    assert (model.name, model.prefix, model.cpu, model.meta) == ("small", "small", program.cpu, program.meta)
    assert model.features == program.features
    assert (model.inputs, model.outputs) == (program.inputs, program.outputs)
    assert (model.arena_bytes, model.scratch_bytes, model.weight_bytes) == (960, 224, 2640)
    for info, call in zip(model.kernels, program.calls, strict=True):
        assert (info.symbol, info.layers, info.slices) == (call.symbol, call.layers, call.slices)
        assert (info.flops, info.bytes, info.algorithm, info.schedule) == (
            call.flops,
            call.bytes,
            call.algorithm,
            call.schedule,
        )


def test_outputs_are_fresh_and_aligned(model: LoadedModel, small: Any) -> None:
    with model.create() as context:
        first = context.run([small.inputs(1)])
        second = context.run([small.inputs(2)])
    assert all(array.ctypes.data % 64 == 0 for array in (*first, *second))
    np.testing.assert_allclose(first[0], small.expected(small.inputs(1))[0], rtol=1e-5)


def test_eight_threads_with_a_context_each_are_bit_equal(model: LoadedModel, small: Any) -> None:
    inputs = [small.inputs(seed) for seed in range(8)]
    with model.create() as context:
        wanted = [context.run([x])[0].tobytes() for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        with model.create(1 + index % 3) as own:
            for turn in range(100):
                which = (index + turn) % 8
                if own.run([inputs[which]])[0].tobytes() != wanted[which]:
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_context_in_two_threads_is_an_error_not_corruption(load: Any) -> None:
    program = Program("slow", (), (Port("y", "f32", (1,)),), (KernelCall("spin", (Slot("output", 0),)),), 0, 0, b"")
    context = load(program).create()
    right: list[float] = []
    refused: list[str] = []
    together = threading.Barrier(4)

    def work() -> None:
        together.wait()
        try:
            right.append(float(context.run([])[0][0]))
        except UsageError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) + len(refused) == 4
    assert refused
    assert all("in use by another thread" in text for text in refused)
    np.testing.assert_allclose(right, np.exp(4.0), rtol=1e-3)


@pytest.mark.parametrize("offset", range(1, 64))
def test_misaligned_input_and_output_pointers(model: LoadedModel, small: Any, offset: int) -> None:
    x = small.inputs(offset)
    raw = aligned_empty((12 * 32 * 4 + 64,), "u8")
    out = aligned_empty((12 * 20 * 4 + 64,), "u8")
    out[:] = 0xAB
    raw[offset : offset + x.nbytes] = x.view(np.uint8).reshape(-1)
    best = aligned_empty((12,), "i32")
    context = model.create(2)
    code = run_raw(context, [raw.ctypes.data + offset], [out.ctypes.data + offset, best.ctypes.data])
    assert code == 0
    y = np.frombuffer(out[offset : offset + 960].tobytes(), np.float32).reshape(12, 20)
    np.testing.assert_allclose(y, small.expected(x)[0], rtol=1e-5)
    assert set(out[:offset]) | set(out[offset + 960 :]) == {0xAB}


def run_raw(context: Any, inputs: list[int], outputs: list[int]) -> int:
    """Call the C function with these addresses."""
    import ctypes

    ins = (ctypes.c_void_p * len(inputs))(*inputs)
    outs = (ctypes.c_void_p * len(outputs))(*outputs)
    return int(context.model.table.run_batch(context._handle, 0, ins, outs))


def test_null_pointers_are_refused_and_outputs_untouched(model: LoadedModel) -> None:
    x, y, best = aligned_empty((12, 32), "f32"), aligned_empty((12, 20), "f32"), aligned_empty((12,), "i32")
    x[:] = 0
    y[:] = 7
    table = model.table
    context = model.create()
    good = [y.ctypes.data, best.ctypes.data]
    assert table.create(1, None) == 201
    assert table.run_batch(None, 0, None, None) == 201
    assert table.run_batch(context._handle, 0, None, None) == 201
    assert run_raw(context, [0], good) == 201
    assert run_raw(context, [x.ctypes.data], [y.ctypes.data, 0]) == 201
    assert (y == 7).all()
    assert run_raw(context, [x.ctypes.data], good) == 0


@pytest.mark.parametrize("threads", [-1, 1025, 2**31 - 1])
def test_impossible_numbers_of_threads(model: LoadedModel, threads: int) -> None:
    with pytest.raises(UsageError, match="number of threads must be 1 to 1024"):
        model.create(threads)


def test_zero_threads_means_all_the_process_may_use(model: LoadedModel) -> None:
    assert model.create(0).threads == len(os.sched_getaffinity(0))


def test_destroyed_and_foreign_contexts_are_refused(model: LoadedModel, small: Any) -> None:
    context = model.create(2)
    context.close()
    context.close()
    with pytest.raises(UsageError, match="not a live context"):
        context.run([small.inputs(0)])
    assert model.table.destroy(context._handle) == 203
    assert model.table.destroy(None) == 0
    assert model.table.destroy(0x1234) == 203
    assert context.threads == 0
    with pytest.raises(UsageError, match="not a live context"):
        context.profile(True)


def test_output_may_overlap_an_input(model: LoadedModel, small: Any) -> None:
    x = small.inputs(5)
    for shift in (0, 64, 640, 3):
        memory = aligned_empty((4096,), "u8")
        memory[: x.nbytes] = x.view(np.uint8).reshape(-1)
        best = aligned_empty((12,), "i32")
        base = memory.ctypes.data
        assert run_raw(model.create(2), [base], [base + shift, best.ctypes.data]) == 0
        y = np.frombuffer(memory[shift : shift + 960].tobytes(), np.float32).reshape(12, 20)
        np.testing.assert_allclose(y, small.expected(x)[0], rtol=1e-5)


def test_overlapping_outputs_are_refused(model: LoadedModel) -> None:
    memory = aligned_empty((4096,), "u8")
    memory[:] = 1
    base = memory.ctypes.data
    assert run_raw(model.create(), [base], [base + 2048, base + 2048 + 959]) == 205
    assert (memory == 1).all()
    assert run_raw(model.create(), [base], [base + 2048, base + 2048 + 960]) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "takes 1 inputs, got 0"),
        ([np.zeros((12, 32))], r"is f32\[12, 32\], got float64\[12, 32\]"),
        ([np.zeros((32, 12), np.float32)], r"got float32\[32, 12\]"),
        ([np.zeros((12, 32), np.float32)] * 2, "got 2"),
    ],
)
def test_wrong_inputs(model: LoadedModel, given: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.create().run(given)


def test_strided_and_read_only_inputs(model: LoadedModel, small: Any) -> None:
    x = small.inputs(3)
    wide = np.zeros((12, 64), np.float32)
    wide[:, ::2] = x
    fixed = x.copy()
    fixed.flags.writeable = False
    context = model.create(2)
    for given in (wide[:, ::2], fixed, np.asfortranarray(x)):
        np.testing.assert_allclose(context.run([given])[0], small.expected(x)[0], rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_a_kernel_that_fails_stops_the_run_and_the_context_stays_usable(load: Any, threads: int) -> None:
    later = KernelCall("halve", (Slot("output", 0), Slot("output", 1)), 16)
    call = KernelCall("gather", (Slot("input", 0), Slot("input", 1), Slot("output", 0)), 16)
    program = Program(
        "picker",
        (Port("x", "f32", (8,)), Port("index", "i32", (16,))),
        (Port("y", "f32", (16,)), Port("half", "f32", (16,))),
        (call, call, later, call),
        0,
        0,
        b"",
    )
    context = load(program).create(threads)
    x = np.arange(8, dtype=np.float32)
    good = np.random.default_rng(threads).integers(0, 8, 16).astype(np.int32)
    for place in range(16):
        for bad, error, message in ((8, ModelError, "out of range"), (-1, VerifyError, "bug of cnnc")):
            index = good.copy()
            index[place] = bad
            with pytest.raises(error, match=message):
                context.run([x, index])
            y, half = context.run([x, good])
            np.testing.assert_array_equal(y, x[good])
            np.testing.assert_array_equal(half, x[good] / 2)


def test_denormals_and_what_is_no_number_are_kept(load: Any) -> None:
    program = Program(
        "half",
        (Port("x", "f32", (4,)),),
        (Port("y", "f32", (4,)),),
        (KernelCall("halve", (Slot("input", 0), Slot("output", 0)), 4),),
        0,
        0,
        b"",
    )
    x = np.array([1e-40, 2e-38, np.nan, -np.inf], np.float32)
    wanted = x * np.float32(0.5)
    assert wanted[0] != 0
    for threads in (1, 4):
        np.testing.assert_array_equal(load(program).create(threads).run([x])[0], wanted)


def test_profile_counts_and_times(model: LoadedModel, small: Any) -> None:
    context = model.create(2)
    context.run([small.inputs(0)])
    assert [time.calls for time in context.kernel_times()] == [0, 0, 0]
    context.profile(True)
    for _ in range(5):
        context.run([small.inputs(0)])
    times = context.kernel_times()
    assert [time.calls for time in times] == [5, 5, 5]
    assert all(0 < time.ns < 10**9 for time in times)
    context.profile(False)
    context.run([small.inputs(0)])
    assert context.kernel_times() == times
    context.profile(True)
    assert [time.calls for time in context.kernel_times()] == [0, 0, 0]


def test_profile_time_is_the_time(load: Any) -> None:
    import time

    call = KernelCall("spin", (Slot("output", 0),))
    quick = KernelCall("nothing", (Slot("arena", 0),))
    program = Program("slow", (), (Port("y", "f32", (1,)),), (quick, call), 64, 0, b"")
    context = load(program).create()
    context.profile(True)
    start = time.perf_counter_ns()
    context.run([])
    wall = time.perf_counter_ns() - start
    nothing, spin = context.kernel_times()
    assert 0.5 * wall < spin.ns <= wall
    assert nothing.ns < 0.1 * spin.ns


def test_a_forked_child_computes_the_same(model: LoadedModel, small: Any) -> None:
    context = model.create(3)
    x = small.inputs(9)
    wanted = context.run([x])[0].tobytes()
    child = os.fork()
    if child == 0:
        same = context.run([x])[0].tobytes() == wanted
        context.close()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert context.run([x])[0].tobytes() == wanted


def test_empty_tensors_and_models_without_kernels(load: Any) -> None:
    ports = (Port("a", "f32", (0, 3)), Port("b", "f64", ()))
    program = Program("empty", ports, (Port("c", "i64", (2, 0)),), (), 0, 0, b"")
    for threads in (1, 2):
        (c,) = load(program).create(threads).run([np.zeros((0, 3), np.float32), np.float64(1)])
        assert (c.shape, c.dtype) == ((2, 0), np.int64)


def test_hostile_names_are_data(load: Any) -> None:
    names = ['"*/ #include <x>', "; rm -rf /", "../../x", "int main", "ä\n\\", "nul\0here", "%s%n", "x" * 5000]
    program = Program(
        "*/ int main(){}",
        tuple(Port(name, "f32", (1,)) for name in names),
        (),
        (KernelCall("nothing", (Slot("arena", 0),), layers=tuple(names)),),
        64,
        0,
        b"",
        meta='{"a": "\\u0000 \\" */"}',
    )
    model = load(program)
    shown = [name.replace("\0", "\\0") for name in names]
    assert [port.name for port in model.inputs] == shown
    assert list(model.kernels[0].layers) == shown
    assert (model.name, model.prefix, model.meta) == (program.name, "model_int_main", program.meta)


def test_more_than_the_largest_number_of_contexts(load: Any) -> None:
    model = load(Program("many", (), (), (KernelCall("nothing", (Slot("arena", 0),)),), 64, 0, b""))
    import ctypes

    handles = []
    for _ in range(1024):
        handle = ctypes.c_void_p()
        assert model.table.create(1, ctypes.byref(handle)) == 0
        handles.append(handle)
    handle = ctypes.c_void_p(1)
    assert model.table.create(1, ctypes.byref(handle)) == 501
    assert handle.value is None
    assert all(model.table.run_batch(each, 0, None, None) == 0 for each in handles)
    assert all(model.table.destroy(each) == 0 for each in handles)
    assert model.table.create(1, ctypes.byref(handle)) == 0
    assert model.table.destroy(handle) == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_contexts_come_and_go_without_a_leak(model: LoadedModel, small: Any) -> None:
    def turns(count: int) -> None:
        for _ in range(count):
            context = model.create(2)
            context.run([small.inputs(0)])
            context.close()

    turns(50)
    before = resident_bytes()
    turns(500)
    assert resident_bytes() - before < 2 << 20


def test_libraries_come_and_go_without_a_leak(small: Any, kernels: bytes, tmp_path: Path) -> None:
    path = tmp_path / "small.so"
    build_shared(small.program, [kernels], path)

    def turns(count: int) -> None:
        for _ in range(count):
            SharedModel(path).create(2).run([small.inputs(0)])
        gc.collect()

    turns(50)
    before = resident_bytes()
    turns(1000)
    assert resident_bytes() - before < 4 << 20
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_context_keeps_its_model_alive(small: Any, kernels: bytes, load: Any) -> None:
    context = load(small.program).create(2)
    gc.collect()
    np.testing.assert_allclose(context.run([small.inputs(4)])[0], small.expected(small.inputs(4))[0], rtol=1e-5)


def test_a_rebuilt_library_is_seen_while_the_old_one_is_loaded(make_small: Any, kernels: bytes, tmp_path: Path) -> None:
    path = tmp_path / "same.so"
    models = []
    for seed in (1, 2):
        build_shared(make_small(seed).program, [kernels], path)
        models.append(SharedModel(path))
    x = make_small().inputs(0)
    for seed, model in zip((1, 2), models, strict=True):
        np.testing.assert_allclose(model.create().run([x])[0], make_small(seed).expected(x)[0], rtol=1e-5)


def test_changed_cut_and_foreign_files_are_refused(small: Any, kernels: bytes, tmp_path: Path) -> None:
    path = tmp_path / "small.so"
    build_shared(small.program, [kernels], path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in [0, len(good) - 1, len(good) - 40, *rng.integers(0, len(good), 60)]:
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with pytest.raises(CheckFailed, match=r"small\.so: .*build it again"):
            SharedModel(path)
    for length in (0, 10, 64, 1000, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(CheckFailed, match="cut"):
            SharedModel(path)
    path.write_bytes(b"\0" * 4096)
    with pytest.raises(CheckFailed, match="cannot be loaded"):
        SharedModel(path, check=False)
    with pytest.raises(EnvironmentProblem, match="No such file"):
        SharedModel(tmp_path / "none.so")
    with pytest.raises(CheckFailed):
        SharedModel(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckFailed):
        SharedModel(tmp_path / "fifo")


def test_loading_and_running_a_binary_imports_no_compiler(kernels: bytes, small: Any, tmp_path: Path) -> None:
    build_shared(small.program, [kernels], tmp_path / "small.so")
    code = """
import sys
import numpy as np
import cnnc

module = cnnc.load(sys.argv[1], threads=2)
y, best = module(np.full((12, 32), 0.25, np.float32))
assert (y.argmax(axis=1) == best).all()
heavy = ("cnnc.driver", "cnnc.frontends", "cnnc.ir", "cnnc.ops", "cnnc.passes", "llvmlite", "onnx", "tvm")
print([name for name in heavy if name in sys.modules])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "small.so")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_weights_are_mapped_and_not_copied(kernels: bytes, tmp_path: Path) -> None:
    slices = 35000
    weights = np.random.default_rng(0).standard_normal((12 * slices, 20), np.float32)
    call = KernelCall("argmax", (Slot("weights", 0), Slot("output", 0)), slices)
    output = Port("best", "i32", (12 * slices,))
    build_shared(Program("large", (), (output,), (call,), 0, 0, (weights.tobytes(),)), [kernels], tmp_path / "large.so")
    before = resident()
    context = SharedModel(tmp_path / "large.so").create()
    # Linux 5.14 and later map them with the first context, others in the first run.
    created = resident()
    assert _linux() < (5, 14) or created["RssFile"] - before["RssFile"] > 0.9 * weights.nbytes
    (best,) = context.run([])
    after = resident()
    np.testing.assert_array_equal(best, weights.argmax(axis=1))
    # The kernel counts pages in batches.
    assert after["RssFile"] - before["RssFile"] > 0.9 * weights.nbytes
    assert after["RssAnon"] - before["RssAnon"] < weights.nbytes / 2


def _linux() -> tuple[int, ...]:
    return tuple(map(int, platform.release().partition("-")[0].split(".")[:2]))


def resident() -> dict[str, int]:
    """Give the bytes of memory this process has of its own (RssAnon) and maps from files (RssFile)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0].startswith("Rss")}
