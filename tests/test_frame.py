"""How a slide is cut: the size of tile that suits it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from nsam.runtime.card import InputSpec, ModelCard
from nsam.runtime.cli import main
from nsam.runtime.engines import load
from nsam.runtime.errors import ModelError
from nsam.runtime.frame import Frame
from nsam.runtime.region import Region
from nsam.runtime.slides import ArraySlide

CARD = ModelCard("any", "1", "Apache-2.0", input=InputSpec(mpp=0.25))


def blank(width: int, height: int) -> ArraySlide:
    return ArraySlide(np.broadcast_to(np.uint8(255), (height, width, 3)), Path("image"), 0.25)


def frame_of(width: int, height: int, region: Region | None = None) -> Frame:
    return Frame.of(blank(width, height), CARD, 0.25, region)


@pytest.mark.parametrize(
    ("wh", "size"),
    [
        ((1, 1), 224),
        ((249, 249), 336),  # NuInsSeg at .35 µm/px: one tile of any size holds it
        ((353, 353), 448),
        ((512, 512), 560),  # TNBC: one tile of 560 px, or four of 448
        ((1000, 1000), 1008),
        ((860, 860), 896),
        ((731, 731), 784),
        ((2_100, 2_100), 1120),
        ((2_150, 2_150), 672),  # three of 1,120 px a side, or four of 672
        ((20_000, 15_000), 1120),
        ((60_000, 60_000), 1008),
        ((80_000, 15_000), 784),  # the maps of a row of larger ones would need more memory than is well spent
        ((140_000, 15_000), 448),
    ],
)
def test_size_that_suits(wh: tuple[int, int], size: int) -> None:
    assert frame_of(*wh).tile_px == size


def test_what_is_wanted_does_not_change_the_size() -> None:
    corner = Region.of(blank(5000, 5000), 0.25, tissue=False, roi=(2, 2, 200, 200))
    assert frame_of(5000, 5000, corner).tile_px == frame_of(5000, 5000).tile_px == 1120
    assert frame_of(5000, 5000, corner).tiles_wanted == 1


def test_another_scale_for_the_network(tiny_model: Path, tmp_path: Path, draw_discs: Any) -> None:
    """Nuclei are where they were, from a quarter of the pixels."""
    Image.fromarray(draw_discs((400, 300), [(100, 80), (260, 200)], 24)).save(tmp_path / "a.png")
    slides = {}
    for scale in ("", "0.25", "0.5"):
        out = tmp_path / f"out{scale}"
        options = ["--out", str(out), "--model", str(tiny_model), "--mpp", ".25", "--device", "cpu"]
        found = CliRunner().invoke(
            main, [str(tmp_path / "a.png"), *options, *(["--network-mpp", scale] if scale else [])]
        )
        assert found.exit_code == 0, found.stderr
        slides[scale] = json.loads((out / "a" / "slide.json").read_text())
        assert slides[scale]["nuclei"] == 2
    assert slides[""]["made_with"] == slides["0.25"]["made_with"] != slides["0.5"]["made_with"]
    assert 3 * slides["0.5"]["tiles"] < slides[""]["tiles"]
    assert load(tiny_model, "cpu", network_mpp=0.5).card.input.mpp == 0.5
    fine, coarse = (
        np.genfromtxt(tmp_path / f"out{s}" / "a" / "nuclei.csv", delimiter=",", names=True) for s in ("", "0.5")
    )
    for name in ("x_px", "y_px", "area_um2"):
        np.testing.assert_allclose(coarse[name], fine[name], rtol=0.05)
    with pytest.raises(ModelError, match=r"0.6 µm/px: too far from the 0.25 of this network; give it 0.125 to 0.5"):
        load(tiny_model, "cpu", network_mpp=0.6)


@pytest.mark.parametrize(
    ("batch", "size", "scaled"), [(4, 448, 4), (4, 672, 1), (16, 896, 4), (1, 1120, 1), (4, 224, 4)]
)
def test_batches_have_as_many_pixels(batch: int, size: int, scaled: int) -> None:
    assert CARD.input.scaled(batch, size) == scaled


@pytest.mark.parametrize("mpp", [0.17, 0.25, 0.5])
def test_bands_get_the_rows_of_tiles_that_fill_their_maps_and_no_others(mpp: float) -> None:
    card = replace(CARD, input=InputSpec(sizes=(224,), mpp=0.25))
    frame = Frame.of(blank(7, 2999), card, mpp, block_px=300)
    assert frame.halo == math.ceil(card.post.block_halo_um / mpp)
    spans = [frame.written(row) for row in frame.tiles]
    assert (spans[0][0], spans[-1][1]) == (0, frame.grid.map_wh[1])
    assert all(one[1] == other[0] for one, other in pairwise(spans))
    down = frame.grid.map_per_level0[1]
    for first in range(len(frame.bands)):
        for last in range(first + 1, len(frame.bands) + 1):
            top, bottom = frame.map_rows(first)[0], frame.map_rows(last - 1)[1]
            y0, y1 = frame.bands[first][0].read.y0, frame.bands[last - 1][0].read.y1
            assert top == max(0, math.floor((y0 + 0.5) * down - 0.5))
            assert bottom == min(frame.grid.map_wh[1], math.floor((y1 - 0.5) * down - 0.5) + 2)
            a, b = frame.tile_rows(first, last)
            assert spans[a][0] <= top < spans[a][1]
            assert spans[b - 1][0] < bottom <= spans[b - 1][1]


@pytest.mark.parametrize("mpp", [0.125, 0.25, 0.5])
def test_tiles_within_a_halo_of_what_is_wanted_are_wanted(mpp: float) -> None:
    card = replace(CARD, input=InputSpec(sizes=(224,), mpp=0.25))
    slide = blank(round(1000 / mpp), round(600 / mpp))
    x, y, w, h = (round(um / mpp) for um in (700, 300, 20, 40))
    frame = Frame.of(slide, card, mpp, Region.of(slide, mpp, tissue=False, roi=(x, y, w, h)))
    scale, halo = 0.25 / mpp, frame.halo
    wanted = [
        tile
        for row in frame.tiles
        for tile in row
        if tile.write.x0 * scale - halo < x + w
        and tile.write.x1 * scale + halo > x
        and tile.write.y0 * scale - halo < y + h
        and tile.write.y1 * scale + halo > y
    ]
    assert [tile for row in frame.tiles for tile in frame.wanted(row)] == wanted
    assert 0 < len(wanted) == frame.tiles_wanted < sum(map(len, frame.tiles)) / 4
