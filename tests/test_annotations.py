"""Outlines from QuPath become the label map that was drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nsam.runtime.cli import main as infer_main
from nsam.runtime.errors import InputError
from nsam.train.annotations import read_annotations
from nsam.train.data import find_samples, read_sample


def feature(*rings: list[tuple[float, float]], kind: str = "Polygon") -> dict[str, Any]:
    coordinates = [[*ring, ring[0]] for ring in rings]
    return {
        "type": "Feature",
        "geometry": {
            "type": kind,
            "coordinates": coordinates if kind == "Polygon" else [[ring] for ring in coordinates],
        },
        "properties": {"objectType": "annotation"},
    }


def square(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_pixels_are_those_whose_centre_is_inside(tmp_path: Path) -> None:
    features = [
        feature(square(2, 3, 6, 8)),
        feature(square(5, 3, 9, 8)),  # overlaps the first, which keeps its pixels
        feature(square(10, 0, 16, 6), square(12, 2, 14, 4)),  # with a hole
        feature(square(0, 10, 2, 12), square(4, 10, 6, 12), kind="MultiPolygon"),
        feature(square(15, 15, 99, 99)),  # beyond the image
        feature(square(-9, -9, -4, -4), square(0, 16, 3, 19), kind="MultiPolygon"),  # a part of it
    ]
    wanted = np.zeros((20, 18), np.int32)
    wanted[3:8, 2:6] = 1
    wanted[3:8, 6:9] = 2
    wanted[0:6, 10:16] = 3
    wanted[2:4, 12:14] = 0
    wanted[10:12, 0:2] = wanted[10:12, 4:6] = 4
    wanted[15:, 15:] = 5
    wanted[16:19, :3] = 6
    for content in ({"type": "FeatureCollection", "features": features}, features):
        found = read_annotations(write(tmp_path / "a.geojson", content), (18, 20))
        np.testing.assert_array_equal(found, wanted)
    assert read_annotations(write(tmp_path / "a.geojson", features[0]), (18, 20)).max() == 1


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", "[" * 100_000, '{"type": "Feature"}', '[{"geometry": {"type": "Point", "coordinates": [1, 2]}}]'],
)
def test_what_outlines_nothing_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(content)
    with pytest.raises(InputError, match="not GeoJSON of Polygons"):
        read_annotations(path, (4, 4))


def test_of_a_cell_the_nucleus_counts(tmp_path: Path) -> None:
    cell = feature(square(0, 0, 12, 12)) | {"nucleusGeometry": feature(square(4, 4, 8, 8))["geometry"]}
    assert (read_annotations(write(tmp_path / "a.geojson", [cell]), (20, 20)) > 0).sum() == 16


def test_outlines_that_are_not_the_image_s_nuclei_are_named(tmp_path: Path) -> None:
    def refused(*features: dict[str, Any]) -> str:
        with pytest.raises(InputError) as caught:
            read_annotations(write(tmp_path / "a.geojson", features), (20, 20))
        return str(caught.value)

    nuclei = [feature(square(2, 2, 6, 6)), feature(square(10, 10, 15, 15))]
    assert "feature 1 encloses 2 others" in refused(feature(square(0, 0, 20, 20)), *nuclei)
    assert "feature 3 lies outside the image of 20 x 20 px" in refused(*nuclei, feature(square(5000, 70, 5009, 80)))
    nuclei[1]["geometry"]["plane"] = {"c": -1, "z": 3, "t": 0}
    assert "several planes" in refused(*nuclei)
    for broken in ([[]], [[[1, 2], [3, 4]]], [[[1, 2], [3, float("nan")], [5, 6]]], [], [[[[1, 2], [3, 4], [5, 6]]]]):
        assert "no outline" in refused({"geometry": {"type": "Polygon", "coordinates": broken}})


@pytest.mark.parametrize("region_at", [0, 1])
@pytest.mark.parametrize("nuclei", [[], [feature(square(5, 5, 20, 20))]])
def test_the_outline_of_a_region_is_no_nucleus(tmp_path: Path, nuclei: list[Any], region_at: int) -> None:
    """QuPath exports it with what lies in it, where two or more are told as enclosed."""
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    Image.new("RGB", (96, 80)).save(tmp_path / "images" / "a.png")
    features = [*nuclei[:region_at], feature(square(0, 0, 96, 80)), *nuclei[region_at:]]
    write(tmp_path / "labels" / "a.geojson", features)
    with pytest.raises(InputError, match="one nucleus would be most of the image; delete the outline of the region"):
        read_sample(find_samples(tmp_path)[0])


def test_what_nsam_infer_writes_can_be_corrected_and_trained_on(
    tmp_path: Path, tiny_model: Path, draw_discs: Any
) -> None:
    import tifffile
    from click.testing import CliRunner

    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    picture = tmp_path / "images" / "a.png"
    Image.fromarray(draw_discs((96, 80), [(20, 20), (60, 40), (38, 60)], 9)).save(picture)
    options = ["--out", str(tmp_path / "out"), "--model", str(tiny_model), "--mpp", "0.25", "--device", "cpu"]
    assert CliRunner().invoke(infer_main, [str(picture), *options, "--outputs", "annotations,labels"]).exit_code == 0
    (tmp_path / "out" / "a" / "annotations.geojson").rename(tmp_path / "labels" / "a.geojson")
    image, labels = read_sample(find_samples(tmp_path)[0])
    written = tifffile.imread(tmp_path / "out" / "a" / "labels.tif")
    assert image.shape[:2] == labels.shape
    assert labels.max() == written.max() == 3
    # Rings are simplified by up to half a pixel.
    assert np.mean(labels != written) < 0.01
