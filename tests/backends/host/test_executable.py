"""The command-line program: reads arrays and pictures, writes arrays, prints the greatest entries, refuses the rest."""

from __future__ import annotations

import io
import os
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cnnc.backends.host.link import build_executable
from cnnc.backends.host.program import KernelCall, Port, Program, Slot

COPY = r"""
#include <stdint.h>
#include <string.h>
int32_t copy(const char *x, char *y, int32_t last, int32_t lo, int32_t hi) {
  memcpy(y + (int64_t)lo * 4, x + (int64_t)lo * 4, (size_t)(hi - lo) * 4);
  return 0;
}
"""


def run(*command: object, code: int = 0) -> str:
    """Run the program; what it prints to stdout, or to stderr if it is to fail."""
    done = subprocess.run([str(part) for part in command], capture_output=True, timeout=120, check=False)
    assert done.returncode == code, (done.returncode, done.stderr)
    text = (done.stdout if code == 0 else done.stderr).decode()
    if code != 0:
        assert text.count("\n") == 1, text
    return text


@pytest.fixture(scope="module")
def copier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that gives its picture input back: f32[1,3,32,40]."""
    folder = tmp_path_factory.mktemp("copier")
    return build_copier(folder, (1, 3, 32, 40), "{}")


def build_copier(folder: Path, shape: tuple[int, ...], meta: str) -> Path:
    (folder / "copy.c").write_text(COPY)
    subprocess.run(["cc", "-O2", "-fPIC", "-c", "copy.c", "-o", "copy.o"], cwd=folder, check=True)
    port = Port("x", "f32", shape)
    call = KernelCall("copy", (Slot("input", 0), Slot("output", 0)), port.nbytes // 4)
    program = Program("copier", (port,), (port,), (call,), 0, 0, b"", meta=meta)
    build_executable(program, [(folder / "copy.o").read_bytes()], folder / "copier")
    return folder / "copier"


@pytest.fixture(scope="module")
def small_exe(small: Any, kernels: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exe") / "small"
    build_executable(small.program, [kernels], path)
    return path


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_array_in_arrays_out(small_exe: Path, small: Any, tmp_path: Path, threads: int) -> None:
    x = small.inputs(threads)
    np.save(tmp_path / "x.npy", x)
    out = [tmp_path / "y.npy", tmp_path / "best.npy"]
    assert run(small_exe, tmp_path / "x.npy", "-o", out[0], "-o", out[1], "--threads", threads) == ""
    wanted, wanted_best = small.expected(x)
    y, best = (np.load(path) for path in out)
    assert (y.dtype, best.dtype) == (np.float32, np.int32)
    np.testing.assert_allclose(y, wanted, rtol=1e-5)
    np.testing.assert_array_equal(best, wanted_best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.npy", "x.npy", "y.npy"]


def test_the_greatest_entries_with_labels(small_exe: Path, small: Any, tmp_path: Path) -> None:
    x = small.inputs(0)
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "labels.txt").write_text("\n".join(f"thing {i}" for i in range(19)))
    text = run(small_exe, tmp_path / "x.npy", "--top", 3, "--labels", tmp_path / "labels.txt")
    wanted = small.expected(x)[0]
    blocks = text.split("\n\n")
    assert len(blocks) == 12
    for row, block in enumerate(blocks):
        head, *lines = block.strip().splitlines()
        assert head == f"{row}:"
        order = np.argsort(-wanted[row])[:3]
        for line, index in zip(lines, order, strict=True):
            shown, value, label = line.split("\t")
            assert int(shown) == index
            assert float(value) == pytest.approx(wanted[row, index], rel=1e-4)
            assert label == (f"thing {index}" if index < 19 else "")


def test_not_a_number_is_never_on_top(tmp_path: Path) -> None:
    exe = build_copier(tmp_path, (1, 8), "{}")
    np.save(tmp_path / "x.npy", np.array([[np.nan, 1, np.nan, 3, 3, -np.inf, 2, np.nan]], np.float32))
    lines = run(exe, tmp_path / "x.npy", "--top", 8).splitlines()
    assert [int(line.split("\t")[0]) for line in lines] == [3, 4, 6, 1, 5, 0, 2, 7]


def test_bench_info_help(small_exe: Path, small: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", small.inputs(0))
    assert run(small_exe, "--bench", 5, "--threads", 2, tmp_path / "x.npy").startswith("5 runs, 2 threads: min ")
    assert run(small_exe, tmp_path / "x.npy", "--bench").startswith("20 runs")
    assert run(small_exe, "--info") == small.program.meta + "\n"
    assert "input 0: x f32[12,32]\noutput 0: y f32[12,20]" in run(small_exe, "--help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nothing", "x"], "cannot use the option --nothing x"),
        (["--threads", "-1"], "cannot use the option --threads -1"),
        (["--threads", "two"], "--threads two"),
        (["--std", "0"], "--std 0"),
        (["--mean", "1,2"], "--mean 1,2"),
        (["--top", "1001"], "--top 1001"),
        (["-o"], "cannot use the option -o"),
        (["a", "b"], "has 1 inputs and 2 outputs, given were 2 and 0"),
        (["a", "-o", "b", "-o", "c", "-o", "d"], "given were 1 and 3"),
    ],
)
def test_wrong_calls(small_exe: Path, arguments: list[str], message: str) -> None:
    assert message in run(small_exe, *arguments, code=2)


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def test_versions_of_npy(small_exe: Path, small: Any, tmp_path: Path) -> None:
    x = small.inputs(1)
    results = []
    for version in ((1, 0), (2, 0), (3, 0)):
        (tmp_path / "x.npy").write_bytes(npy(x, version))
        results.append(run(small_exe, tmp_path / "x.npy"))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda x: npy(x.astype(np.float64)), 3, "holds '<f8' (12, 32), the model takes f32[12,32]"),
        (lambda x: npy(x.astype(">f4")), 3, "holds '>f4'"),
        (lambda x: npy(x.reshape(32, 12)), 3, "holds '<f4' (32, 12), the model"),
        (lambda x: npy(x[None]), 3, "holds '<f4' (1, 12, 32)"),
        (lambda x: npy(np.asfortranarray(x)), 4, "Fortran order"),
        (lambda x: npy(x)[:-1], 3, "1535 bytes of data, f32[12,32] has 1536"),
        (lambda x: npy(x) + b"x", 3, "1537 bytes of data"),
        (lambda x: npy(x)[:40], 3, "not a .npy array of version 1 to 3, or cut"),
        (lambda x: npy(x)[:6], 3, "not a .npy"),
        (lambda x: b"\x93NUMPY\x09\0" + npy(x)[8:], 3, "not a .npy"),
        (lambda x: npy(np.array([{}], object)), 3, "holds '|O'"),
        (lambda x: b"", 3, "neither .npy nor a"),
        (lambda x: b"PK\3\4" + b"x" * 100, 3, "neither .npy nor a"),
    ],
)
def test_wrong_arrays(small_exe: Path, small: Any, tmp_path: Path, make: Any, code: int, message: str) -> None:
    (tmp_path / "x.npy").write_bytes(make(small.inputs(0)))
    assert message in run(small_exe, tmp_path / "x.npy", code=code)


def test_files_that_cannot_be_used(small_exe: Path, small: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", small.inputs(0))
    os.mkfifo(tmp_path / "fifo")
    assert "No such file" in run(small_exe, tmp_path / "none.npy", code=6)
    assert "is not a file" in run(small_exe, tmp_path, code=3)
    assert "is not a file" in run(small_exe, tmp_path / "fifo", code=3)
    assert "No such file" in run(small_exe, tmp_path / "x.npy", "-o", tmp_path / "none" / "y.npy", code=6)
    assert "directory" in run(small_exe, tmp_path / "x.npy", "-o", tmp_path / "fifo" / "y.npy", code=6)
    assert "No such file" in run(small_exe, tmp_path / "x.npy", "--labels", tmp_path / "none", code=6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "x.npy"]


# --- pictures ---------------------------------------------------------------------------------------------------------


def photo(height: int, width: int, seed: int = 0, rough: float = 0.0) -> np.ndarray:
    """Smooth colours, some noise."""
    rng = np.random.default_rng(seed)
    small = PIL.Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), PIL.Image.Resampling.BICUBIC)).astype(float)
    return (smooth + rough * rng.standard_normal(smooth.shape)).clip(0, 255).astype(np.uint8)


def pixels(exe: Path, path: Path, *options: object) -> np.ndarray:
    """The array the program makes of a picture, back in 0 to 255 and height, width, channel."""
    out = path.with_suffix(".out.npy")
    run(exe, path, "-o", out, *options)
    array: np.ndarray = np.load(out)
    return array[0].transpose(1, 2, 0) * 255


def encode(array: np.ndarray, path: Path, mode: str = "RGB", **options: Any) -> np.ndarray:
    """Save a picture; the pixels PIL reads back from it."""
    PIL.Image.fromarray(array).convert(mode).save(path, **options)
    with PIL.Image.open(path) as image:
        if image.mode in ("LA", "RGBA"):
            bands = image.split()[:-1]
            image = PIL.Image.merge("RGB", bands if len(bands) == 3 else bands * 3)
        return np.asarray(image.convert("RGB")).astype(float)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1"])
@pytest.mark.parametrize("level", [0, 1, 9])
def test_png(copier: Path, tmp_path: Path, mode: str, level: int) -> None:
    array = photo(32, 40, seed=level, rough=20)
    wanted = encode(array, tmp_path / "x.png", mode, compress_level=level)
    np.testing.assert_allclose(pixels(copier, tmp_path / "x.png"), wanted, atol=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_png_of_few_bits(copier: Path, tmp_path: Path, bits: int) -> None:
    picture = PIL.Image.fromarray(photo(32, 40)).quantize(2**bits)
    picture.save(tmp_path / "x.png", bits=bits)
    assert (tmp_path / "x.png").read_bytes()[24:26] == bytes([bits, 3])
    wanted = np.asarray(picture.convert("RGB"))
    np.testing.assert_allclose(pixels(copier, tmp_path / "x.png"), wanted, atol=1e-3)


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def raw_png(header: bytes, rows: bytes, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 15, 9, strategy)
    data = packer.compress(rows) + packer.flush()
    parts = [chunk(b"IDAT", data[i : i + 100]) for i in range(0, len(data), 100)]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(parts) + chunk(b"IEND", b"")


@pytest.mark.parametrize("filter_kind", range(5))
@pytest.mark.parametrize("strategy", [zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE])
def test_png_filters_and_codes(copier: Path, tmp_path: Path, filter_kind: int, strategy: int) -> None:
    array = photo(32, 40, filter_kind, 30).astype(int)
    left = np.pad(array, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    up = np.pad(array, ((1, 0), (0, 0), (0, 0)))[:-1]
    corner = np.pad(array, ((1, 0), (1, 0), (0, 0)))[:-1, :-1]
    guess = left + up - corner
    near = [np.abs(guess - each) for each in (left, up, corner)]
    paeth = np.where((near[0] <= near[1]) & (near[0] <= near[2]), left, np.where(near[1] <= near[2], up, corner))
    predicted = [0 * array, left, up, (left + up) // 2, paeth][filter_kind]
    filtered = ((array - predicted) % 256).astype(np.uint8)
    rows = b"".join(bytes([filter_kind]) + row.tobytes() for row in filtered)
    header = (40).to_bytes(4, "big") + (32).to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    (tmp_path / "x.png").write_bytes(raw_png(header, rows, strategy))
    np.testing.assert_allclose(pixels(copier, tmp_path / "x.png"), array, atol=1e-3)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_png_of_sixteen_bits_keeps_the_high_byte(copier: Path, tmp_path: Path, colour: int, channels: int) -> None:
    array = np.random.default_rng(colour).integers(0, 65536, (32, 40, channels)).astype(">u2")
    header = (40).to_bytes(4, "big") + (32).to_bytes(4, "big") + bytes([16, colour, 0, 0, 0])
    (tmp_path / "x.png").write_bytes(raw_png(header, b"".join(b"\0" + row.tobytes() for row in array)))
    wanted = (array >> 8)[..., [0, 1, 2] if channels > 2 else [0, 0, 0]]
    np.testing.assert_allclose(pixels(copier, tmp_path / "x.png"), wanted, atol=1e-3)


def test_interlaced_png_is_refused(copier: Path, tmp_path: Path) -> None:
    header = (40).to_bytes(4, "big") + (32).to_bytes(4, "big") + bytes([8, 2, 0, 0, 1])
    (tmp_path / "x.png").write_bytes(raw_png(header, b"\0" * 9999))
    assert "interlaced PNG is not supported" in run(copier, tmp_path / "x.png", code=4)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("height", "width"), [(32, 40), (33, 47), (100, 129)])
@pytest.mark.parametrize("quality", [30, 95])
def test_jpeg(tmp_path: Path, subsampling: int, progressive: bool, height: int, width: int, quality: int) -> None:
    exe = build_copier(tmp_path, (1, 3, height, width), "{}")
    options = {"subsampling": subsampling, "progressive": progressive, "quality": quality}
    wanted = encode(photo(height, width, seed=quality, rough=8), tmp_path / "x.jpg", **options)
    difference = np.abs(pixels(exe, tmp_path / "x.jpg") - wanted)
    assert difference.max() <= 4
    assert difference.mean() < 0.6


def test_jpeg_grey_and_restart_markers(copier: Path, tmp_path: Path) -> None:
    array = photo(32, 40, rough=10)
    wanted = encode(array, tmp_path / "grey.jpg", "L", quality=90)
    assert np.abs(pixels(copier, tmp_path / "grey.jpg") - wanted).max() <= 2
    wanted = encode(array, tmp_path / "marks.jpg", quality=90, restart_marker_blocks=2)
    assert b"\xff\xd1" in (tmp_path / "marks.jpg").read_bytes()
    assert np.abs(pixels(copier, tmp_path / "marks.jpg") - wanted).max() <= 4


def test_jpeg_of_other_kinds_is_refused(copier: Path, tmp_path: Path) -> None:
    PIL.Image.fromarray(photo(32, 40)).convert("CMYK").save(tmp_path / "x.jpg")
    assert "CMYK" in run(copier, tmp_path / "x.jpg", code=4)
    encode(photo(32, 40), tmp_path / "y.jpg")
    data = (tmp_path / "y.jpg").read_bytes().replace(b"\xff\xc0", b"\xff\xc9")
    (tmp_path / "y.jpg").write_bytes(data)
    assert "arithmetic" in run(copier, tmp_path / "y.jpg", code=4)


@pytest.mark.parametrize("kind", ["P6", "P5"])
def test_pnm(copier: Path, tmp_path: Path, kind: str) -> None:
    array = photo(32, 40, rough=10)
    values = array if kind == "P6" else array[..., :1]
    (tmp_path / "x.pnm").write_bytes(f"{kind} # a comment\n40\t32\n# more\n255\n".encode() + values.tobytes())
    np.testing.assert_allclose(pixels(copier, tmp_path / "x.pnm"), np.broadcast_to(values, array.shape), atol=1e-3)
    (tmp_path / "y.pnm").write_bytes(f"{kind} 40 32 100\n".encode() + (values // 4).tobytes())
    wanted = np.broadcast_to(values // 4 * 2.55, array.shape)
    np.testing.assert_allclose(pixels(copier, tmp_path / "y.pnm"), wanted, atol=0.51)


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (b"P6 40 32 255\n" + b"x" * (40 * 32 * 3 - 1), 3, "cut"),
        (b"P6 40 32 256\n" + b"x" * 9999, 4, "more than 8 bits"),
        (b"P6 40 32 0\n" + b"x" * 9999, 3, "header"),
        (b"P6 0 32 255\n" + b"x" * 9999, 3, "without pixels"),
        (b"P6 100000 100000 255\n" + b"x" * 9999, 5, "more than 67108864 pixels"),
        (b"P6 99999999999999999999 1 255\n", 3, "header"),
        (b"P6 -4 1 255\n", 3, "header"),
        (b"P6 40", 3, "header"),
        (b"P6#", 3, "header"),
        (b"P6\0\0\0\0", 3, "header"),
        (b"P3 1 1 255 1 2 3", 3, "neither"),
    ],
)
def test_wrong_pnm(copier: Path, tmp_path: Path, data: bytes, code: int, message: str) -> None:
    (tmp_path / "x.ppm").write_bytes(data)
    assert message in run(copier, tmp_path / "x.ppm", code=code)


@pytest.mark.parametrize(
    ("height", "width", "resize"),
    [(64, 80, 0), (100, 70, 0), (20, 30, 0), (300, 500, 36), (77, 333, 40), (32, 40, 32), (1, 200, 0), (200, 1, 0)],
)
def test_scaling_is_pillows_bilinear_and_centre_crop(
    copier: Path, tmp_path: Path, height: int, width: int, resize: int
) -> None:
    array = photo(height, width, rough=5)
    image = PIL.Image.fromarray(array)
    image.save(tmp_path / "x.png")
    scale = resize / min(height, width) if resize else max(32 / height, 40 / width)
    if min(int(height * scale + 0.5) - 32, int(width * scale + 0.5) - 40) < 0:
        assert "too small" in run(copier, tmp_path / "x.png", "--resize", resize, code=2)
        return
    scaled = (int(width * scale + 0.5), int(height * scale + 0.5))
    left, top = int((scaled[0] - 40) / 2 + 0.5), int((scaled[1] - 32) / 2 + 0.5)
    resized = image.resize(scaled, PIL.Image.Resampling.BILINEAR)
    wanted = np.asarray(resized.crop((left, top, left + 40, top + 32))).astype(float)
    options = ["--resize", resize] if resize else []
    np.testing.assert_allclose(pixels(copier, tmp_path / "x.png", *options), wanted, atol=1.01)


def test_mean_and_std_from_options_and_from_meta(copier: Path, tmp_path: Path) -> None:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    array = photo(32, 40)
    PIL.Image.fromarray(array).save(tmp_path / "x.png")
    wanted = ((array / 255 - mean) / std).transpose(2, 0, 1)[None]
    run(
        copier,
        tmp_path / "x.png",
        "--mean",
        "0.485,0.456,0.406",
        "--std",
        "0.229,0.224,0.225",
        "-o",
        tmp_path / "a.npy",
    )
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), wanted, atol=1e-5)
    meta = '{"other": {"mean": [9, 9, 9]}, "preprocess": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}'
    exe = build_copier(tmp_path, (1, 3, 32, 40), meta)
    run(exe, tmp_path / "x.png", "-o", tmp_path / "b.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), np.load(tmp_path / "a.npy"))
    run(exe, tmp_path / "x.png", "--mean", "0", "--std", "1", "-o", tmp_path / "c.npy")
    np.testing.assert_allclose(np.load(tmp_path / "c.npy") * 255, array.transpose(2, 0, 1)[None], atol=1e-3)


def test_grey_input_and_inputs_that_are_no_picture(small_exe: Path, tmp_path: Path) -> None:
    array = photo(28, 28)
    PIL.Image.fromarray(array).save(tmp_path / "x.png")
    exe = build_copier(tmp_path, (1, 1, 28, 28), "{}")
    run(exe, tmp_path / "x.png", "-o", tmp_path / "y.npy")
    np.testing.assert_allclose(np.load(tmp_path / "y.npy")[0, 0] * 255, array @ [0.299, 0.587, 0.114], atol=1e-3)
    assert "the model takes f32[12,32]; a picture fits" in run(small_exe, tmp_path / "x.png", code=2)


# --- hostile bytes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The readers under the address and undefined-behaviour sanitizers: a program that reads many files."""
    from cnnc.backends.host.toolchain import PROGRAM_SOURCES, RUNTIME

    folder = tmp_path_factory.mktemp("watched")
    (folder / "many.c").write_text(
        r"""
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "program.h"
int cnnc_rt_problem(int code, const char *format, ...) { (void)format; return code; }
int main(int count, char **paths) {
  static float x[3 * 32 * 40];
  static const int64_t dims[4] = {1, 3, 32, 40};
  const cnnc_rt_tensor tensor = {"x", 1, 4, dims, sizeof x};
  const cnnc_rt_preprocess how = {0, {0, 0, 0}, {1, 1, 1}};
  for (int i = 1; i < count; i++) {
    FILE *file = fopen(paths[i], "rb");
    unsigned char *data = malloc(1 << 20);
    cnnc_rt_blob blob = {malloc(1), 0};
    cnnc_rt_picture picture = {0, 0, NULL};
    blob.size = fread(data, 1, 1 << 20, file);
    fclose(file);
    blob.data = realloc(blob.data, blob.size + 1); /* exactly as large as the program makes it */
    memcpy(blob.data, data, blob.size);
    blob.data[blob.size] = 0;
    free(data);
    int code = cnnc_rt_npy_read("x", &blob, &tensor, x);
    if (code != 0) code = cnnc_rt_picture_read("x", &blob, &picture);
    if (code == 0 && picture.rgb != NULL) code = cnnc_rt_picture_fill("x", &picture, &tensor, &how, x);
    printf("%d\n", code);
    free(picture.rgb);
    free(blob.data);
  }
  return 0;
}
"""
    )
    sources = [RUNTIME / name for name in PROGRAM_SOURCES if name != "main.c"]
    flags = ["-std=c11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-I", RUNTIME]
    command = ["cc", *flags, folder / "many.c", *sources, "-lm", "-o", folder / "many"]
    subprocess.run([str(part) for part in command], check=True)
    return folder / "many"


def seeds(folder: Path) -> dict[str, bytes]:
    array = photo(11, 13, rough=20)
    image = PIL.Image.fromarray(array)
    made: dict[str, bytes] = {"npy": npy(np.zeros((1, 3, 32, 40), np.float32))}
    made["ppm"] = b"P6 13 11 255\n" + array.tobytes()
    kinds: list[tuple[str, PIL.Image.Image, dict[str, Any]]] = [
        ("a.png", image, {}),
        ("b.png", image.quantize(4), {"bits": 2}),
        ("c.jpg", image, {"quality": 80}),
        ("d.jpg", image, {"quality": 90, "progressive": True}),
        ("e.jpg", image, {"quality": 50, "subsampling": 2, "restart_marker_blocks": 1}),
    ]
    for name, each, options in kinds:
        each.save(folder / name, **options)
        made[name] = (folder / name).read_bytes()
    header = (13).to_bytes(4, "big") + (11).to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    rows = b"".join(b"\1" + row.tobytes() for row in array)
    made["f.png"] = raw_png(header, rows, zlib.Z_FIXED)
    return made


def fix_crcs(data: bytearray) -> None:
    """Make the checksums of a PNG right again, so that a change gets past them."""
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + length > len(data):
            return
        data[at + 8 + length : at + 12 + length] = zlib.crc32(data[at + 4 : at + 8 + length]).to_bytes(4, "big")
        at += 12 + length


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(len(changed)))
        kind = rng.integers(5)
        if kind == 0:
            changed[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[place] = int(rng.choice([0, 1, 127, 128, 255]))
        elif kind == 2:
            del changed[place : place + int(rng.integers(1, 9))]
        elif kind == 3:
            changed[place:place] = rng.bytes(int(rng.integers(1, 9)))
        else:
            del changed[max(place, 8) :]
        if not changed:
            return b""
    if changed[:4] == b"\x89PNG" and rng.integers(2):
        fix_crcs(changed)
    return bytes(changed)


def test_mutated_files_never_touch_foreign_memory(watched: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(20)
    codes: dict[str, int] = {}
    for name, data in seeds(tmp_path).items():
        paths = []
        for index in range(250):
            paths.append(tmp_path / f"{index}-{name}")
            paths[-1].write_bytes(data if index == 0 else mutate(data, rng))
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1"}
        done = subprocess.run(
            [str(watched), *map(str, paths)], capture_output=True, text=True, timeout=300, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answers = done.stdout.split()
        assert len(answers) == 250
        assert answers[0] == "0", name
        for answer in answers:
            codes[answer] = codes.get(answer, 0) + 1
    assert set(codes) <= {"0", "3", "4", "5"}, codes
    assert codes["3"] > 500
