"""Writers: the files say what was found, and are there whole or not at all."""

from __future__ import annotations

import csv
import gzip
import json
import resource
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from nsam.runtime import sinks, tiffs
from nsam.runtime.canvas import Strip
from nsam.runtime.errors import OutputError
from nsam.runtime.files import write_text
from nsam.runtime.measure import measure
from nsam.runtime.outlines import simplified_rings
from nsam.runtime.pictures import Density, write_heatmap
from nsam.runtime.region import Region
from nsam.runtime.settings import DONE_NAME, OUTPUTS, THUMBNAIL_NAME
from nsam.runtime.slides import ArraySlide
from nsam.runtime.tiles import Box
from nsam.runtime.writers import write_results

MPP = 0.5
WIDTH, HEIGHT = 700, 1100  # more than one tile of the label TIFF both ways


@pytest.fixture
def labels() -> NDArray[np.int32]:
    """Ellipses with ids in raster order of their first pixel; the last touches the corner."""
    image = np.zeros((HEIGHT, WIDTH), np.int32)
    shapes = [((100, 40), (20, 9)), ((505, 300), (12, 30)), ((300, 515), (8, 8)), ((699, 1099), (15, 15))]
    for i, (centre, axes) in enumerate(shapes, start=1):
        cv2.ellipse(image, centre, axes, 30, 0, 360, i, -1)
    return image


@pytest.fixture
def slide() -> ArraySlide:
    return ArraySlide(np.full((HEIGHT, WIDTH, 3), 240, np.uint8), Path("a.svs"), MPP)


def strips_of(labels: NDArray[np.int32], cuts: tuple[int, ...] = (513, 1024)) -> Iterator[Strip]:
    nuclei = measure(labels, *(np.full(labels.shape, v, np.float32) for v in (0.75, 0.5)), (0, 0), MPP)
    edges = (0, *cuts, len(labels))
    for y0, y1 in pairwise(edges):
        yield Strip(y0, labels[y0:y1], [n for n in nuclei if y0 <= n.first_yx[0] < y1])


def write(labels: NDArray[np.int32], slide: ArraySlide, folder: Path, *outputs: str) -> dict[str, Any]:
    return write_results(strips_of(labels), slide, MPP, folder, outputs or tuple(OUTPUTS))


def test_all_files_and_nothing_else(labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path) -> None:
    assert write(labels, slide, tmp_path / "new" / "a")["nuclei"] == 4
    assert {path.name for path in (tmp_path / "new" / "a").iterdir()} == {*OUTPUTS.values(), THUMBNAIL_NAME}


@pytest.mark.parametrize("output", OUTPUTS)
def test_any_output_alone(labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path, output: str) -> None:
    write(labels, slide, tmp_path, output)
    assert {path.name for path in tmp_path.iterdir()} == {OUTPUTS[output], THUMBNAIL_NAME}


def test_summary(labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path) -> None:
    areas = np.bincount(labels.ravel())[1:] * MPP**2
    found = write(labels, slide, tmp_path, "csv")["area_um2"]
    assert found["median"] == np.median(areas)
    edges = [*np.arange(0, 250, found["bin"]), np.inf]  # the last bin is open: one nucleus is larger
    assert areas.max() > 250
    assert found["histogram"] == np.histogram(areas, edges)[0].tolist()


def test_geojson(labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path) -> None:
    write(labels, slide, tmp_path, "geojson")
    data = json.loads((tmp_path / "nuclei.geojson").read_text(encoding="utf-8"))
    assert data["type"] == "FeatureCollection"
    assert len({feature["id"] for feature in data["features"]}) == 4
    nuclei = [nucleus for strip in strips_of(labels) for nucleus in strip.nuclei]
    for feature, nucleus in zip(data["features"], nuclei, strict=True):
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        np.testing.assert_array_equal(ring, simplified_rings(nucleus)[0])
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert properties["classification"] == {"name": "Nucleus"}
        assert properties["measurements"]["Nucleus id"] == nucleus.id
        assert properties["measurements"]["Area µm^2"] == pytest.approx(nucleus.area_px * MPP**2)
        assert properties["measurements"]["Haematoxylin OD mean"] == 0.5


def test_annotations_are_the_same_outlines(labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path) -> None:
    write(labels, slide, tmp_path, "geojson", "annotations")
    detections, annotations = (tmp_path / name for name in ("nuclei.geojson", "annotations.geojson"))
    assert '"objectType": "annotation"' in annotations.read_text()
    assert annotations.read_text().replace('"annotation"', '"detection"') == detections.read_text()


def test_gz_is_the_same_geojson(labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path) -> None:
    write(labels, slide, tmp_path, "geojson", "geojson.gz")
    packed = (tmp_path / "nuclei.geojson.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "nuclei.geojson").read_bytes()
    assert packed[4:8] == bytes(4)  # no time in it: a second run gives the same file


def test_parquet_is_the_same_table(
    labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(sinks, "_ROW_GROUP", 3)
    write(labels, slide, tmp_path, "csv", "parquet")
    with (tmp_path / "nuclei.csv").open(encoding="utf-8", newline="") as stream:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]
    assert parquet.read_table(tmp_path / "nuclei.parquet").to_pylist() == rows
    assert parquet.ParquetFile(tmp_path / "nuclei.parquet").num_row_groups == 2
    write(np.zeros_like(labels), slide, tmp_path, "parquet")
    assert parquet.read_table(tmp_path / "nuclei.parquet").shape == (0, len(rows[0]))


def test_parquet_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(OutputError, match=r"`--outputs parquet`: needs pyarrow.*nsam\[parquet\]"):
        sinks.check_parquet()


def test_geojson_counts_from_where_qupath_does(labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path) -> None:
    """QuPath leaves out what a scanner did not scan; tables and label images do not."""
    write(labels, slide, tmp_path / "all", "geojson", "csv")
    slide.origin_xy = (90, 30)
    write(labels, slide, tmp_path / "part", "geojson", "csv")
    assert (tmp_path / "all" / "nuclei.csv").read_bytes() == (tmp_path / "part" / "nuclei.csv").read_bytes()
    every, part = (
        [f["geometry"]["coordinates"][0] for f in json.loads((tmp_path / d / "nuclei.geojson").read_text())["features"]]
        for d in ("all", "part")
    )
    for ring, shifted in zip(every, part, strict=True):
        np.testing.assert_array_equal(np.array(ring) - (90, 30), shifted)


def test_geojson_without_nuclei(slide: ArraySlide, tmp_path: Path) -> None:
    assert write(np.zeros((HEIGHT, WIDTH), np.int32), slide, tmp_path, "geojson", "csv")["nuclei"] == 0
    data = json.loads((tmp_path / "nuclei.geojson").read_text())
    assert data == {"type": "FeatureCollection", "features": []}
    assert len((tmp_path / "nuclei.csv").read_text().splitlines()) == 1


def test_results_are_the_same_in_every_run(labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path) -> None:
    for folder in ("1", "2"):
        write(labels, slide, tmp_path / folder)
    for name in (*OUTPUTS.values(), THUMBNAIL_NAME):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_csv(labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path) -> None:
    write(labels, slide, tmp_path, "csv")
    with (tmp_path / "nuclei.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == ["1", "2", "3", "4"]
    first = rows[0]
    y, x = np.nonzero(labels == 1)
    assert float(first["x_px"]) == pytest.approx(x.mean() + 0.5, abs=1e-3)
    assert float(first["y_px"]) == pytest.approx(y.mean() + 0.5, abs=1e-3)
    assert float(first["x_um"]) == pytest.approx((x.mean() + 0.5) * MPP, abs=1e-3)
    assert float(first["area_um2"]) == pytest.approx(len(x) * MPP**2, abs=1e-3)
    assert float(first["major_um"]) == pytest.approx(41 * MPP, rel=0.03)
    assert float(first["minor_um"]) == pytest.approx(19 * MPP, rel=0.03)
    assert float(first["solidity"]) == pytest.approx(0.95, abs=0.03)
    assert (float(first["probability"]), float(first["haematoxylin_od"])) == (0.75, 0.5)


@pytest.mark.parametrize("cuts", [(), (1,), (512, 1024), (100, 101, 700, 1099)])
def test_label_tiff_whatever_the_strips(
    labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path, cuts: tuple[int, ...]
) -> None:
    write_results(strips_of(labels, cuts), slide, MPP, tmp_path, ("labels",))
    with tifffile.TiffFile(tmp_path / "labels.tif") as tif:
        page = tif.pages.first
        assert page.dtype == np.int32
        assert page.tile == (512, 512)
        assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert (page.resolutionunit, page.resolution) == (3, (20000, 20000))  # px per cm
        assert not tif.is_bigtiff
        np.testing.assert_array_equal(tif.asarray(), labels)


def test_a_large_label_tiff_is_a_bigtiff(
    labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiffs, "_CLASSIC_BYTES", WIDTH * HEIGHT * 4 - 1)
    write(labels, slide, tmp_path, "labels", "ometiff")
    for name in ("labels.tif", "labels.ome.tif"):
        with tifffile.TiffFile(tmp_path / name) as tif:
            assert tif.is_bigtiff
            np.testing.assert_array_equal(tif.asarray(), labels)


@pytest.mark.parametrize("shape", [(1100, 700), (512, 512), (3, 2100), (2049, 5)])
def test_ome_pyramid(tmp_path: Path, shape: tuple[int, int]) -> None:
    labels = np.random.default_rng(0).integers(0, 9, shape, np.int32)
    labels[0, 0] = 100_000  # more than 16 bits
    slide = ArraySlide(np.zeros((*shape, 3), np.uint8), Path("a <b> & µ.svs"), MPP)
    write_results([Strip(0, labels, [])], slide, MPP, tmp_path, ("ometiff",))
    with tifffile.TiffFile(tmp_path / "labels.ome.tif") as tif:
        (series,) = tif.series
        assert (tif.is_ome, series.axes, series.dtype) == (True, "YX", np.int32)
        assert max(series.levels[-1].shape) <= 512
        for i, level in enumerate(series.levels):
            # From the middle of the px that each stands for, where the image has it.
            rows, columns = (np.minimum(np.arange(0, side, 4**i) + 4**i // 2, side - 1) for side in shape)
            np.testing.assert_array_equal(level.asarray(), labels[np.ix_(rows, columns)])
            assert level.keyframe.tile == (512, 512)
            assert level.keyframe.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
            assert level.keyframe.resolution == (20000 / 4**i, 20000 / 4**i)
        pixels = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]["Pixels"]
    for axis in "XY":
        assert (pixels[f"PhysicalSize{axis}"], pixels[f"PhysicalSize{axis}Unit"]) == (MPP, "µm")


def test_heat_map_shows_where_nuclei_are(tmp_path: Path) -> None:
    """A crowd of 400 in a square of .2 mm at the upper left of 1 x .5 mm, and nothing elsewhere."""
    labels = np.zeros((1000, 2000), np.int32)
    y, x = np.mgrid[10:400:20, 10:400:20].reshape(2, -1)
    for dy in range(8):
        for dx in range(8):
            labels[y + dy, x + dx] = np.arange(1, 401)
    slide = ArraySlide(np.full((1000, 2000, 3), 240, np.uint8), Path("a"), MPP)
    found = write(labels, slide, tmp_path, "heatmap")
    assert found["peak_per_mm2"] == pytest.approx(400 / 0.2**2, rel=0.02)
    picture = np.asarray(Image.open(tmp_path / "density.png").convert("RGB")).astype(int)
    assert picture.shape[:2] == (600 + 60, 1200 + 150)
    yellow, violet = (253, 231, 37), (68, 1, 84)  # the ends of viridis
    assert np.abs(picture[60, 60] - yellow).max() < 12
    assert np.abs(picture[500, 1000] - violet).max() < 12
    thumbnail = np.asarray(Image.open(tmp_path / THUMBNAIL_NAME))
    assert thumbnail.shape == (2 * 210 + 8, 420, 3)  # a wide slide's panels lie one below the other
    assert np.ptp(thumbnail[:205].astype(int)) < 10
    assert thumbnail[230, 20, 2] < 160 < thumbnail[400, 400, 2]


def test_overlay_is_small_and_has_the_outlines(tmp_path: Path) -> None:
    image = np.full((1000, 4096, 3), 240, np.uint8)
    labels = np.zeros(image.shape[:2], np.int32)
    cv2.circle(labels, (2000, 500), 100, 1, -1)
    write_results(strips_of(labels), ArraySlide(image, Path("a"), MPP), MPP, tmp_path, ("overlay",))
    overlay = np.asarray(Image.open(tmp_path / "overlay.jpg")).astype(int)
    assert overlay.shape == (500, 2048, 3)
    y, x = np.nonzero(overlay[..., 0] < 120)
    radius = np.hypot(x + 0.5 - 1000.25, y + 0.5 - 250.25)
    assert radius.size > 200
    assert np.abs(radius - 50).max() < 2


def test_failure_leaves_earlier_results_and_no_parts(
    labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path
) -> None:
    write(labels, slide, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken() -> Iterator[Strip]:
        yield from list(strips_of(labels))[:2]
        raise RuntimeError("the network failed")

    with pytest.raises(RuntimeError, match="the network failed"):
        write_results(broken(), slide, MPP, tmp_path, tuple(OUTPUTS))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_results_half_moved_are_not_done(labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path) -> None:
    (tmp_path / DONE_NAME).touch()
    (tmp_path / "labels.tif" / "in the way").mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot be written"):
        write(labels, slide, tmp_path, "csv", "labels")
    assert not (tmp_path / DONE_NAME).exists()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("output", OUTPUTS)
def test_disk_full(labels: NDArray[np.int32], slide: ArraySlide, tmp_path: Path, output: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(OutputError, match="cannot be written") as caught:
            write(labels, slide, tmp_path, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_text_is_written_whole_or_not(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "µ")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "µ"
    with pytest.raises(OutputError, match="missing"):
        write_text(tmp_path / "missing" / "a.json", "")


@pytest.mark.parametrize("by", ["rectangle", "mask"])
def test_density_is_of_what_was_looked_at(tmp_path: Path, by: str) -> None:
    """10,000 nuclei a mm² everywhere, though only a part that cuts through cells of 50 µm is wanted."""
    y, x = np.mgrid[10:2000:20, 10:4000:20].reshape(2, -1)
    box, mask = Box(0, 0, 4000, 2000), np.zeros((200, 400), bool)
    mask[33:147, 51:298] = True
    if by == "rectangle":
        box, mask = Box(510, 330, 2980, 1470), np.ones((1, 1), bool)
    region = Region(mask, box, (4000, 2000), Box(0, 0, 4000, 2000))
    density = Density((4000, 2000), 0.5, region)
    for column, row in zip(x, y, strict=True):
        if region.holds(column, row):
            density.add(SimpleNamespace(centroid_xy=(column, row)))  # type: ignore[arg-type]
    found = density.per_mm2()
    wanted = region.shares(100, 20, 40)
    assert wanted.sum() * 100**2 == pytest.approx(region.area_px)
    np.testing.assert_allclose(found[wanted > 0], 10_000, rtol=0.15)
    assert density.peak == found[wanted > 0].max() < found.max(), "the highest lies where nobody looked"
    write_heatmap(tmp_path / "a.png", density)
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert (picture[10, 10] == 235).all()
    assert (picture[300, 600] != 235).any()
