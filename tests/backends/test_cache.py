"""The cache serves what was put, whole, for this key and this user, or nothing."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cache import DiskCache, ScheduleCache, default_folder
from cnnc.backends.cpu.codegen import KernelObject
from cnnc.backends.cpu.kernel_cache import KernelCache
from cnnc.ops.fused import Schedule

KEY = hashlib.sha256(b"a content").hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()


def content(seed: int = 0, size: int = 5000) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "kernels")


def entry(cache: DiskCache) -> Path:
    folder = cache.status().folder
    assert folder is not None
    return folder / KEY[:2] / KEY


def unfinished(cache: DiskCache) -> Path:
    return entry(cache).parent.parent / "unfinished"


def test_gives_back_what_was_put(cache: DiskCache) -> None:
    cache.write(KEY, content())
    assert cache.read(KEY) == content()
    assert cache.read(OTHER) is None


def test_another_process_sees_it(cache: DiskCache) -> None:
    cache.write(KEY, content())
    again = DiskCache(cache.status().folder)
    assert again.read(KEY) == content()


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_is_never_served(cache: DiskCache, seed: int) -> None:
    cache.write(KEY, content())
    data = bytearray(entry(cache).read_bytes())
    bit = int(np.random.default_rng(seed).integers(len(data) * 8))
    data[bit // 8] ^= 1 << bit % 8
    entry(cache).write_bytes(data)
    assert cache.read(KEY) is None
    cache.write(KEY, content())
    assert cache.read(KEY) == content()


@pytest.mark.parametrize("keep", [0, 1, 13, 14, 45, 46, 100, 4000])
def test_a_cut_entry_is_never_served(cache: DiskCache, keep: int) -> None:
    cache.write(KEY, content())
    entry(cache).write_bytes(entry(cache).read_bytes()[:keep])
    assert cache.read(KEY) is None


def test_an_entry_for_another_key_is_never_served(cache: DiskCache) -> None:
    cache.write(KEY, content())
    folder = entry(cache).parents[1] / OTHER[:2]
    folder.mkdir()
    os.rename(entry(cache), folder / OTHER)
    assert cache.read(OTHER) is None


def test_an_entry_of_another_version_is_never_served(cache: DiskCache) -> None:
    cache.write(KEY, content())
    entry(cache).write_bytes(entry(cache).read_bytes().replace(b"cnnc cache 2", b"cnnc cache 1"))
    assert cache.read(KEY) is None


def test_a_link_is_not_followed(cache: DiskCache, tmp_path: Path) -> None:
    cache.write(KEY, content())
    real = tmp_path / "elsewhere"
    os.rename(entry(cache), real)
    entry(cache).symlink_to(real)
    assert cache.read(KEY) is None


def test_a_pipe_does_not_block(cache: DiskCache) -> None:
    cache.write(KEY, content())
    entry(cache).unlink()
    os.mkfifo(entry(cache))
    assert cache.read(KEY) is None


def test_an_entry_of_another_user_is_refused(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(KEY, content())
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert cache.read(KEY) is None


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    cache = DiskCache(tmp_path)
    cache.write(KEY, content())
    assert cache.read(KEY) is None
    assert cache.note == f"nothing is cached: {tmp_path} belongs to another user"


def test_a_folder_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    cache = DiskCache(tmp_path)
    assert "can be written by other users" in (cache.note or "")
    cache.write(KEY, content())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_costs_only_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file" / "kernels")
    cache.write(KEY, content())
    assert cache.read(KEY) is None
    assert "Not a directory" in (cache.note or "")


def test_a_failing_write_leaves_nothing_behind(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    cache.write(KEY, content())
    assert "No space left on device" in (cache.note or "")
    assert list(entry(cache).parent.iterdir()) == list(unfinished(cache).iterdir()) == []


def test_sixteen_writers_and_readers(cache: DiskCache) -> None:
    contents = [content(seed, 200_000) for seed in range(16)]
    start = threading.Barrier(16)

    def work(mine: bytes) -> list[bytes | None]:
        start.wait()
        own = DiskCache(cache.status().folder)
        seen = []
        for _ in range(10):
            own.write(KEY, mine)
            seen.append(own.read(KEY))
        return seen

    with ThreadPoolExecutor(16) as pool:
        seen = [k for found in pool.map(work, contents) for k in found]
    assert all(k in contents for k in seen)
    assert cache.status().entries == 1
    assert [path.name for path in entry(cache).parent.iterdir()] == [KEY]
    assert list(unfinished(cache).iterdir()) == []


def test_status_and_clear(cache: DiskCache) -> None:
    cache.write(KEY, content())
    cache.write(OTHER, content(1))
    (unfinished(cache) / "dead").write_text("half")
    status = cache.status()
    assert status.entries == 2
    assert status.bytes > 10_000
    assert cache.clear() == 2
    assert cache.status().entries == 0
    assert not (unfinished(cache) / "dead").exists()


def test_what_a_dead_writer_left_is_swept(cache: DiskCache) -> None:
    cache.write(KEY, content())
    old, young = unfinished(cache) / "old", unfinished(cache) / "young"
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (0, 0))
    DiskCache(cache.status().folder)
    assert not old.exists()
    assert young.exists()


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CNNC_CACHE_DIR", str(tmp_path))
    assert default_folder() == tmp_path / "kernels"


def test_kernels_and_schedules(cache: DiskCache) -> None:
    kernel = KernelObject("conv_1", content(), slices=7, scratch_bytes=128)
    schedule = Schedule("conv_direct", (("pixels", 6), ("vectors", 2)))
    KernelCache(cache).put(KEY, kernel)
    ScheduleCache(cache).put(OTHER, schedule)
    assert KernelCache(cache).get(KEY) == kernel
    assert ScheduleCache(cache).get(OTHER) == schedule
    assert ScheduleCache(cache).get(hashlib.sha256(b"a third").hexdigest()) is None


def test_without_a_disk_nothing_is_kept() -> None:
    KernelCache(None).put(KEY, KernelObject("conv_1", content(), slices=7, scratch_bytes=128))
    assert KernelCache(None).get(KEY) is None
    ScheduleCache(None).put(OTHER, Schedule("gemm"))
    assert ScheduleCache(None).get(OTHER) is None
