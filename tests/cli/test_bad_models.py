"""Every bad model of the corpus through the command line: its exit code, one line, no file."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from cnnc.cli.main import run
from tests.frontends.onnx.test_bad_inputs import CASES, Case

# A file on disk always has a folder.
ON_DISK = [case for case in CASES if not case.title.endswith("without a folder")]


@pytest.mark.parametrize("case", ON_DISK, ids=lambda case: case.title)
def test_compile_ends_in_the_exit_code(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = case.make(tmp_path)
    if isinstance(source, bytes | onnx.ModelProto):
        data = source if isinstance(source, bytes) else source.SerializeToString()
        source = tmp_path / "model.onnx"
        source.write_bytes(data)
    out = tmp_path / "out" / "model.so"
    assert run(["compile", str(source), "-o", str(out)]) == case.code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("cnnc: note:")]
    assert len(lines) == 1
    assert lines[0].startswith("cnnc: error: ")
    assert not list(out.parent.iterdir())
