"""The kernel cache serves what was put, whole, for this key and this user, or nothing."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cache import KernelCache, default_folder, no_cache
from cnnc.backends.cpu.codegen import KernelObject

KEY = hashlib.sha256(b"a kernel").hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()


def kernel(seed: int = 0, size: int = 5000) -> KernelObject:
    code = np.random.default_rng(seed).bytes(size)
    return KernelObject("conv_1", code, slices=7, scratch_bytes=128)


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "kernels")


def entry(cache: KernelCache) -> Path:
    folder = cache.status().folder
    assert folder is not None
    return folder / KEY[:2] / KEY


def test_gives_back_what_was_put(cache: KernelCache) -> None:
    cache.put(KEY, kernel())
    assert cache.get(KEY) == kernel()
    assert cache.get(OTHER) is None


def test_another_process_sees_it(cache: KernelCache) -> None:
    cache.put(KEY, kernel())
    again = KernelCache(cache.status().folder)
    assert again.get(KEY) == kernel()


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_is_never_served(cache: KernelCache, seed: int) -> None:
    cache.put(KEY, kernel())
    data = bytearray(entry(cache).read_bytes())
    bit = int(np.random.default_rng(seed).integers(len(data) * 8))
    data[bit // 8] ^= 1 << bit % 8
    entry(cache).write_bytes(data)
    assert cache.get(KEY) is None
    cache.put(KEY, kernel())
    assert cache.get(KEY) == kernel()


@pytest.mark.parametrize("keep", [0, 1, 13, 14, 45, 46, 100, 4000])
def test_a_cut_entry_is_never_served(cache: KernelCache, keep: int) -> None:
    cache.put(KEY, kernel())
    entry(cache).write_bytes(entry(cache).read_bytes()[:keep])
    assert cache.get(KEY) is None


def test_an_entry_for_another_key_is_never_served(cache: KernelCache) -> None:
    cache.put(KEY, kernel())
    folder = entry(cache).parents[1] / OTHER[:2]
    folder.mkdir()
    os.rename(entry(cache), folder / OTHER)
    assert cache.get(OTHER) is None


def test_an_entry_of_another_version_is_never_served(cache: KernelCache) -> None:
    cache.put(KEY, kernel())
    entry(cache).write_bytes(entry(cache).read_bytes().replace(b"cnnc kernel 1", b"cnnc kernel 0"))
    assert cache.get(KEY) is None


def test_a_link_is_not_followed(cache: KernelCache, tmp_path: Path) -> None:
    cache.put(KEY, kernel())
    real = tmp_path / "elsewhere"
    os.rename(entry(cache), real)
    entry(cache).symlink_to(real)
    assert cache.get(KEY) is None


def test_a_pipe_does_not_block(cache: KernelCache) -> None:
    cache.put(KEY, kernel())
    entry(cache).unlink()
    os.mkfifo(entry(cache))
    assert cache.get(KEY) is None


def test_an_entry_of_another_user_is_refused(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEY, kernel())
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert cache.get(KEY) is None


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    cache = KernelCache(tmp_path)
    cache.put(KEY, kernel())
    assert cache.get(KEY) is None
    assert cache.note == f"kernels are not cached: {tmp_path} belongs to another user"


def test_a_folder_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    cache = KernelCache(tmp_path)
    assert "can be written by other users" in (cache.note or "")
    cache.put(KEY, kernel())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_costs_only_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = KernelCache(tmp_path / "file" / "kernels")
    cache.put(KEY, kernel())
    assert cache.get(KEY) is None
    assert "Not a directory" in (cache.note or "")


def test_a_failing_write_leaves_nothing_behind(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    cache.put(KEY, kernel())
    assert "No space left on device" in (cache.note or "")
    assert list(entry(cache).parent.iterdir()) == []


def test_sixteen_writers_and_readers(cache: KernelCache) -> None:
    kernels = [kernel(seed, 200_000) for seed in range(16)]
    start = threading.Barrier(16)

    def work(mine: KernelObject) -> list[KernelObject | None]:
        start.wait()
        own = KernelCache(cache.status().folder)
        seen = []
        for _ in range(10):
            own.put(KEY, mine)
            seen.append(own.get(KEY))
        return seen

    with ThreadPoolExecutor(16) as pool:
        seen = [k for found in pool.map(work, kernels) for k in found]
    assert all(k in kernels for k in seen)
    assert cache.status().entries == 1
    assert [path.name for path in entry(cache).parent.iterdir()] == [KEY]


def test_status_and_clear(cache: KernelCache) -> None:
    cache.put(KEY, kernel())
    cache.put(OTHER, kernel(1))
    (entry(cache).parent / ".new-dead").write_text("half")
    status = cache.status()
    assert status.entries == 2
    assert status.bytes > 10_000
    assert cache.clear() == 2
    assert cache.status().entries == 0
    assert not (entry(cache).parent / ".new-dead").exists()


def test_what_a_dead_writer_left_is_swept(cache: KernelCache) -> None:
    cache.put(KEY, kernel())
    old, young = entry(cache).parent / ".new-old", entry(cache).parent / ".new-young"
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (0, 0))
    KernelCache(cache.status().folder)
    assert not old.exists()
    assert young.exists()


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CNNC_CACHE_DIR", str(tmp_path))
    assert default_folder() == tmp_path / "kernels"


def test_no_cache_keeps_nothing() -> None:
    cache = no_cache()
    cache.put(KEY, kernel())
    assert cache.get(KEY) is None
    assert cache.status().entries == 0
