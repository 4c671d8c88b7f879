"""What several test files need: a tiny model that finds dark discs, images of discs, and real slides."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from nsam.runtime.card import SIZE_DIMENSION, FileEntry, InputSpec, ModelCard, PostSpec, sha256_of
from nsam.runtime.engines import available_cores

#: Grey of a disc and of what is around it; the tiny model's border lies half-way.
DARK, LIGHT = 60, 255

DrawDiscs = Callable[[tuple[int, int], Sequence[tuple[float, float]], float], NDArray[np.uint8]]


def pytest_xdist_auto_num_workers() -> int:
    """A process for each core of this container; each computes on one thread, or they would wait for one another."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return available_cores()


@pytest.fixture
def noise() -> NDArray[np.uint8]:
    """(150, 200, 3): no pixel is like its neighbour, so any that is not in its place shows."""
    return np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of development data, from NSAM_DATA or beside the checkout."""
    path = Path(os.environ.get("NSAM_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no real images: {path} is missing; set NSAM_DATA")
    return path


@pytest.fixture(scope="session")
def example() -> NDArray[np.uint8]:
    """(512, 512, 3) RGB, the tissue that nsam brings along, at .5 µm/px."""
    return np.asarray(Image.open(Path(__file__).resolve().parents[1] / "examples" / "ihc.png"))


@pytest.fixture(scope="session")
def draw_discs() -> DrawDiscs:
    """(width, height), centres (x, y), radius -> image of dark discs; pixel (0, 0) covers [0, 1) x [0, 1)."""

    def draw(size_wh: tuple[int, int], centres_xy: Sequence[tuple[float, float]], radius: float) -> NDArray[np.uint8]:
        y, x = np.mgrid[: size_wh[1], : size_wh[0]] + 0.5
        inside = np.zeros(x.shape, bool)
        for cx, cy in centres_xy:
            inside |= (x - cx) ** 2 + (y - cy) ** 2 <= radius**2
        return np.repeat(np.where(inside, DARK, LIGHT).astype(np.uint8)[..., None], 3, axis=2)

    return draw


@pytest.fixture(scope="session")
def disc_pairs(tmp_path_factory: pytest.TempPathFactory, draw_discs: Callable) -> Path:
    """A labelled folder pair of ten images of 64 x 64."""
    root = tmp_path_factory.mktemp("discs")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        centres = [(x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)) for x in (16, 48) for y in (16, 48)]
        picture = draw_discs((64, 64), centres, 9)
        shade = np.kron(rng.integers(0, 40, (8, 8, 1)), np.ones((8, 8, 3))).astype(np.uint8)  # no two images are alike
        Image.fromarray(np.where(picture == LIGHT, LIGHT - shade, picture)).save(root / "images" / f"{i}.png")
        labels = np.zeros((64, 64), np.uint16)
        for value, centre in enumerate(centres, 1):
            labels[draw_discs((64, 64), [centre], 9)[..., 0] < 128] = value
        tifffile.imwrite(root / "labels" / f"{i}.tif", labels)
    return root


@pytest.fixture(scope="session")
def small_data(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten real images, cut to 192 px, as a folder pair."""
    from nsam.train.data import find_samples, read_sample

    root = tmp_path_factory.mktemp("small")
    for name in ("images", "labels"):
        (root / name).mkdir()
    for i, sample in enumerate(find_samples(data_dir / "tnbc")[::5]):
        image, labels = read_sample(sample)
        tifffile.imwrite(root / "images" / f"{i}.tif", image[:192, :192], photometric="rgb")
        tifffile.imwrite(root / "labels" / f"{i}.tif", labels[:192, :192].astype(np.uint16))
    return root


@pytest.fixture(scope="session")
def lora_run(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on the base that a few steps from nothing made."""
    from nsam.train.cli import main

    root = tmp_path_factory.mktemp("runs")
    options = ["--crop", "64", "--batch", "2", "--workers", "0", "--fold", "0", "--precision", "fp32", "--mpp", "0.25"]
    base = ["--base", "none", "--tune", "full", "--steps", "60"]
    for out, more in ((root / "base", base), (root / "lora", ["--base", str(root / "base" / "fold0"), "--steps", "3"])):
        result = CliRunner().invoke(main, [str(small_data), "--out", str(out), *options, *more])
        assert result.exit_code == 0, result.output
    return root / "lora"


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[[Path, ModelCard], Path]:
    """Write a model directory with a real ONNX graph: darkness is both nucleus and distance."""
    return write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: 64 px tiles at 0.25 µm/px, so that small images already have seams."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"), TINY_CARD)


TINY_CARD = ModelCard(
    name="tiny",
    version="1",
    licence="Apache-2.0",
    input=InputSpec(sizes=(64,), mpp=0.25),
    post=PostSpec(tile_halo_px=8),
)


def write_tiny_model(folder: Path, card: ModelCard) -> Path:
    import onnx
    from onnx import TensorProto, helper

    several = len(card.input.sizes) > 1
    size, half = (SIZE_DIMENSION, None) if several else (card.input.size, card.input.size // 2)
    middle = (DARK + LIGHT) / 2
    constants = {"middle": middle, "slope": 0.2, "light": float(LIGHT), "range": float(LIGHT)}
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
            helper.make_node("ReduceMean", ["nchw"], ["grey"], axes=[1], keepdims=1),
            helper.make_node("AveragePool", ["grey"], ["small"], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Sub", ["middle", "small"], ["darker"]),
            helper.make_node("Mul", ["darker", "slope"], ["logit"]),
            helper.make_node("Sub", ["light", "small"], ["depth"]),
            helper.make_node("Div", ["depth", "range"], ["distance"]),
            helper.make_node("Concat", ["logit", "distance"], ["maps"], axis=1),
        ],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", size, size, 3])],
        [helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["N", 2, half, half])],
        [helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in constants.items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    helper.set_model_props(model, {"nsam_card": card.to_json()})
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    files = {"model.onnx": FileEntry(sha256_of(folder / "model.onnx"), "fp32")}
    (folder / "card.json").write_text(dataclasses.replace(card, files=files).to_json(), encoding="utf-8")
    return folder
