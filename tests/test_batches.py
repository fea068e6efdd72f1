"""Several batch sizes in one binary: the numbers of each, one set of weights, errors, every verb."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import cnnc
from cnnc.cli.main import run
from cnnc.driver import Options, Report, load_graph
from cnnc.errors import CheckFailed, UsageError
from cnnc.frontends.dsl import Network, Tensor, conv, flatten, linear, max_pool, network, relu
from cnnc.ir.interp import evaluate
from tests.random_onnx import random_network

SIZES = (3, 1, 8)
Run = Callable[[np.ndarray], dict[str, np.ndarray]]


@network(x=(3, 12, 12))
def small_net(x: Tensor) -> dict[str, Tensor]:
    """Convolutions for blocks, for Winograd's algorithm and with a stride, and layers whose weights are most bytes."""
    y = x >> conv(16, 3, pad=1, name="conv1") >> relu
    z = y >> conv(24, 3, pad=1, name="conv2") >> relu >> conv(20, 3, stride=2, pad=1, name="conv3")
    return {
        "scores": z >> flatten >> linear(256, name="fc1") >> relu >> linear(10, name="fc2"),
        "map": y >> max_pool(2),
    }


def dsl() -> Network:
    net: Network = small_net().init(seed=3)
    return net


def make_onnx(path: Path, batch: int | str = "n") -> Path:
    """Write a network with an output that is the mean over the batch, and so has no batch axis."""
    rng = np.random.default_rng(11)
    arrays = {
        "w1": rng.standard_normal((16, 3, 3, 3)) / 5,
        "w2": rng.standard_normal((24, 16, 3, 3)) / 12,
        "b2": rng.standard_normal(24),
        "w3": rng.standard_normal((24 * 36, 200)) / 30,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["c2"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w3"], ["y"]),
        helper.make_node("ReduceMean", ["y"], ["mean"], axes=[0], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 12, 12])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 200]),
            helper.make_tensor_value_info("mean", TensorProto.FLOAT, [200]),
        ],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def images(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, 3, 12, 12)).astype(np.float32)


def interpreted(net: Network) -> Run:
    def exact(x: np.ndarray) -> dict[str, np.ndarray]:
        return evaluate(net.with_batch(len(x)).graph(), {"x": x}, precise=True)

    return exact


def by_onnxruntime(path: Path) -> Run:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda x: dict(zip(names, session.run(names, {"x": x}), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batches")


@pytest.fixture(scope="module")
def onnx_file(folder: Path) -> Path:
    return make_onnx(folder / "net.onnx")


@pytest.fixture(scope="module", params=["dsl", "onnx"])
def compiled(request: pytest.FixtureRequest, folder: Path, onnx_file: Path) -> tuple[cnnc.Module, cnnc.Module, Run]:
    """Give a module, itself saved and loaded, and the reference."""
    source = dsl() if request.param == "dsl" else onnx_file
    reference = interpreted(dsl()) if request.param == "dsl" else by_onnxruntime(onnx_file)
    module = cnnc.compile(source, batch=SIZES, name="net", threads=2)
    path = folder / f"{request.param}.so"
    module.save(path)
    return module, cnnc.load(path), reference


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", [0, 1])
def test_each_batch_size_gives_the_numbers_of_the_reference(compiled: Any, size: int, which: int) -> None:
    module, wanted = compiled[which], compiled[2]
    for seed in range(3):
        x = images(size, 10 * size + seed)
        got, expected = module.run({"x": x}), wanted(x)
        assert list(got) == list(expected)
        for name, array in got.items():
            assert array.shape == expected[name].shape
            assert np.linalg.norm(array - expected[name]) <= 1e-5 * np.linalg.norm(expected[name])


def test_one_thread_may_switch_between_sizes_and_no_bit_changes(compiled: Any) -> None:
    for module in compiled[:2]:
        inputs = {size: images(size, size) for size in SIZES}
        first = {size: module.run({"x": x}) for size, x in inputs.items()}
        for size in np.random.default_rng(0).choice(SIZES, 40):
            for name, array in module.run({"x": inputs[size]}).items():
                np.testing.assert_array_equal(array, first[size][name])


def test_every_size_computes_what_a_binary_for_it_alone_does(compiled: Any, onnx_file: Path) -> None:
    module = compiled[1]
    source = dsl() if "scores" in {port.name for port in module.outputs} else onnx_file
    for size in SIZES:
        x = images(size, size)
        alone = cnnc.compile(source, batch=size).run({"x": x})
        for name, array in module.run({"x": x}).items():
            assert np.linalg.norm(array - alone[name]) <= 1e-5 * np.linalg.norm(alone[name])


def test_eight_threads_at_once(compiled: Any) -> None:
    module = compiled[1]
    inputs = {size: images(size, size) for size in SIZES}
    first = {size: module.run({"x": x}) for size, x in inputs.items()}
    wrong: list[object] = []

    def work(offset: int) -> None:
        for turn in range(20):
            size = SIZES[(turn + offset) % len(SIZES)]
            got = module.run({"x": inputs[size]})
            wrong.extend(name for name in got if not np.array_equal(got[name], first[size][name]))

    users = [threading.Thread(target=work, args=(offset,)) for offset in range(8)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not wrong


def test_a_module_tells_its_batch_sizes(compiled: Any) -> None:
    for module in compiled[:2]:
        assert module.batches == SIZES
        assert module.inputs[0].shape == (3, 3, 12, 12)
        assert "batch sizes 3, 1, 8" in repr(module)
        assert module.meta["options"]["batch"] == list(SIZES)
        held = module.with_batch(8)
        assert (held.batches, held.inputs[0].shape, held.with_threads(2).batches) == ((8,), (8, 3, 12, 12), (8,))
        timings = held.profile({"x": images(8, 0)}, repeats=2)
        assert [t.flops for t in timings] == [k.flops for k in held.kernels] != [k.flops for k in module.kernels]
        assert [t.flops for t in module.profile({"x": images(8, 0)}, repeats=2)] == [k.flops for k in held.kernels]


def test_other_batch_sizes_are_refused_with_the_cure(compiled: Any) -> None:
    cure = r"net: not compiled for batch size 4, only for 3, 1, 8; compile the model with --batch 1,3,4,8$"
    for module in compiled[:2]:
        with pytest.raises(UsageError, match=cure):
            module.run({"x": images(4, 0)})
        with pytest.raises(UsageError, match=cure):
            module.with_batch(4)
        with pytest.raises(UsageError, match=r"input 'x' is f32\[8, 3, 12, 12\], got float32\[3, 3, 12, 12\]"):
            module.with_batch(8).run({"x": images(3, 0)})
        with pytest.raises(UsageError, match=r"input 'x' is f32\[8, 3, 12, 12\], got float32\[8, 3, 12, 13\]"):
            module.run({"x": np.zeros((8, 3, 12, 13), np.float32)})


def test_the_weights_are_there_once(compiled: Any, onnx_file: Path, folder: Path) -> None:
    """A second set would be nearly a second file: the weights are most of it."""
    build = compiled[0].build
    source = dsl() if len(build.program.outputs[0].shape) == 2 and "scores" in str(build.program.outputs) else onnx_file
    alone = cnnc.compile(source, batch=8, name="net")
    (path, *_) = alone.save(folder / "alone.so")
    assert build.program.weight_bytes <= 1.05 * alone.build.program.weight_bytes
    saved = Path(compiled[1]._model.path)
    code = sum(map(len, build.objects)) - sum(map(len, alone.build.objects))
    assert saved.stat().st_size < path.stat().st_size + code + 0.2 * alone.build.program.weight_bytes


def test_equal_kernels_are_there_once_and_the_arena_is_the_largest(onnx_file: Path) -> None:
    report, again = Report(), Report()
    module = cnnc.compile(onnx_file, batch=SIZES, report=report)
    singles = [cnnc.compile(onnx_file, batch=size).build for size in SIZES]
    assert report.batches == SIZES
    assert module.build.program.arena_bytes >= max(single.program.arena_bytes for single in singles) > 0
    symbols = {call.symbol for variant in module.build.program.variants for call in variant.calls}
    assert len(module.build.objects) == len(symbols)
    cnnc.compile(onnx_file, batch=SIZES, report=again)
    assert again.kernels_compiled == 0


def test_a_model_of_several_inputs(tmp_path: Path) -> None:
    @network(a=(4,), b=(2, 3))
    def two(a: Tensor, b: Tensor) -> Tensor:
        return (a >> linear(6, name="fa")) + (b >> flatten >> linear(6, name="fb"))

    net = two().init(1)
    module = cnnc.compile(net, batch=(2, 5), name="two")
    rng = np.random.default_rng(2)
    for size in (5, 2):
        a, b = (rng.standard_normal((size, *shape)).astype(np.float32) for shape in ((4,), (2, 3)))
        (wanted,) = evaluate(net.with_batch(size).graph(), {"a": a, "b": b}, precise=True).values()
        np.testing.assert_allclose(module(a, b), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        UsageError, match=r"two: the inputs are of the batch sizes 2, 5; give all the same, one of 2, 5$"
    ):
        module(np.zeros((2, 4), np.float32), np.zeros((5, 2, 3), np.float32))


def test_a_network_object_takes_one_batch_size_too() -> None:
    module = cnnc.compile(dsl(), batch=4)
    assert module.batches == (4,)
    assert module.run({"x": images(4, 0)})["scores"].shape == (4, 10)
    assert cnnc.compile(dsl()).batches == ()


@pytest.mark.parametrize("batch", [(), (1, 1), (2, 0), (-1, 2), (True, 2), (1.5, 2), ("1", "2"), [4, 2, 4]])
def test_lists_that_make_no_sense(batch: Any) -> None:
    with pytest.raises(UsageError, match=r"batch=.*(whole numbers of at least 1|is there twice)"):
        cnnc.compile(dsl(), batch=batch)


def test_what_has_a_fixed_batch_size_refuses_others(tmp_path: Path, onnx_file: Path) -> None:
    fixed = make_onnx(tmp_path / "fixed.onnx", 8)
    with pytest.raises(UsageError, match="has the fixed leading dimension 8, not batch 1"):
        cnnc.compile(fixed, batch=(8, 1))
    with pytest.raises(UsageError, match="input 'x' has the fixed leading dimension 1, not batch 8"):
        cnnc.compile(dsl().graph(), batch=(1, 8))
    with pytest.raises(UsageError, match="input 'x' has the fixed leading dimension 1, not batch 8"):
        cnnc.compile(dsl().graph(), batch=8)
    assert cnnc.compile(dsl().graph(), batch=(1,)).batches == (1,)
    with pytest.raises(UsageError, match="batch sizes 1 and 8 make no difference: every input's shape is fixed"):
        cnnc.compile(onnx_file, batch=(1, 8), shapes={"x": (2, 3, 12, 12)})


# The command line


@pytest.fixture(scope="module")
def binary(onnx_file: Path, folder: Path) -> Path:
    path = folder / "cli" / "net.so"
    assert run(["compile", str(onnx_file), "--batch", "3,1,8", "-o", str(path)]) == 0
    return path


def test_compile_says_for_which_sizes(onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", str(onnx_file), "--batch", "3,1,8", "-o", str(tmp_path / "net.so")]
    assert run(arguments) == 0
    assert "batch    3, 1, 8\n" in capsys.readouterr().out
    assert run([*arguments, "--json", "--dump-ir", str(tmp_path / "ir")]) == 0
    assert json.loads(capsys.readouterr().out)["batches"] == [3, 1, 8]
    for size in SIZES:
        assert f"f32[{size},3,12,12]" in (tmp_path / "ir" / f"batch{size}" / "00-import.txt").read_text()


@pytest.mark.parametrize(
    "text", ["0", "1,0", "-1", "1,-8", "8,8", "1,,2", "", "a", "1.5", "1, 2", "4294967297", "9" * 5000]
)
def test_bad_lists_are_usage_errors(onnx_file: Path, tmp_path: Path, text: str, capsys: Any) -> None:
    assert run(["compile", str(onnx_file), "--batch", text, "-o", str(tmp_path / "net.so")]) == 2
    assert "--batch" in capsys.readouterr().err
    assert not (tmp_path / "net.so").exists()


def test_a_fixed_model_refuses_a_list_on_the_command_line(tmp_path: Path, capsys: Any) -> None:
    fixed = make_onnx(tmp_path / "fixed.onnx", 8)
    assert run(["compile", str(fixed), "--batch", "1,8", "-o", str(tmp_path / "net.so")]) == 2
    assert "has the fixed leading dimension 8, not batch 1" in capsys.readouterr().err


def test_what_takes_one_batch_size_says_so(onnx_file: Path, binary: Path, tmp_path: Path, capsys: Any) -> None:
    output = ["-o", str(tmp_path / "net.ir")]
    for arguments, message in (
        (
            ["compile", str(onnx_file), "--batch", "1,2", "--emit", "ir", *output],
            "--emit ir writes the kernels for one",
        ),
        (["inspect", str(onnx_file), "--batch", "1,2"], "a graph is for one batch size, not 2; name one"),
        (["opt", str(onnx_file), "--batch", "1,2"], "a graph is for one batch size, not 2; name one"),
        (["tune", str(onnx_file), "--batch", "1,2"], "a search is for one batch size"),
        (["run", str(binary), "--batch", "1,8"], "name one of the batch sizes"),
        (["run", str(binary), "--batch", "2"], "net: not compiled for batch size 2, only for 3, 1, 8"),
    ):
        assert run(arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_run_takes_the_first_or_the_chosen_or_that_of_the_input(binary: Path, tmp_path: Path, onnx_file: Path) -> None:
    reference = by_onnxruntime(onnx_file)
    x = images(8, 4)
    np.save(tmp_path / "x.npy", x)
    y = tmp_path / "y.npy"
    assert run(["run", str(binary), "--input", f"@{tmp_path / 'x.npy'}", "--save", f"y={y}"]) == 0
    np.testing.assert_allclose(np.load(y), reference(x)["y"], rtol=1e-4, atol=1e-5)
    for chosen, size in (([], 3), (["--batch", "1"], 1)):
        assert run(["run", str(binary), *chosen, "--input", "ones", "--save", f"y={y}"]) == 0
        wanted = reference(np.ones((size, 3, 12, 12), np.float32))["y"]
        np.testing.assert_allclose(np.load(y), wanted, rtol=1e-4, atol=1e-5)


def test_a_picture_is_a_batch_of_one(binary: Path, onnx_file: Path, tmp_path: Path, capsys: Any) -> None:
    from PIL import Image

    pixels = np.random.default_rng(7).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    y = tmp_path / "y.npy"
    assert run(["run", str(binary), "--input", f"x=@{tmp_path / 'x.png'}", "--save", f"y={y}"]) == 0
    x = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32) / 255
    np.testing.assert_allclose(np.load(y), by_onnxruntime(onnx_file)(x)["y"], rtol=1e-4, atol=1e-5)
    assert run(["profile", str(binary), "--input", f"@{tmp_path / 'x.png'}", "--repeats", "1"]) == 0
    assert "batch size 1 of 3, 1, 8" in capsys.readouterr().out
    assert run(["run", str(binary), "--batch", "8", "--input", f"@{tmp_path / 'x.png'}"]) == 2
    assert "takes no picture" in capsys.readouterr().err


def test_verify_compares_every_size(onnx_file: Path, binary: Path, capsys: Any) -> None:
    arguments = ["verify", str(onnx_file), str(binary), "--against", "numpy,onnxruntime", "--json"]
    assert run(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["batch"] for row in rows] == [size for size in SIZES for _ in range(4)]
    assert run([*arguments, "--batch", "8"]) == 0
    assert {row["batch"] for row in json.loads(capsys.readouterr().out)["results"]} == {8}
    assert run(["verify", str(onnx_file), "--batch", "1,2"]) == 0
    assert "batch  against" in capsys.readouterr().out


def test_profile_and_inspect(binary: Path, capsys: Any) -> None:
    flops = {}
    for size in SIZES:
        assert run(["profile", str(binary), "--batch", str(size), "--repeats", "2", "--json"]) == 0
        profiled = [kernel["flops"] for kernel in json.loads(capsys.readouterr().out)["kernels"]]
        assert run(["inspect", str(binary), "--batch", str(size), "--format", "json"]) == 0
        inspected = json.loads(capsys.readouterr().out)
        assert inspected["batches"] == list(SIZES)
        assert inspected["inputs"] == {"x": f"f32[{size}, 3, 12, 12]"}
        assert [kernel["flops"] for kernel in inspected["kernels"]] == profiled
        flops[size] = sum(profiled)
    assert 7 < flops[8] / flops[1] < 9
    assert run(["profile", str(binary), "--repeats", "2"]) == 0
    assert "batch size 3 of 3, 1, 8" in capsys.readouterr().out
    assert run(["inspect", str(binary)]) == 0
    assert "batch   3 of 3, 1, 8" in capsys.readouterr().out


def test_bench_measures_the_first_or_the_chosen(binary: Path, onnx_file: Path, capsys: Any) -> None:
    quick = ["--duration", "0.02", "--rounds", "1", "--warmup-ms", "0", "--json"]
    for chosen in ([], ["--batch", "8"]):
        peers = ["--against", "onnxruntime", "--onnx", str(onnx_file)]
        assert run(["bench", str(binary), *chosen, *peers, *quick]) == 0
        rows = json.loads(capsys.readouterr().out)["results"]
        assert [row["engine"] for row in rows] == ["cnnc", "onnxruntime"]
        assert all(row["error"] < 1e-4 for row in rows)
    assert run(["bench", str(onnx_file), "--batch", "2,1", "--error", "float64", *quick]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["error"] < 1e-4


C_PROGRAM = r"""
#include <stdio.h>
#include "net.h"

static float x[8 * 3 * 12 * 12], y[8 * 200], mean[200];

int main(int argc, char **argv) {
  const void *inputs[] = {x};
  void *outputs[] = {y, mean};
  net_context *context = NULL;
  FILE *in = argc == 3 ? fopen(argv[1], "rb") : NULL, *out = argc == 3 ? fopen(argv[2], "wb") : NULL;
  int i, error;
  if (!in || !out || fread(x, sizeof x, 1, in) != 1) return 1;
  error = net_create(1, &context);
  for (i = 0; i < net_batch_count() && !error; i++) {
    const int batch = net_batch_at(i);
    error = net_run_batch(context, batch, inputs, outputs);
    fwrite(y, net_batch_output(batch, 0)->bytes, 1, out);
    fwrite(mean, net_batch_output(batch, 1)->bytes, 1, out);
  }
  if (!error && net_run_batch(context, 2, inputs, outputs) != net_ERROR_BATCH) return 2;
  net_destroy(context);
  fclose(in);
  return fclose(out) != 0 || error != 0;
}
"""


def test_a_c_program_runs_every_size(binary: Path, onnx_file: Path, tmp_path: Path) -> None:
    x = images(8, 21)
    x.tofile(tmp_path / "x.bin")
    (tmp_path / "main.c").write_text(C_PROGRAM)
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{binary.parent}"]
    command = ["cc", *flags, "main.c", str(binary), f"-Wl,-rpath,{binary.parent}", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "main", tmp_path / "x.bin", tmp_path / "y.bin"], check=True, env={})
    numbers = np.fromfile(tmp_path / "y.bin", np.float32)
    reference = by_onnxruntime(onnx_file)
    for size in SIZES:
        wanted = reference(x[:size])
        got, mean, numbers = np.split(numbers, [size * 200, size * 200 + 200])
        np.testing.assert_allclose(got.reshape(size, 200), wanted["y"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mean, wanted["mean"], rtol=1e-4, atol=1e-5)
    assert numbers.size == 0


def test_an_executable_runs_every_size(onnx_file: Path, tmp_path: Path) -> None:
    program = tmp_path / "net"
    assert run(["compile", str(onnx_file), "--batch", "1,8", "--emit", "exe", "-o", str(program)]) == 0
    reference = by_onnxruntime(onnx_file)
    for size in (8, 1):
        x = images(size, 30 + size)
        np.save(tmp_path / "x.npy", x)
        subprocess.run([program, tmp_path / "x.npy", "-o", tmp_path / "y.npy"], check=True)
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), reference(x)["y"], rtol=1e-4, atol=1e-5)


def test_a_damaged_binary_does_not_load(binary: Path, tmp_path: Path) -> None:
    data = bytearray(binary.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "net.so").write_bytes(data)
    with pytest.raises(CheckFailed, match="its digest differs"):
        cnnc.load(tmp_path / "net.so")


def test_the_same_list_gives_the_same_bytes(onnx_file: Path, binary: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.so"
    assert run(["compile", str(onnx_file), "--batch", "3,1,8", "-o", str(path), "--no-cache"]) == 0
    assert path.read_bytes() == binary.read_bytes()


@pytest.mark.parametrize("seed", [20, 30, 36, 41, 53, 57])
def test_random_networks(seed: int) -> None:
    """Networks of random_onnx.py whose leading axes may be of any size."""
    model = random_network(seed)
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = "n"
    module = cnnc.compile(model, batch=(1, 3))
    rng = np.random.default_rng(seed)
    for batch in (3, 1, 3):
        ports = module.with_batch(batch).inputs
        feeds = {port.name: rng.standard_normal(port.shape).astype(np.float32) for port in ports}
        wanted = evaluate(load_graph(model, Options(batch=batch)), feeds, precise=True)
        for name, array in module.run(feeds).items():
            assert array.shape == wanted[name].shape
            scale = max(np.linalg.norm(wanted[name]), 1e-3 * wanted[name].size ** 0.5)
            assert np.linalg.norm(array - wanted[name]) <= 1e-4 * scale
    alone = [cnnc.compile(model, batch=batch).build.program.weight_bytes for batch in (1, 3)]
    assert module.build.program.weight_bytes <= 1.1 * max(alone) + 4096
