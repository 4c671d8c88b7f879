"""Slides: every kind of pixel becomes RGB, metadata are believed with care, tiles have no seams."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from nsam.runtime.errors import InputError
from nsam.runtime.readers import TiffSlide
from nsam.runtime.scales import openslide_mpp
from nsam.runtime.slides import ArraySlide, Slide, open_slide, read_input, read_overview
from nsam.runtime.tiles import Box, Grid

Pixels = NDArray[np.uint8]


def whole(path: Path) -> Pixels:
    with open_slide(path) as slide:
        return slide.read_region(0, 0, 0, *slide.size_wh).copy()


def test_region_of_a_tiled_pyramid(tmp_path: Path, noise: Pixels) -> None:
    path = write_pyramid(tmp_path / "a.ome.tif", noise, noise[::2, ::2])
    with open_slide(path) as slide:
        assert slide.level_whs == [(200, 150), (100, 75)]
        assert slide.level_downsamples == [1, 2]
        np.testing.assert_array_equal(slide.read_region(0, 30, 50, 101, 70), noise[50:120, 30:131])
        np.testing.assert_array_equal(slide.read_region(1, 60, 11, 40, 64), noise[::2, ::2][11:75, 60:])


def write_pyramid(path: Path, *levels: Pixels, mpp: float = 0.25) -> Path:
    size = {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
    with tifffile.TiffWriter(path, ome=True) as tif:
        tif.write(levels[0], tile=(64, 64), photometric="rgb", subifds=len(levels) - 1, metadata=size)
        for level in levels[1:]:
            tif.write(level, tile=(64, 64), photometric="rgb", subfiletype=1)
    return path


# Metadata


def tiff_with(**options: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        tifffile.imwrite(folder / "a.tif", np.zeros((8, 8, 3), np.uint8), photometric="rgb", **options)
        return folder / "a.tif"

    return write


def image_with(name: str, **options: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        Image.new("RGB", (8, 8)).save(folder / name, **options)
        return folder / name

    return write


def imagej_with(unit: str, dots: float) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        metadata = {"unit": unit, "axes": "YXS"}
        tifffile.imwrite(
            folder / "a.tif", np.zeros((8, 8, 3), np.uint8), imagej=True, resolution=(dots, dots), metadata=metadata
        )
        return folder / "a.tif"

    return write


def ome_with(**size: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "a.ome.tif"
        tifffile.imwrite(path, np.zeros((8, 8, 3), np.uint8), ome=True, photometric="rgb", metadata=size)
        return path

    return write


@pytest.mark.parametrize(
    ("write", "mpp"),
    [
        (tiff_with(resolution=(40000, 40000), resolutionunit="CENTIMETER"), 0.25),
        (tiff_with(resolution=(50800, 50800), resolutionunit="INCH"), 0.5),
        (ome_with(PhysicalSizeX=0.25, PhysicalSizeY=0.25), 0.25),
        (ome_with(PhysicalSizeX=500, PhysicalSizeXUnit="nm", PhysicalSizeY=500, PhysicalSizeYUnit="nm"), 0.5),
        (ome_with(PhysicalSizeX=0.5, PhysicalSizeXUnit="\u03bcm", PhysicalSizeY=0.5, PhysicalSizeYUnit="\u03bcm"), 0.5),
        (ome_with(PhysicalSizeX=5e-4, PhysicalSizeXUnit="mm", PhysicalSizeY=5e-4, PhysicalSizeYUnit="mm"), 0.5),
        (image_with("a.png", dpi=(101600, 101600)), 0.25),
        (imagej_with(r"\u00B5m", 4), 0.25),
        (imagej_with("micron", 2), 0.5),
        (imagej_with("mm", 4000), 0.25),
    ],
)
def test_mpp_from_metadata(tmp_path: Path, write: Callable[[Path], Path], mpp: float) -> None:
    with open_slide(write(tmp_path)) as slide:
        assert slide.mpp == pytest.approx(mpp, rel=1e-3)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (tiff_with(), "no mpp"),
        (tiff_with(resolution=(40000, 40000), resolutionunit="NONE"), "no mpp"),
        (imagej_with("pixel", 1), "no mpp"),
        (tiff_with(resolution=(72, 72), resolutionunit="INCH"), "no mpp"),  # a screen's
        (image_with("a.jpg", dpi=(300, 300)), "no mpp"),
        (image_with("a.png"), "no mpp"),
        (
            tiff_with(resolution=(40000, 20000), resolutionunit="CENTIMETER"),
            r"differs between x \(0.25\) and y",
        ),
        (tiff_with(resolution=(2000, 2000), resolutionunit="CENTIMETER"), "not from 0.1 to 2"),
        (ome_with(PhysicalSizeX=0.01, PhysicalSizeY=0.01), "not from 0.1 to 2"),
        (ome_with(PhysicalSizeX=1, PhysicalSizeXUnit="pixel", PhysicalSizeY=1), "no mpp"),
    ],
)
def test_no_mpp_and_why(tmp_path: Path, write: Callable[[Path], Path], reason: str) -> None:
    with open_slide(write(tmp_path)) as slide:
        assert slide.mpp is None
        assert re.search(reason, slide.mpp_source)


# Files that are no slides


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "tiled", "svs"])
def test_truncated(tmp_path: Path, request: pytest.FixtureRequest, noise: Pixels, kind: str, share: float) -> None:
    if kind in ("tif", "tiled"):
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, noise, photometric="rgb", tile=(64, 64) if kind == "tiled" else None)
    elif kind == "svs":
        path = tmp_path / "a.svs"
        data = request.getfixturevalue("data_dir")
        shutil.copyfile(data / "slides" / "CMU-1-Small-Region.svs", path)
    else:
        path = tmp_path / f"a.{kind}"
        Image.fromarray(noise).save(path)
    with pytest.raises(InputError, match=path.name) as caught:
        open_slide(cut(path, share))
    assert "\n" not in str(caught.value)


def test_tile_of_rubbish_fails_when_it_is_read(tmp_path: Path, noise: Pixels) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise, photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path) as tif:
        start, count = tif.pages.first.dataoffsets[5], tif.pages.first.databytecounts[5]
    content = bytearray(path.read_bytes())
    content[start : start + count] = bytes(count)
    path.write_bytes(content)
    with open_slide(path) as slide:
        slide.read_region(0, 0, 0, 64, 64)
        with pytest.raises(InputError, match="cannot be read"):
            slide.read_region(0, 0, 0, 200, 150)


@pytest.mark.parametrize("name", ["a.svs", "a.ndpi", "a.tif", "a.png", "a.txt"])
@pytest.mark.parametrize("content", [b"", b"these are words, and no slide"], ids=["empty", "text"])
def test_no_image(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        open_slide(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_folder_named_like_a_slide(tmp_path: Path) -> None:
    (tmp_path / "a.svs").mkdir()
    with pytest.raises(InputError, match="folder"):
        open_slide(tmp_path / "a.svs")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        open_slide(tmp_path / "a.svs")


def test_scanner_file_without_its_companions_is_no_jpeg(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.mrxs", "JPEG")
    with pytest.raises(InputError, match="OpenSlide finds no slide in it"):
        open_slide(tmp_path / "a.mrxs")


def test_stack_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 8, 8), np.uint8), photometric="minisblack")
    with pytest.raises(InputError, match="one plane"):
        open_slide(tmp_path / "a.tif")


def test_float_tiff_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8), np.float32))
    with pytest.raises(InputError, match="float32"):
        open_slide(tmp_path / "a.tif")


# Reading at the network's scale


def in_memory(image: Pixels) -> ArraySlide:
    return ArraySlide(image, Path("image"))


def read_whole(slide: Slide, grid: Grid) -> Pixels:
    return read_input(slide, Box(0, 0, *grid.input_wh), grid)


@pytest.mark.parametrize("input_mpp", [0.11, 0.25, 0.31, 0.5, 1.3])
def test_tiles_equal_the_whole(noise: Pixels, input_mpp: float) -> None:
    slide = in_memory(noise)
    grid = Grid.of(slide.size_wh, 0.25, input_mpp, stride=2)
    expected = np.pad(read_whole(slide, grid), ((9, 40), (9, 40), (0, 0)), mode="reflect").astype(int)
    width, height = grid.input_wh
    differences = []
    for y in range(-9, height + 40, 23):
        for x in range(-9, width + 40, 23):
            box = Box(x, y, min(x + 31, width + 40), min(y + 31, height + 40))
            part = expected[box.y0 + 9 : box.y1 + 9, box.x0 + 9 : box.x1 + 9]
            differences.append(np.abs(read_input(slide, box, grid) - part).ravel())
    # Pillow rounds twice, once along each axis: two levels is the utmost, and rare.
    counts = np.bincount(np.concatenate(differences))
    assert len(counts) <= 3
    assert counts[1:].sum() < 0.02 * counts.sum()
    assert counts[2:].sum() < 1e-5 * counts.sum()


def test_scale_one_is_exact_and_mirrored_beyond(noise: Pixels) -> None:
    grid = Grid.of((200, 150), 0.25, 0.25, stride=2)
    tile = read_input(in_memory(noise), Box(-300, -20, 500, 400), grid)
    np.testing.assert_array_equal(tile, np.pad(noise, ((20, 250), (300, 300), (0, 0)), mode="reflect"))


def test_box_wholly_beyond_the_slide(noise: Pixels) -> None:
    grid = Grid.of((200, 150), 0.25, 0.25, stride=2)
    tile = read_input(in_memory(noise), Box(210, 160, 220, 170), grid)
    np.testing.assert_array_equal(tile, np.pad(noise, ((0, 20), (0, 20), (0, 0)), mode="reflect")[160:, 210:])


def test_slide_of_one_pixel() -> None:
    grid = Grid.of((1, 1), 0.25, 0.25, stride=2)
    tile = read_input(in_memory(np.full((1, 1, 3), 7, np.uint8)), Box(0, 0, 64, 64), grid)
    assert tile.shape == (64, 64, 3)
    assert (tile == 7).all()


def test_positions_survive_a_change_of_scale() -> None:
    """A step at level-0 column 90 of 200 lies at 90/200 of the width at each scale."""
    image = np.zeros((40, 200, 3), np.uint8)
    image[:, 90:] = 255
    for input_mpp in (0.1, 0.25, 0.6, 1.0):
        grid = Grid.of((200, 40), 0.25, input_mpp, stride=2)
        row = read_whole(in_memory(image), grid)[0, :, 0]
        assert (255 - row.astype(float)).sum() / 255 == pytest.approx(90 / 200 * len(row), abs=0.02)


@pytest.mark.parametrize(("input_mpp", "level"), [(0.25, 0), (0.49, 0), (0.5, 1), (0.9, 1), (1.0, 2), (3.0, 2)])
def test_coarsest_level_that_is_fine_enough(tmp_path: Path, input_mpp: float, level: int) -> None:
    levels = [np.full((256 >> i, 256 >> i, 3), 50 * i, np.uint8) for i in range(3)]
    with open_slide(write_pyramid(tmp_path / "a.ome.tif", *levels)) as slide:
        tile = read_whole(slide, Grid.of(slide.size_wh, 0.25, input_mpp, stride=2))
    assert (tile == 50 * level).all()


def test_level_of_an_odd_size_still_serves(tmp_path: Path) -> None:
    """Levels are rounded: 255 px over 127 is a downsample of 2.008, meant to be 2."""
    levels = [np.full((255, 255, 3), 0, np.uint8), np.full((127, 127, 3), 50, np.uint8)]
    with open_slide(write_pyramid(tmp_path / "a.ome.tif", *levels)) as slide:
        tile = read_whole(slide, Grid((255, 255), (127, 128), stride=2))
    assert (tile == 50).all()


def test_overview_in_steps_equals_one_resize() -> None:
    image = np.random.default_rng(1).integers(0, 256, (9000, 500, 3), dtype=np.uint8)
    overview = read_overview(in_memory(image), 2250)
    expected = np.asarray(Image.fromarray(image).resize((125, 2250), Image.Resampling.BILINEAR))
    assert np.abs(overview.astype(int) - expected).max() <= 1


def test_a_slide_without_pyramid_is_read_once_for_all_overviews(monkeypatch: pytest.MonkeyPatch) -> None:
    slide = in_memory(np.random.default_rng(1).integers(0, 256, (4000, 500, 3), dtype=np.uint8))
    large = read_overview(slide, 2048)
    monkeypatch.setattr(slide, "read_region", None)
    assert read_overview(slide, 2048) is large
    small = read_overview(slide, 256)
    np.testing.assert_allclose(small, large.reshape(256, 8, 32, 8, 3).mean((1, 3)), atol=1)
    assert read_overview(in_memory(np.zeros((4000, 500, 3), np.uint8)), 256).max() == 0  # another slide is another


def test_overview_never_enlarges(noise: Pixels) -> None:
    np.testing.assert_array_equal(read_overview(in_memory(noise), 2048), noise)


# Real slides


def test_aperio(data_dir: Path) -> None:
    path = data_dir / "slides" / "CMU-1-Small-Region.svs"
    with open_slide(path) as slide:
        assert slide.size_wh == (2220, 2967)
        assert slide.mpp == pytest.approx(0.499)
        region = slide.read_region(0, 1000, 1000, 300, 200)
    np.testing.assert_array_equal(region, tifffile.imread(path)[1000:1200, 1000:1300])


def test_aperio_without_mpp(data_dir: Path) -> None:
    with open_slide(data_dir / "slides" / "TCGA-CR-7395-01A-01-TS1.svs") as slide:
        assert (slide.mpp, slide.mpp_source) == (None, "no mpp in its metadata")


def test_lower_level_is_in_place(data_dir: Path) -> None:
    path = data_dir / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    with open_slide(path) as slide:
        region = slide.read_region(1, 1000, 900, 300, 200).astype(float)
    with tifffile.TiffFile(path) as tif:
        level = tif.series[0].levels[1].asarray()
    apart = {
        (dx, dy): np.abs(region - level[900 + dy : 1100 + dy, 1000 + dx : 1300 + dx]).mean()
        for dx in (-1, 0, 1)
        for dy in (-1, 0, 1)
    }
    assert min(apart, key=lambda shift: apart[shift]) == (0, 0)


@pytest.mark.parametrize(("name", "scale"), [("TCGA-CR-7395-01A-01-TS1.svs", 2.0), ("instanseg_HE_example.tif", 1.9)])
def test_tiles_of_a_real_slide_equal_the_whole(data_dir: Path, name: str, scale: float) -> None:
    """OpenSlide blurs a lower level by another fraction of a pixel for each start; that must not show."""
    with open_slide(data_dir / "slides" / name) as slide:
        grid = Grid.of(slide.size_wh, 0.25, 0.25 * scale, stride=2)
        area = Box(101, 203, 701, 703)
        expected = read_input(slide, area, grid).astype(int)
        for x, y in [(101, 203), (333, 350), (500, 502)]:
            tile = read_input(slide, Box(x, y, x + 200, y + 200), grid)
            part = expected[y - area.y0 : y - area.y0 + 200, x - area.x0 : x - area.x0 + 200]
            assert np.abs(tile - part).max() <= 1


def test_ome_tiff_with_jpeg_tiles(data_dir: Path) -> None:
    path = data_dir / "slides" / "instanseg_HE_example.tif"
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5, abs=0.01)
        np.testing.assert_array_equal(whole(path), tifffile.imread(path))


def test_a_scale_that_is_no_number_costs_no_slide(tmp_path: Path, noise: Pixels) -> None:
    tifffile.imwrite(tmp_path / "a.ome.tif", noise, photometric="rgb", metadata={"axes": "YXS", "PhysicalSizeX": 0.25})
    content = (tmp_path / "a.ome.tif").read_bytes()
    assert b'PhysicalSizeX="0.25"' in content
    (tmp_path / "a.ome.tif").write_bytes(content.replace(b'PhysicalSizeX="0.25"', b'PhysicalSizeX="0,25"'))
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert slide.mpp is None
        assert "give no scale" in slide.mpp_source


@pytest.mark.parametrize(("tile", "kept"), [(256, 64), (1024, 63), (4096, 4)])
def test_decoded_pieces_are_bounded_and_go_with_the_slide(tmp_path: Path, noise: Pixels, tile: int, kept: int) -> None:
    """By their bytes: 64 pieces of 4096 px would be 3 GB. Of twelve slides that were closed they had 1.7 GB."""
    tifffile.imwrite(tmp_path / "a.tif", noise, photometric="rgb", tile=(tile, tile))
    with open_slide(tmp_path / "a.tif") as slide:
        assert isinstance(slide, TiffSlide)
        slide.read_region(0, 0, 0, 50, 50)
        assert slide._piece.cache_info()[2:] == (kept, 1)
    assert slide._piece.cache_info().currsize == 0


@pytest.mark.parametrize(
    ("properties", "mpp", "source"),
    [
        ({"mpp-x": "0.2520", "mpp-y": "0.2522", "objective-power": "20"}, 0.2521, "its metadata"),
        ({"objective-power": "40"}, 0.25, "assumed from its objective's power of 40"),
        ({"objective-power": "20", "mpp-x": "0.25"}, 0.5, "assumed from its objective's power of 20"),
        ({"objective-power": "0"}, None, "no mpp in its metadata"),
        ({"mpp-x": "0.25", "mpp-y": "0.5"}, None, "differs between x"),
        ({"mpp-x": "0,25", "mpp-y": "0,25"}, None, "give no scale"),
        ({"objective-power": "40x"}, None, "give no scale"),
        ({"objective-power": "2"}, None, "is not from 0.1 to 2"),
    ],
)
def test_mpp_that_a_scanner_says(properties: dict[str, str], mpp: float | None, source: str) -> None:
    found, told = openslide_mpp({f"openslide.{name}": value for name, value in properties.items()})
    assert found == (None if mpp is None else pytest.approx(mpp))
    assert source in told
