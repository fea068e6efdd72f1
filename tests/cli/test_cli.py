"""The command line from outside: exit codes, one-line errors, reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import cnnc
from cnnc.backends.host.gpu import Driver, Gpu
from cnnc.cli import doctor
from cnnc.cli.main import run

NETWORK = """
from cnnc.frontends.dsl import conv, linear, flatten, max_pool, network, relu

@network(x=(3, 8, 8))
def tiny(x):
    x = x >> conv(5, 3, pad=1, name="conv1") >> relu >> max_pool(2)
    return x >> flatten >> linear(7, name="fc")
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "tiny.py"
    path.write_text(NETWORK)
    return f"{path}:tiny"


@pytest.fixture
def binary(model: str, tmp_path: Path) -> str:
    path = tmp_path / "new folder" / "tiny.so"
    assert run(["compile", model, "-o", str(path)]) == 0
    return str(path)


def test_compile_writes_library_and_header_and_says_so(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "tiny.so"
    assert run(["compile", model, "-o", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["report"] == "compile"
    assert set(report["files"]) == {str(path), str(path.with_suffix(".h"))}
    assert report["kernels"] > 0


def test_compile_chooses_tile_sizes_for_threads(tmp_path: Path):
    path = tmp_path / "wide.py"
    path.write_text(NETWORK.replace("(3, 8, 8)", "(32, 28, 28)").replace("conv(5, 3, pad=1", "conv(32, 1"))
    schedules = []
    for threads in ("1", "16"):
        binary = tmp_path / f"wide{threads}.so"
        assert (
            run(["compile", f"{path}:tiny", "-o", str(binary), "--target", "cpu:x86-64-v3", "--threads", threads]) == 0
        )
        schedules.append([kernel.schedule for kernel in cnnc.load(binary).kernels])
    assert schedules[0] != schedules[1]
    assert run(["compile", f"{path}:tiny", "-o", str(binary), "--threads", "0"]) == 2


def test_run_of_binary_equals_interpreter(model: str, binary: str, tmp_path: Path):
    x = np.random.default_rng(3).standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "y.npy"
    assert run(["run", binary, "--input", f"@{tmp_path / 'x.npy'}", "--save", str(out)]) == 0
    from cnnc.driver import load_graph
    from cnnc.ir.interp import evaluate

    graph = load_graph(model)
    (wanted,) = evaluate(graph, {graph.input_names[0]: x}, precise=True).values()
    np.testing.assert_allclose(np.load(out), wanted, rtol=1e-4, atol=1e-5)


def test_run_compares_with_expected_output(binary: str, tmp_path: Path):
    out = tmp_path / "y.npy"
    assert run(["run", binary, "--save", str(out), "--seed", "5"]) == 0
    assert run(["run", binary, "--expect", f"@{out}", "--seed", "5"]) == 0
    assert run(["run", binary, "--expect", f"@{out}", "--seed", "6"]) == 1


def test_verify_passes_and_fails(model: str, binary: str, capsys: pytest.CaptureFixture[str]):
    assert run(["verify", model, binary]) == 0
    assert "PASSED" in capsys.readouterr().out
    assert run(["verify", model, binary, "--tolerance", "0"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_profile_names_the_users_layers(binary: str, capsys: pytest.CaptureFixture[str]):
    assert run(["profile", binary, "--repeats", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    layers = " ".join(layer for kernel in report["kernels"] for layer in kernel["layers"])
    assert "conv1" in layers
    assert "fc" in layers
    assert all(kernel["nanoseconds"] > 0 for kernel in report["kernels"])


def test_bench_reports_each_thread_count(binary: str, capsys: pytest.CaptureFixture[str]):
    assert run(["bench", binary, "--threads", "1,2", "--duration", "0.05", "--warmup-ms", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["threads"] for row in report["results"]] == [1, 2]


def test_inspect_of_model_and_binary(model: str, binary: str, capsys: pytest.CaptureFixture[str]):
    assert run(["inspect", model, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 3 * 5 * 9 + 5 + 5 * 16 * 7 + 7
    for form in ("text", "dot", "table"):
        assert run(["inspect", model, "--format", form]) == 0
    assert run(["inspect", binary]) == 0
    assert "conv1" in capsys.readouterr().out


def test_opt_prints_ir_that_reads_back(model: str, capsys: pytest.CaptureFixture[str]):
    assert run(["opt", model, "--passes", "simplify,fuse"]) == 0
    assert "fused" in capsys.readouterr().out
    assert run(["opt", "--list-passes"]) == 0
    assert "fold_batch_norm" in capsys.readouterr().out


def test_dump_ir_and_time_passes(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["compile", model, "-o", str(tmp_path / "t.so"), "--dump-ir", str(tmp_path / "ir"), "--time-passes"]
    assert run([*arguments, "--why", "fold_batch_norm"]) == 0
    assert any("fuse" in path.name for path in (tmp_path / "ir").iterdir())
    assert "fuse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compile", "missing.onnx", "-o", "x.so"], 6, "missing.onnx"),
        (["run", "missing.so"], 6, "missing.so"),
        (["compile", "{model}", "-o", "{folder}"], 6, "is a folder"),
        (["compile", "{model}", "-o", "x.so", "--target", "cpu:pentium9"], 2, "pentium9"),
        (["compile", "{model}", "-o", "x.so", "--target", "cuda:sm_999"], 2, "sm_80, sm_86, sm_89, sm_90"),
        (["tune", "{model}", "--target", "cuda:sm_90"], 2, "tune measures schedules on this machine's CPU"),
        (["compile", "{model}", "-o", "x.so", "--emit", "exe,elf"], 2, "elf"),
        (["compile", "{model}", "-o", "x.so", "--passes", "fold_batchnorm"], 2, "fold_batch_norm"),
        (["run", "{model}", "--input", "nothere=random"], 2, "nothere"),
        (["run", "{model}", "--input", "1x1x8x8:random"], 2, "[1,3,8,8]"),
        (["verify", "{model}", "--against", "guesswork"], 2, "guesswork"),
        (["compile", "{model}2", "-o", "x.so"], 2, "tiny2"),
    ],
)
def test_mistakes_end_in_one_line_and_the_code(
    arguments: list[str],
    code: int,
    message: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    filled = [a.format(model=model, folder=tmp_path) for a in arguments]
    assert run(filled) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "x.so").exists()


def test_doctor_is_content_here(capsys: pytest.CaptureFixture[str]):
    assert run(["doctor"]) == 0
    assert "PASSED" in capsys.readouterr().out


def test_doctor_lists_the_engines_to_compare_with(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    versions = {"onnxruntime": "1.2.3", "ncnn": "4.5"}
    monkeypatch.setattr(doctor, "_version", lambda package: versions.get(package, ""))
    run(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    found = {f["what"]: (f["found"], f["cure"]) for f in report["findings"] if f["what"].startswith("--against")}
    assert found == {
        "--against onnxruntime": ("onnxruntime 1.2.3", ""),
        "--against openvino": ("openvino missing", "pip install openvino"),
        "--against ncnn": ("ncnn 4.5, pnnx missing", "pip install pnnx"),
        "--against torch": ("torch missing", "pip install torch"),
    }


def test_ops_lists_operators(capsys: pytest.CaptureFixture[str]):
    assert run(["ops", "--json"]) == 0
    assert "Conv" in json.loads(capsys.readouterr().out)["onnx"]


def test_small_binaries_are_asked_for_by_a_level(tmp_path: Path):
    """The weights of this layer grow by 16 / 9 and more with Winograd's algorithm."""
    source = tmp_path / "net.py"
    layers = 'x >> conv(64, 3, pad=1, name="a") >> conv(64, 3, pad=1, name="b")'
    source.write_text(
        f"from cnnc.frontends.dsl import conv, network\n@network(x=(64, 28, 28))\ndef net(x):\n    return {layers}\n"
    )
    sizes = {}
    for level in ("3", "s"):
        path = tmp_path / f"net{level}.so"
        assert run(["compile", f"{source}:net", "-O", level, "-o", str(path)]) == 0
        sizes[level] = path.stat().st_size
    model = 2 * 64 * (64 * 9 + 1) * 4
    assert sizes["3"] > 2.5 * model
    assert sizes["s"] < 1.1 * model + (64 << 10), "the runtime's code beside the weights"
    assert run(["compile", f"{source}:net", "-O", "t", "-o", str(path)]) == 2


def test_doctor_tells_of_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    driver = Driver("13.0", (Gpu("NVIDIA H200", "sm_90"), Gpu("NVIDIA A10", "sm_86"), Gpu("Tesla V100", "sm_70")))
    monkeypatch.setattr("cnnc.backends.host.gpu.cuda_driver", lambda: driver)
    monkeypatch.setattr("cnnc.backends.cuda.nvcc.find_nvcc", lambda: "/opt/nvcc")
    monkeypatch.setattr("cnnc.backends.cuda.nvcc.nvcc_version", lambda: "Cuda\ntools, release 13.0, V13.0.88\nBuild")
    assert cuda_findings(capsys) == {
        "nvcc": ("V13.0.88 (/opt/nvcc)", ""),
        "CUDA driver": ("for CUDA 13.0, 3 GPUs", ""),
        "GPU 0": ("NVIDIA H200 (--target cuda:sm_90a)", ""),
        "GPU 1": ("NVIDIA A10 (--target cuda:sm_86)", ""),
        "GPU 2": ("Tesla V100 (sm_70, which no target is for)", ""),
    }


def test_doctor_is_content_without_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("cnnc.backends.host.gpu.cuda_driver", lambda: None)
    which = shutil.which
    monkeypatch.setattr("cnnc.backends.cuda.nvcc.shutil.which", lambda name: None if name == "nvcc" else which(name))
    monkeypatch.setattr("cnnc.backends.cuda.nvcc._in_wheel", lambda: None)
    found = cuda_findings(capsys)
    assert {what: state for what, (state, _) in found.items()} == {"nvcc": "missing", "CUDA driver": "missing"}
    assert "pip install nvidia-cuda-nvcc" in found["nvcc"][1]
    assert "install NVIDIA's driver" in found["CUDA driver"][1]


def cuda_findings(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    assert run(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    return {f["what"]: (f["found"], f["cure"]) for f in findings if f["what"].startswith(("nvcc", "CUDA", "GPU"))}
