"""Test-time augmentation turns maps back exactly, and is asked for by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from nsam.runtime.card import ModelCard
from nsam.runtime.cli import main
from nsam.runtime.engines import Engine, load
from nsam.runtime.tta import Averaged


class Brightness(Engine):
    """Map = brightness, so that a tile's every view gives the same maps once they are turned back."""

    card: Any = None
    precision, device = "fp32", "here"

    def __init__(self) -> None:
        self.seen: list[NDArray[np.uint8]] = []

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.seen.append(images)
        return images[..., :2].transpose(0, 3, 1, 2).astype(np.float32)


@pytest.mark.parametrize("views", [1, 2, 4, 8])
def test_views_differ_and_maps_come_back_as_they_were(views: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    engine = Brightness()
    maps = Averaged(engine, views).run(images)
    np.testing.assert_allclose(maps, engine.run(images), rtol=1e-6)
    assert maps.dtype == np.float32
    assert len({seen.tobytes() for seen in engine.seen}) == views
    assert all(seen.flags.c_contiguous for seen in engine.seen)


def test_another_number_is_refused() -> None:
    with pytest.raises(ValueError, match="1, 2, 4 or 8"):
        Averaged(Brightness(), 3)


def test_command(tmp_path: Path, tiny_model: Path, draw_discs: Any) -> None:
    Image.fromarray(draw_discs((96, 80), [(20, 20), (60, 40)], 9)).save(tmp_path / "a.png")
    for views in ("1", "8"):
        out = tmp_path / views
        options = ["--out", str(out), "--model", str(tiny_model), "--mpp", ".25", "--device", "cpu", "--tta", views]
        assert CliRunner().invoke(main, [str(tmp_path / "a.png"), *options]).exit_code == 0
        slide = json.loads((out / "a" / "slide.json").read_text())
        assert slide["nuclei"] == 2
        assert slide["made_with"]["tta"] == int(views)
    assert isinstance(load(tiny_model, "cpu", tta=4), Averaged)
    assert load(tiny_model, "cpu", tta=4).card == ModelCard.read(tiny_model)
