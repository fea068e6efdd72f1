"""`cnnc inspect` on what was compiled for GPUs: each launch with what it takes and what it can come to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnnc.cli.main import run
from tests.backends.cuda import fake_nvcc
from tests.backends.cuda.emulator import needs_gxx

pytestmark = needs_gxx

NETWORK = """
from cnnc.frontends.dsl import Tensor, conv, global_avg_pool, network, relu

@network(x=(16, 28, 28))
def small(x: Tensor) -> Tensor:
    return relu(x >> conv(32, 3, pad=1, name="conv1")) >> global_avg_pool
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "net.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{fake_nvcc.install(folder)}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("CNNC_CACHE_DIR", str(folder / "cache"))
        yield f"{folder}/net.py:small"


def test_a_model_and_its_binary(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    binary = str(tmp_path / "net.so")
    assert run(["compile", model, "--target", "cuda:sm_80", "--batch", "1,2", "-o", binary]) == 0
    capsys.readouterr()
    assert run(["inspect", binary, "--batch", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "launches" not in report["meta"]
    conv, *rest = report["kernels"]
    assert (conv["template"], conv["layers"][0]) == ("conv_gemm", "conv1 (net.py:6)")
    assert conv["flops"] >= 2 * 2 * 32 * 28 * 28 * 16 * 9
    assert conv["bound_by"] in ("arithmetic", "memory")
    assert conv["roofline_seconds"] >= conv["flops"] / 19.5e12
    (launch,) = conv["launches"]
    # The stand-in for ptxas says 8 registers of everything; the tile says how many threads there are.
    tile = dict(item.split("=") for item in conv["schedule"].partition("(")[2].rstrip(")").replace(" ", "").split(","))
    threads = int(tile["rows"]) // int(tile["thread_rows"]) * int(tile["columns"]) // int(tile["thread_columns"])
    assert launch["block"][0] * launch["block"][1] == threads
    assert (launch["registers"], launch["spill_bytes"], launch["tensor_cores"]) == (8, 0, False)
    assert 0 < launch["occupancy"] <= 1
    assert launch["grid"][2] == 2
    assert all(kernel["launches"] for kernel in rest)

    assert run(["inspect", binary]) == 0
    said = capsys.readouterr().out
    assert "at best" in said
    assert "on A100" in said
    assert "batch   1 of 1, 2" in said
    heading = next(line for line in said.splitlines() if "occupancy" in line)
    assert heading.split()[:9] == ["#", "template", "tile", "grid", "block", "regs", "shared", "spills", "occupancy"]
    (line,) = (line for line in said.splitlines() if "conv_gemm" in line)
    assert line.rstrip().endswith("(net.py:6)")

    assert run(["inspect", model, "--target", "cuda:sm_80", "--batch", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == report["kernels"]


def test_the_graph_is_shown_where_it_is_asked_for(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", model, "--target", "cuda:sm_80", "--format", "text"]) == 0
    assert "conv" in capsys.readouterr().out
    assert run(["inspect", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["layers"] == ["conv1 (net.py:6)"]
