"""The digest at a binary's end, of files larger than what one thread reads at once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.host.seal import check_binary, seal_binary
from cnnc.errors import CheckFailed

BLOCK = 4 << 20
SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 12345)


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def check(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with path.open("rb") as file:
        check_binary(file.fileno())


@pytest.mark.parametrize("size", SIZES)
def test_the_seal_is_a_digest_of_digests(size: int, tmp_path: Path) -> None:
    data = content(size)
    (tmp_path / "x").write_bytes(data)
    seal_binary(tmp_path / "x")
    sealed = (tmp_path / "x").read_bytes()
    blocks = [hashlib.sha256(data[start : start + BLOCK]).digest() for start in range(0, size, BLOCK)]
    wanted = hashlib.sha256(b"".join(blocks)).digest()
    assert sealed == data + b"cnnc-sha256-v2\0\0" + size.to_bytes(8, "little") + wanted
    check(tmp_path / "x", sealed)


def test_one_cpu_finds_the_same(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    (tmp_path / "x").write_bytes(content(SIZES[-1]))
    os.sched_setaffinity(0, {min(allowed)})
    try:
        seal_binary(tmp_path / "x")
    finally:
        os.sched_setaffinity(0, allowed)
    check(tmp_path / "x", (tmp_path / "x").read_bytes())


@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, 3 * BLOCK, SIZES[-1] - 1, SIZES[-1] + 20, -1])
def test_a_changed_bit_is_found(at: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content(SIZES[-1]))
    seal_binary(tmp_path / "x")
    sealed = bytearray((tmp_path / "x").read_bytes())
    sealed[at] ^= 16
    with pytest.raises(CheckFailed, match="was changed after it was built"):
        check(tmp_path / "x", bytes(sealed))


def test_blocks_that_change_places_are_found(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content(SIZES[-1]))
    seal_binary(tmp_path / "x")
    sealed = (tmp_path / "x").read_bytes()
    with pytest.raises(CheckFailed, match="was changed after it was built"):
        check(tmp_path / "x", sealed[BLOCK : 2 * BLOCK] + sealed[:BLOCK] + sealed[2 * BLOCK :])


@pytest.mark.parametrize("keep", [0, 55, BLOCK, 3 * BLOCK])
def test_a_file_that_is_cut_is_no_binary(keep: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content(SIZES[-1]))
    seal_binary(tmp_path / "x")
    with pytest.raises(CheckFailed, match="cut"):
        check(tmp_path / "x", (tmp_path / "x").read_bytes()[:keep])
