"""What the driver is given: impossible programs are refused, names become safe C identifiers."""

from __future__ import annotations

import mmap
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cnnc.backends.host.device import DeviceCode, DeviceLaunch, TensorMap
from cnnc.backends.host.driver import SUFFIXES, driver_ir, emit_driver, exported_symbols
from cnnc.backends.host.header import emit_header
from cnnc.backends.host.program import (
    ABI,
    CPU_FEATURES,
    MAX_WEIGHTS,
    KernelCall,
    Port,
    Program,
    Slot,
    Variant,
    c_prefix,
)
from cnnc.backends.host.toolchain import RUNTIME
from cnnc.errors import LimitError, VerifyError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arena_bytes": -1}, "negative size"),
        ({"features": ("avx2", "prefer-256-bit")}, r"cannot check for the CPU features \['prefer-256-bit'\]"),
        ({"inputs": (Port("x", "f12", ()),)}, "dtype 'f12'"),
        ({"inputs": (Port("x", "f32", (2, -1)),)}, r"shape \(2, -1\)"),
        ({"calls": (KernelCall("a b", ()),)}, "not a symbol"),
        ({"calls": (KernelCall("cnnc_rt_run", ()),)}, "not a symbol"),
        ({"calls": (KernelCall("k", (), slices=0),)}, "0 slices"),
        ({"calls": (KernelCall("k", (), slices=2**31),)}, "2147483648 slices"),
        ({"calls": (KernelCall("k", (), flops=-1),)}, "negative flops"),
        ({"calls": (KernelCall("k", ()), KernelCall("k", (Slot("arena", 0),)))}, "called with 1 and 0 arguments"),
        ({"calls": (KernelCall("k", (Slot("input", 1),)),)}, "input 1 is outside of 1"),
        ({"calls": (KernelCall("k", (Slot("output", -1),)),)}, "output -1 is outside"),
        ({"calls": (KernelCall("k", (Slot("arena", 1024),)),)}, "arena 1024 is outside of 960"),
        ({"calls": (KernelCall("k", (Slot("arena", 32),)),)}, "32 is no multiple of 64"),
        ({"calls": (KernelCall("k", (Slot("weights", 4096),)),)}, "weights 4096 is outside of 2640"),
        ({"calls": (KernelCall("k", (Slot(cast(Any, "stack"), 0),)),)}, "'stack' is no memory"),
    ],
)
def test_impossible_programs(small: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        replace(small.program, **change)


_MAP = TensorMap("f16", (64, 3), (128,), (64, 8), swizzled=True)
_LAUNCH = DeviceLaunch(0, "f", (Slot("map", 0),), (1, 1, 1), (32, 1, 1), maps=((Slot("arena", 0), _MAP),))


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (replace(_LAUNCH, module=1), "there is no module 1"),
        (replace(_LAUNCH, grid=(0, 1, 1)), "blocks of"),
        (replace(_LAUNCH, args=(Slot("map", 1),)), "there is no map 1"),
        (replace(_LAUNCH, maps=((Slot("arena", 1024), _MAP),)), "arena 1024 is outside of 960"),
        (replace(_LAUNCH, maps=((Slot("arena", 0), replace(_MAP, strides=(120,))),)), "no driver makes TensorMap"),
    ],
)
def test_impossible_launches(small: Any, launch: DeviceLaunch, message: str) -> None:
    def program(launch: DeviceLaunch) -> Program:
        calls = (KernelCall("k", (), launches=(launch,)),)
        return cast(Program, replace(small.program, calls=calls, device=DeviceCode("sm_90a", (b"code",))))

    assert program(_LAUNCH).device is not None
    with pytest.raises(VerifyError, match=message):
        program(launch)


def test_too_many_weights() -> None:
    with mmap.mmap(-1, MAX_WEIGHTS + 1) as memory, pytest.raises(LimitError, match="at most 2,013,265,920"):
        Program("big", (), (), (), 0, 0, (memoryview(memory),))


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("resnet50", "resnet50"),
        ("ResNet-50 v1.5", "ResNet_50_v1_5"),
        ("3x3", "model_3x3"),
        ("", "model"),
        ("///", "model"),
        ("int", "model_int"),
        ("class", "model_class"),
        ("pthread", "model_pthread"),
        ("pthread_key", "model_pthread_key"),
        ("timer", "model_timer"),
        ("cnnc", "model_cnnc"),
        ("_x", "model_x"),
        ("ä", "model"),
        ("\0", "model"),
        ("main", "model_main"),
    ],
)
def test_prefixes(name: str, prefix: str) -> None:
    assert c_prefix(name) == prefix


@given(st.text(max_size=100))
def test_every_prefix_is_an_identifier(name: str) -> None:
    prefix = c_prefix(name)
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,69}", prefix)
    assert c_prefix(prefix) == prefix


def test_long_names_stay_apart() -> None:
    first, second = c_prefix("x" * 1000), c_prefix("x" * 999 + "y")
    assert first != second
    assert len(first) <= 60


def test_no_exported_name_is_one_of_libc() -> None:
    found = subprocess.run(["ldd", "/bin/sh"], capture_output=True, text=True, check=True).stdout
    libc = re.search(r"=> (\S*/libc\.so\S*)", found)
    assert libc is not None
    for library in (libc[1], libc[1].replace("libc.so", "libm.so")):
        lines = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout.splitlines()
        names = {line.split()[-1].split("@")[0] for line in lines}
        assert len(names) > 500
        for name in names:
            for suffix in SUFFIXES:
                if name.endswith(f"_{suffix}"):
                    assert f"{c_prefix(name.removesuffix(f'_{suffix}'))}_{suffix}" not in names, name


NAMES = ['*/ int main(){} /*"', "a\nb", "??/", "\\", "int", "ä\0", "x" * 3000, "#define small_run", ""]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("language", ["c99", "c11", "c++11", "c++20"])
def test_headers_compile_whatever_the_names(name: str, language: str, tmp_path: Path) -> None:
    ports = (Port(name, "f32", (1, 2)), Port(name, "bool", ()), Port("big", "f64", (2**31, 2)))
    program = Program(name, ports, ports[:1], (), 0, 0, b"")
    text = emit_header(program)
    assert text.isascii()
    (tmp_path / "m.h").write_text(text)
    source = '#include "m.h"\n#include "m.h"\nint unused(void);\nint unused(void) { return P_ERROR_BUSY; }\n'
    (tmp_path / "m.c").write_text(source.replace("P_", f"{program.prefix}_"))
    compiler = ["g++", "-x", "c++"] if "++" in language else ["gcc"]
    flags = [f"-std={language}", "-Wall", "-Wextra", "-Werror", "-pedantic", "-Wshadow", "-fsyntax-only"]
    subprocess.run([*compiler, *flags, "m.c"], cwd=tmp_path, check=True)


def test_features_are_those_of_the_runtime() -> None:
    names = re.findall(r'FEATURE\("([^"]+)"', (RUNTIME / "cpu.c").read_text())
    assert len(names) == len(set(names))
    assert set(names) == CPU_FEATURES


def test_header_and_runtime_agree(small: Any) -> None:
    def codes(text: str, prefix: str) -> dict[str, str]:
        return dict(re.findall(rf"{prefix}_((?:OK|ERROR_\w+)) = (\d+)", text))

    inner = (RUNTIME / "cnnc_rt.h").read_text()
    one = small.program
    several = replace(one, batch=1, others=(Variant(2, one.inputs, one.outputs, one.calls),))
    header = emit_header(replace(several, device=DeviceCode("sm_90", ())))
    assert codes(header, "small") == codes(inner, "CNNC_RT")
    assert len(codes(header, "small")) == 19
    declared = set(re.findall(r"\b(small_\w+)\(", header))
    assert declared == {f"small_{suffix}" for suffix in SUFFIXES}
    assert not any(word in emit_header(several) for word in ("async", "stream", "small_wait", "GPU,"))
    assert re.findall(r"CNNC_RT_ABI (\d+)", inner) == re.findall(r"small_ABI_VERSION (\d+)", header) == [str(ABI)]


def test_what_is_for_several_batch_sizes_is_in_their_header_only(small: Any) -> None:
    assert "batch" not in emit_header(small.program).lower()
    assert "batch" not in emit_header(replace(small.program, batch=8)).lower()
    assert exported_symbols(replace(small.program, batch=8)) == exported_symbols(small.program)


def test_driver_is_the_same_each_time_and_shares_thunks(small: Any) -> None:
    program = small.program
    twice = replace(program, calls=program.calls * 2)
    text = driver_ir(twice)
    assert text == driver_ir(twice)
    assert text.count('define internal i32 @"cnnc_rt_thunk') == 3
    assert emit_driver(twice) == emit_driver(twice)


def test_driver_of_many_kernels_takes_time_in_proportion(small: Any) -> None:
    import time

    def seconds(count: int) -> float:
        start = time.perf_counter()
        call = KernelCall("k", (Slot("arena", 0), Slot("weights", 0)))
        calls = tuple(replace(call, symbol=f"k{index}", layers=(f"layer{index}",)) for index in range(count))
        emit_driver(replace(small.program, calls=calls))
        return time.perf_counter() - start

    seconds(10)
    few = min(seconds(100) for _ in range(3))
    assert seconds(1000) < 40 * few
