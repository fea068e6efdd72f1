"""Running DSL files that the user names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cnnc.errors import CnncError, ModelError, ShapeError, UsageError
from cnnc.frontends.dsl import load_network

TWO = """
from cnnc.frontends.dsl import Tensor, conv, network, relu

@network(x=(3, 8, 8))
def tiny(x: Tensor, channels: int = 4) -> Tensor:
    return x >> conv(channels, 3, name="conv")

@network(x=(3, 8, 8))
def broken(x: Tensor) -> Tensor:
    return x >> conv(4, 9, name="conv")

made = tiny(batch=2)
count = 3

def maker(batch: int = 1):
    return tiny(batch=batch)

def other(batch: int = 1):
    return 7

def fails(batch: int = 1):
    return [][batch]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "two.py"
    path.write_text(TWO)
    return path


def test_a_network_by_its_name(file: Path) -> None:
    assert load_network(f"{file}:tiny").outputs[0].shape == (1, 4, 6, 6)
    net = load_network(f"{file}:tiny", batch=3, channels=7, x=(3, 5, 5))
    assert net.outputs[0].shape == (3, 7, 3, 3)
    assert net.name == "tiny"


def test_a_network_made_already_or_by_a_function(file: Path) -> None:
    assert load_network(f"{file}:made").outputs[0].shape == (2, 4, 6, 6)
    assert load_network(f"{file}:made", batch=5).outputs[0].shape == (5, 4, 6, 6)
    assert load_network(f"{file}:maker", batch=6).outputs[0].shape == (6, 4, 6, 6)


def test_the_only_network_needs_no_name(tmp_path: Path, file: Path) -> None:
    single = tmp_path / "one.py"
    single.write_text(TWO.split("@network(x=(3, 8, 8))\ndef broken")[0])
    assert load_network(str(single)).name == "tiny"
    with pytest.raises(UsageError, match=r"name one of its networks, as in .*two\.py:NAME; it has tiny, broken, made"):
        load_network(str(file))


def test_names_that_are_not_there(file: Path) -> None:
    with pytest.raises(UsageError, match=r"two\.py: has no network 'tinny'; it has tiny"):
        load_network(f"{file}:tinny")
    with pytest.raises(UsageError, match="has no network 'count'"):
        load_network(f"{file}:count")
    with pytest.raises(UsageError, match="other gives int, not a network"):
        load_network(f"{file}:other")
    with pytest.raises(UsageError, match="there is no such file"):
        load_network(f"{file.parent}/none.py:tiny")
    for spec in ("net.onnx", "net.py:", "net.py:a-b", "net", "net.onnx:tiny"):
        with pytest.raises(UsageError, match="is no network of a DSL file"):
            load_network(spec)


def test_a_mistake_in_the_file_names_its_line(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"two.py:10, in broken"):
        load_network(f"{file}:broken")
    with pytest.raises(ModelError, match=r"two.py:22: IndexError: list index out of range"):
        load_network(f"{file}:fails")
    for text, message in {
        "import nothing_like_this\n": r"bad.py:1: ModuleNotFoundError: No module named 'nothing_like_this'",
        "x = 1\nraise SystemExit(3)\n": r"bad.py:2: SystemExit: 3",
        "x = (\n": r"bad.py:1: '\(' was never closed",
        "def f():\n    1 / 0\nf()\n": r"bad.py:2: ZeroDivisionError: division by zero",
    }.items():
        bad = tmp_path / "bad.py"
        bad.write_text(text)
        with pytest.raises(ModelError, match=message) as caught:
            load_network(f"{bad}:net")
        assert caught.value.exit_code == 3


def test_a_file_may_import_its_neighbour(file: Path) -> None:
    beside = file.parent / "beside.py"
    beside.write_text("from two import tiny\n")
    before = list(sys.path)
    assert load_network(f"{beside}:tiny").name == "tiny"
    assert sys.path == before
    del sys.modules["two"]


def test_a_broken_file_leaves_nothing_behind(tmp_path: Path) -> None:
    bad = tmp_path / "bad_one.py"
    bad.write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(CnncError):
        load_network(str(bad))
    assert not {name for name in set(sys.modules) - before if "bad_one" in name}


def test_the_dsl_needs_no_compiler() -> None:
    heavy = ("tvm", "llvmlite", "onnx", "torch", "networkx")
    paths = [p for p in sys.path if p]
    code = f"import sys; sys.path[:0] = {paths!r}; import cnnc.frontends.dsl"
    code += f"\nprint([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
