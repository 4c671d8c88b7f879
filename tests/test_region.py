"""Where nuclei are looked for: no nucleus of real tissue is lost, glass and pen give none, masks are obeyed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

import nsam.runtime
from nsam.runtime.cli import main
from nsam.runtime.errors import InputError
from nsam.runtime.pictures import _outlined
from nsam.runtime.region import Region, read_mask
from nsam.runtime.slides import ArraySlide, open_slide, read_overview
from nsam.runtime.tiles import Box
from nsam.runtime.tissue import find_tissue
from nsam.train.data import find_samples, read_sample

PENS = {"blue": (30, 60, 160), "green": (20, 130, 70), "red": (215, 25, 35), "black": (20, 20, 22)}


@pytest.fixture
def infer(tiny_model: Path, tmp_path: Path) -> Callable[..., Result]:
    def run(*arguments: object, out: str = "out") -> Result:
        common = ["--out", str(tmp_path / out), "--model", str(tiny_model), "--device", "cpu", "--outputs", "csv"]
        return CliRunner().invoke(main, [*common, *map(str, arguments)], catch_exceptions=False)

    return run


@pytest.fixture
def png(tmp_path: Path, draw_discs: Any) -> Path:
    """Eight discs of 5 µm in two rows, 1000 x 500 px at .25 µm/px."""
    path = tmp_path / "a.png"
    Image.fromarray(draw_discs((1000, 500), [(x, y) for y in (100, 400) for x in (100, 350, 650, 900)], 20)).save(path)
    return path


def centres(out: Path, name: str = "a") -> set[tuple[int, int]]:
    with (out / name / "nuclei.csv").open(encoding="utf-8", newline="") as stream:
        return {(round(float(row["x_px"])), round(float(row["y_px"]))) for row in csv.DictReader(stream)}


# Tissue


def test_no_nucleus_of_real_tissue_is_left_out(data_dir: Path) -> None:
    seen = 0
    for source, every in (("nuinsseg", 13), ("tnbc", 2), ("dsb2018_he", 4)):
        for sample in find_samples(data_dir / source)[::every]:
            image, labels = read_sample(sample)
            region = Region.of(ArraySlide(image, sample.image), sample.mpp)
            for y, x in ndimage.center_of_mass(labels > 0, labels, np.unique(labels)[1:]):
                assert region.holds(x + 0.5, y + 0.5), sample.name
                seen += 1
    assert seen > 3000


def test_glass_is_no_tissue() -> None:
    rng = np.random.default_rng(0)
    for white in ((255, 255, 255), (243, 240, 246), (224, 222, 226)):
        glass = np.clip(rng.normal(white, 0.7, (300, 200, 3)), 0, 255).astype(np.uint8)
        assert not find_tissue(glass, 4).any()


@pytest.mark.parametrize("colour", PENS.values(), ids=PENS)
def test_pen_is_no_tissue(data_dir: Path, colour: tuple[int, int, int]) -> None:
    with open_slide(data_dir / "slides" / "CMU-1-Small-Region.svs") as slide:
        overview = read_overview(slide, round(max(slide.size_wh) * 0.499 / 4))
    before = find_tissue(overview, 4)
    marked, stroke = overview.copy(), np.zeros(overview.shape[:2], np.uint8)
    cv2.line(stroke, (30, 60), (250, 360), 1, 60)  # .24 mm wide, over glass and tissue
    ink = stroke > 0
    marked[ink] = np.minimum(marked[ink], colour)
    found = find_tissue(marked, 4)
    # Where ink covers tissue the colours mix, and rather nuclei are looked for in ink than lost.
    assert found[ink & ~before].mean() < 0.01
    away = cv2.dilate(stroke, np.ones((25, 25), np.uint8)) == 0
    assert found[away][before[away]].mean() > 0.999


def test_masked_results_are_those_of_all_the_slide_inside_the_mask(data_dir: Path) -> None:
    """Skipped tiles change nothing in the region: the same nuclei, to the last digit, as without a mask."""
    engine = nsam.runtime.load(device="cpu", threads=2)
    with open_slide(data_dir / "slides" / "CMU-1-Small-Region.svs") as slide:
        width, height = 1400, 1100
        image = slide.read_region(0, 0, 300, width, height).copy()
    part = ArraySlide(image, Path("part"))
    region = Region.of(part, 0.499)
    assert 0.2 < region.mask.mean() < 0.8

    def found(region: Region | None) -> list[tuple[Any, ...]]:
        strips = nsam.runtime.segment_slide(part, engine, 0.499, region=region, batch=1)
        return [n[1:-2] for strip in strips for n in strip.nuclei if inside(n.centroid_xy)]

    def inside(xy: tuple[float, float]) -> bool:
        return region.holds(*xy)

    masked = found(region)
    assert len(masked) > 100
    assert masked == found(None)


# What the user says


def test_roi(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    assert infer(png, "--mpp", 0.25, "--roi", 200, 0, 500, 300).exit_code == 0
    assert centres(tmp_path / "out") == {(350, 100), (650, 100)}
    done = json.loads((tmp_path / "out" / "a" / "slide.json").read_text())
    assert done["region_mm2"] < 500 * 300 * 0.25**2 / 1e6
    assert done["tiles_skipped"] > done["tiles"] / 3
    outside = infer(png, "--mpp", 0.25, "--roi", 2000, 0, 5, 5, out="other")
    assert "lies outside the slide of 1000 x 500 px" in outside.stderr


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16", "painted LA", "painted RGBA"])
def test_masks_of_the_users(infer: Callable[..., Result], png: Path, tmp_path: Path, mode: str) -> None:
    (tmp_path / "masks").mkdir()
    mask = np.zeros((25, 50), np.uint8)
    mask[15:, 25:] = 255
    if mode.startswith("painted"):  # white, and transparent where it was rubbed out
        image = Image.new("L", (50, 25), 255).convert(mode.split()[1])
        image.putalpha(Image.fromarray(mask))
    else:
        image = Image.fromarray(mask.astype(np.uint16) * 9) if mode == "I;16" else Image.fromarray(mask).convert(mode)
    image.save(tmp_path / "masks" / "a.png")
    assert infer(png, "--mpp", 0.25, "--mask-dir", tmp_path / "masks").exit_code == 0
    assert centres(tmp_path / "out") == {(650, 400), (900, 400)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "masks/a.png`: is missing, the mask of `"),
        (b"no image", "the mask cannot be read ("),
        (np.ones((50, 50), np.uint8), "a mask of 50 x 50 px does not fit a slide of 1000 x 500"),
    ],
)
def test_a_bad_mask_costs_its_slide_only(
    infer: Callable[..., Result],
    png: Path,
    tmp_path: Path,
    content: bytes | NDArray[np.uint8] | None,
    reason: str,
) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    (tmp_path / "b.png").write_bytes(png.read_bytes())
    Image.new("L", (10, 5), 255).save(masks / "b.png")
    if isinstance(content, bytes):
        (masks / "a.png").write_bytes(content)
    elif content is not None:
        Image.fromarray(content).save(masks / "a.png")
    result = infer(png, tmp_path / "b.png", "--mpp", 0.25, "--mask-dir", masks)
    assert result.exit_code == 1
    assert reason in result.stderr
    assert ",mask," in (tmp_path / "out" / "failed.csv").read_text(encoding="utf-8")
    assert len(centres(tmp_path / "out", "b")) == 8


def test_another_mask_is_another_run(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    Image.new("L", (10, 5), 255).save(tmp_path / "masks" / "a.png")
    arguments = (png, "--mpp", 0.25, "--mask-dir", tmp_path / "masks")
    assert "1 slides done" in infer(*arguments).output
    assert "1 skipped" in infer(*arguments).output
    Image.new("L", (10, 5), 0).save(tmp_path / "masks" / "a.png")
    assert "pass --overwrite" in infer(*arguments).output
    assert "0 nuclei" in infer(*arguments, "--overwrite").output


def test_a_region_knows_its_area() -> None:
    mask = np.zeros((2, 4), bool)
    mask[1, 1:] = True
    region = Region(mask, Box(150, 20, 380, 180), (400, 200), Box(0, 0, 400, 200))
    assert region.area_px == (380 - 150) * (180 - 100)
    assert [region.meets(Box(0, 0, 160, y)) for y in (100, 101)] == [False, True]
    assert [region.holds(*xy) for xy in ((150, 100), (149.9, 100), (150, 99.9))] == [True, False, False]


@pytest.mark.parametrize("scanned", [(1000, 2000), (900, 1100)])
def test_a_mask_of_the_scanned_part_lies_on_it(tmp_path: Path, scanned: tuple[int, int]) -> None:
    """QuPath shows that part of a MIRAX canvas alone; masks made in it have its shape, or even the canvas's."""
    slide = ArraySlide(np.full((4000, 2000, 3), 230, np.uint8), Path("m.mrxs"), 0.25)
    slide.origin_xy, slide.scanned_wh = (500, 1000), scanned
    width, height = scanned[0] // 10, scanned[1] // 10
    drawn = np.zeros((height, width), np.uint8)
    drawn[: height // 10, : width // 10] = 255
    Image.fromarray(drawn).save(tmp_path / "m.png")
    region = Region.of(slide, 0.25, mask=tmp_path / "m.png")
    assert [region.holds(*xy) for xy in ((501, 1001), (499, 1001), (100, 100), (500 + scanned[0] / 9, 1001))] == [
        True,
        False,
        False,
        False,
    ]
    assert region.area_px == (height // 10) * (width // 10) * 100
    assert region.meets(Box(0, 0, 510, 1010))
    assert not region.meets(Box(0, 0, 500, 4000))
    assert region.shares(500, 8, 4).sum() == pytest.approx(region.area_px / 500**2)
    assert region.shares(500, 8, 4)[2, 1] > 0
    thumbnail = _outlined(np.zeros((400, 200, 3), np.uint8), region)
    assert np.argwhere(thumbnail.any(axis=2)).min(axis=0).tolist() == [100, 50]
    Image.new("L", (50, 100), 255).save(tmp_path / "whole.png")  # of the canvas, if the scanned part is not alike
    alike = scanned == (1000, 2000)
    assert Region.of(slide, 0.25, mask=tmp_path / "whole.png").area_px == (2e6 if alike else 8e6)
    slide.scanned_wh = (1015, 2000)  # nearly alike
    assert Region.of(slide, 0.25, mask=tmp_path / "whole.png").area_px == 8e6
    slide.scanned_wh = scanned
    with pytest.raises(InputError, match="lies outside the scanned part"):
        Region.of(slide, 0.25, mask=tmp_path / "m.png", roi=(0, 0, 100, 100))
    Image.new("L", (150, 100)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=rf"fit a slide of 2000 x 4000 nor a scanned part of {scanned[0]} x"):
        Region.of(slide, 0.25, mask=tmp_path / "m.png")


# A table


def test_a_table_of_slides(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    Image.new("L", (10, 5), 0).save(folder / "none.png")
    (tmp_path / "b.png").write_bytes(png.read_bytes())
    (folder / "slides.csv").write_text(
        "\ufeffpath,mask,mpp\n../a.png,,0.5\n../b.png,none.png,\n../missing.png,,\n", encoding="utf-8"
    )
    result = infer(folder / "slides.csv", "--mpp", 0.25)
    assert result.exit_code == 1
    assert "missing.png`: cannot be read (No such file or directory)" in result.stderr
    done = json.loads((tmp_path / "out" / "a" / "slide.json").read_text())
    assert (done["mpp"], done["mpp_source"]) == (0.5, "the table")
    assert centres(tmp_path / "out", "b") == set()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,mpp\na.png,1\n", "line 2: no `path`"),
        ("path,mpp\na.png,0.25\nb.png,25\n", "line 3: `mpp` must be from 0.1 to 2 µm/px, is `25`"),
        ("path,mpp\na.png,big\n", "line 2: `mpp` must be"),
        ("path\n", "no slide or image in it"),
        ("path\n\xff", "the table cannot be read"),
    ],
)
def test_a_wrong_table_is_refused(infer: Callable[..., Result], tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "slides.csv").write_bytes(text.encode("latin-1" if "\xff" in text else "utf-8"))
    result = infer(tmp_path / "slides.csv")
    assert result.exit_code == 2
    assert reason in result.stderr


# Before the work


def test_dry_run_tells_and_writes_nothing(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"")
    result = infer(png, tmp_path / "b.png", "--mpp", 0.25, "--roi", 0, 0, 500, 500, "--dry-run")
    assert result.exit_code == 1
    assert "a.png: 1000 x 500 px, 0.25 µm/px (--mpp), level 0, " in result.stdout
    assert "would fail (open)" in result.stderr
    assert "1 slides, 1 would fail" in result.stdout
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_the_disk_of_what_is_asked_for(
    infer: Callable[..., Result], data_dir: Path, tmp_path: Path
) -> None:
    slide = data_dir / "slides" / "hgsc_nest.jpg"
    told = {
        outputs: float(
            re.findall(r"and (\d+) MB", infer(slide, "--mpp", 0.5, "--dry-run", "--outputs", outputs).stdout)[-1]
        )
        for outputs in ("csv", "csv,geojson", "csv,geojson,overlay")
    }
    assert told["csv"] < told["csv,geojson"] < told["csv,geojson,overlay"] < 5


def test_dim_colours_of_a_mask_are_painted(tmp_path: Path) -> None:
    """Not black where nuclei are wanted: a dark blue class, too."""
    for mode, colour in (("RGB", (0, 0, 90)), ("L", 1), ("RGBA", (0, 60, 0, 255))):
        image = Image.new(mode, (4, 2))
        image.putpixel((3, 1), colour)
        image.save(tmp_path / "m.png")
        assert np.argwhere(read_mask(tmp_path / "m.png")).tolist() == [[1, 3]], mode
    image = Image.new("P", (4, 2), 1)
    image.putpalette([255, 255, 255, 0, 0, 0])  # 1 is black, and 0 is not
    image.putpixel((3, 1), 0)
    image.save(tmp_path / "m.png")
    assert np.argwhere(read_mask(tmp_path / "m.png")).tolist() == [[1, 3]]


def test_a_roi_that_begins_outside_is_cut_to_the_slide() -> None:
    slide = ArraySlide(np.full((200, 400, 3), 255, np.uint8), Path("a"), 0.25)
    region = Region.of(slide, 0.25, tissue=False, roi=(-50, 150, 100, 100))
    assert region.box == Box(0, 150, 50, 200)
    assert region.area_px == 50 * 50
    for roi in ((-50, 0, 50, 10), (0, 200, 10, 10), (0, 0, 0, 10)):
        with pytest.raises(InputError, match="lies outside the slide"):
            Region.of(slide, 0.25, tissue=False, roi=roi)


def test_a_mask_and_a_roi_are_both_obeyed(tmp_path: Path) -> None:
    Image.new("L", (40, 20), 255).save(tmp_path / "m.png")
    slide = ArraySlide(np.full((200, 400, 3), 255, np.uint8), Path("a"), 0.25)
    region = Region.of(slide, 0.25, mask=tmp_path / "m.png", roi=(100, 50, 30, 20))
    assert region.area_px == 600
    places = ((100, 50), (129.9, 69.9), (130, 60), (110, 70), (99, 60))
    assert [region.holds(*xy) for xy in places] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("wh", "fits"),
    [((40, 20), True), ((40, 21), True), ((400, 204), True), ((400, 210), False), ((3, 3), True), ((30, 20), False)],
)
def test_a_mask_s_shape_may_be_rounded_and_not_another(tmp_path: Path, wh: tuple[int, int], fits: bool) -> None:
    Image.new("L", wh, 255).save(tmp_path / "m.png")
    slide = ArraySlide(np.full((200, 400, 3), 255, np.uint8), Path("a"), 0.25)
    if fits:
        assert Region.of(slide, 0.25, mask=tmp_path / "m.png").area_px == 200 * 400
    else:
        with pytest.raises(InputError, match="does not fit a slide of 400 x 200"):
            Region.of(slide, 0.25, mask=tmp_path / "m.png")


def test_tissue_is_looked_for_at_its_scale_on_any_slide() -> None:
    """A dark spot on glass is tissue, and 32 µm around it; so is all of an image that is smaller than .1 mm."""
    for mpp in (0.25, 1.0):
        side = round(1000 / mpp)
        image = np.full((side, side, 3), 240, np.uint8)
        at = round(500 / mpp)
        image[at : at + round(40 / mpp), at : at + round(40 / mpp)] = (150, 80, 150)
        region = Region.of(ArraySlide(image, Path("a"), mpp), mpp)
        assert region.area_px * mpp**2 == pytest.approx(104**2, rel=0.25)
        assert region.holds(520 / mpp, 520 / mpp)
        assert region.holds(480 / mpp, 520 / mpp)
        assert not region.holds(440 / mpp, 520 / mpp)
    for side, whole in ((399, True), (401, False)):
        slide = ArraySlide(np.full((side, side, 3), 240, np.uint8), Path("a"), 0.25)
        assert Region.of(slide, 0.25).area_px == (side**2 if whole else 0)


def test_a_block_meets_what_any_part_of_a_mask_s_pixel_covers() -> None:
    """Three mask px over ten: borders at 3.3 and 6.7."""
    mask = np.zeros((3, 3), bool)
    mask[1, 1] = True
    whole = Box(0, 0, 10, 10)
    region = Region(mask, whole, (10, 10), whole)
    for low, high, met in ((0, 3, False), (0, 4, True), (6, 7, True), (7, 10, False)):
        assert region.meets(Box(low, 4, high, 6)) == met
        assert region.meets(Box(4, low, 6, high)) == met
    assert not region.meets(Box(4, 4, 4, 6))
    inside = [(x, y) for x in range(10) for y in range(10) if region.holds(x + 0.5, y + 0.5)]
    assert inside == [(x, y) for x in (3, 4, 5, 6) for y in (3, 4, 5, 6)]
    assert not region.holds(10, 5)
