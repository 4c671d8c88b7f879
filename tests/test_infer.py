"""nsam-infer end to end, with a tiny model that finds dark discs."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from nsam.runtime import job, pipeline, segment
from nsam.runtime.bands import BandStore
from nsam.runtime.cli import main
from nsam.runtime.engines import load
from nsam.runtime.errors import InputError
from nsam.runtime.inputs import Source
from nsam.runtime.outcome import Failed
from nsam.runtime.pipeline import segment_slide
from nsam.runtime.settings import OUTPUTS, THUMBNAIL_NAME, Settings
from nsam.runtime.slides import ArraySlide
from nsam.runtime.writers import write_results

DrawDiscs = Callable[..., NDArray[np.uint8]]

RADIUS_UM = 4.0
SIZE_UM = (75.0, 60.0)
#: Alone, over tile borders (every 12 µm), near each other, at the image's edge.
CENTRES_UM = [
    (10, 10),
    (14.3, 28.1),
    (24, 12),
    (36, 36.5),
    (45.1, 36.5),
    (60, 12.2),
    (60, 48),
    (20, 47),
    (71, 30),
]


@pytest.fixture
def infer(tiny_model: Path, tmp_path: Path) -> Callable[..., Result]:
    """Run the command with the tiny model into tmp_path/out."""

    def run(*arguments: object) -> Result:
        common = [
            "--out",
            str(tmp_path / "out"),
            "--model",
            str(tiny_model),
            "--device",
            "cpu",
            "--threads",
            "1",
        ]
        return CliRunner().invoke(main, [*common, *map(str, arguments)], catch_exceptions=False)

    return run


@pytest.fixture
def discs(draw_discs: DrawDiscs) -> Callable[[float], NDArray[np.uint8]]:
    """The discs at so many µm per px."""

    def draw(mpp: float) -> NDArray[np.uint8]:
        size = tuple(round(side / mpp) for side in SIZE_UM)
        return draw_discs(size, [(x / mpp, y / mpp) for x, y in CENTRES_UM], RADIUS_UM / mpp)

    return draw


@pytest.fixture
def png(tmp_path: Path, discs: Callable[[float], NDArray[np.uint8]]) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(discs(0.25)).save(path)
    return path


def rows_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "nuclei.csv").open(encoding="utf-8", newline="") as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def failures(out: Path) -> list[dict[str, str]]:
    with (out / "failed.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


# What is found


@pytest.mark.parametrize("mpp", [0.125, 0.25, 0.5])
def test_discs_are_counted_placed_and_measured(
    infer: Callable[..., Result], discs: Callable[[float], NDArray[np.uint8]], tmp_path: Path, mpp: float
) -> None:
    image = discs(mpp)
    tifffile.imwrite(
        tmp_path / "a.tif",
        image,
        photometric="rgb",
        resolution=(1e4 / mpp, 1e4 / mpp),
        resolutionunit="CENTIMETER",
    )
    result = infer(tmp_path / "a.tif")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out" / "a"
    rows = rows_of(out)
    assert len(rows) == len(CENTRES_UM)
    for x, y in CENTRES_UM:
        row = min(rows, key=lambda row: np.hypot(row["x_um"] - x, row["y_um"] - y))
        assert np.hypot(row["x_um"] - x, row["y_um"] - y) < 0.1
        assert row["x_px"] * mpp == pytest.approx(row["x_um"], abs=1e-3)
        if x + RADIUS_UM < SIZE_UM[0]:
            assert row["area_um2"] == pytest.approx(np.pi * RADIUS_UM**2, rel=0.06)
    labels = tifffile.imread(out / "labels.tif")
    assert labels.shape == image.shape[:2]
    assert sorted(np.unique(labels)) == list(range(len(CENTRES_UM) + 1))
    dark = image[..., 0] < 128
    assert ((labels > 0) != dark).sum() < 0.06 * dark.sum()
    summary = json.loads((out / "slide.json").read_text(encoding="utf-8"))
    assert summary["nuclei"] == len(CENTRES_UM)
    assert summary["mpp"] == pytest.approx(mpp)
    assert summary["mpp_source"] == "its resolution tags"
    assert summary["nuclei_per_mm2"] == pytest.approx(len(CENTRES_UM) / (SIZE_UM[0] * SIZE_UM[1] / 1e6))


def test_api_equals_command(infer: Callable[..., Result], png: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert infer(png, "--mpp", 0.25).exit_code == 0
    labels = segment(np.asarray(Image.open(png)), 0.25, tiny_model)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, tifffile.imread(tmp_path / "out" / "a" / "labels.tif"))


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 4), (0, 9, 3)])
def test_api_refuses_other_arrays(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="`image`"):
        segment(np.zeros(shape, np.uint8), 0.25)


@pytest.mark.parametrize("mpp", [0, -1, 100, float("nan")])
def test_api_refuses_scales_that_no_slide_has(tiny_model: Path, mpp: float) -> None:
    with pytest.raises(InputError, match="`mpp`: must be from"):
        segment(np.zeros((9, 9, 3), np.uint8), mpp, tiny_model)


def test_image_smaller_than_a_tile(infer: Callable[..., Result], draw_discs: DrawDiscs, tmp_path: Path) -> None:
    Image.fromarray(draw_discs((40, 37), [(20, 18)], 9)).save(tmp_path / "a.png")
    assert infer(tmp_path / "a.png", "--mpp", 0.25).exit_code == 0
    (row,) = rows_of(tmp_path / "out" / "a")
    assert (row["x_px"], row["y_px"]) == pytest.approx((20, 18), abs=0.1)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1)])
def test_tiniest_images(infer: Callable[..., Result], tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "white").save(tmp_path / "a.png")
    assert infer(tmp_path / "a.png", "--mpp", 0.25).exit_code == 0
    assert rows_of(tmp_path / "out" / "a") == []


def test_real_slides(infer: Callable[..., Result], data_dir: Path, tmp_path: Path) -> None:
    with Image.open(data_dir / "slides" / "hgsc_nest.jpg") as image:
        image.crop((0, 0, 300, 300)).save(tmp_path / "crop.jpg")
    result = infer(tmp_path / "crop.jpg", data_dir / "slides" / "CMU-1-Small-Region.svs", "--outputs", "csv")
    assert result.exit_code == 1
    assert "`--mpp`" not in result.output
    (failure,) = failures(tmp_path / "out")
    assert failure["stage"] == "mpp"
    summary = json.loads((tmp_path / "out" / "CMU-1-Small-Region" / "slide.json").read_text(encoding="utf-8"))
    assert summary["size_wh_px"] == [2220, 2967]
    assert summary["mpp"] == pytest.approx(0.499)


# What a run leaves


def test_files_of_a_run(infer: Callable[..., Result], png: Path, tiny_model: Path, tmp_path: Path) -> None:
    result = infer(png, "--mpp", 0.25)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"run.json", "report.html", "a"}
    default = {"nuclei.geojson", "nuclei.csv", "labels.tif", "overlay.jpg"}
    assert {path.name for path in (out / "a").iterdir()} == {*default, "thumbnail.jpg", "slide.json"}
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run["settings"]["mpp"] == 0.25
    assert run["model"]["name"] == "tiny"
    assert run["device"].startswith("cpu fp32 (ONNX Runtime")
    assert run["device"] in result.output
    assert "1 slides done, 0 skipped, 0 failed; 9 nuclei in" in result.output
    assert result.stderr == ""


def test_outputs_asked_for_only(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    assert infer(png, "--mpp", 0.25, "--outputs", "csv, labels").exit_code == 0
    names = {path.name for path in (tmp_path / "out" / "a").iterdir()}
    assert names == {"nuclei.csv", "labels.tif", "thumbnail.jpg", "slide.json"}


def test_done_slides_are_skipped_until_more_is_asked(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    infer(png, "--mpp", 0.25, "--outputs", "csv")
    done = tmp_path / "out" / "a" / "slide.json"
    before = done.stat().st_mtime_ns
    assert "done before, skipped" in infer(png, "--mpp", 0.25, "--outputs", "csv").output
    assert done.stat().st_mtime_ns == before
    assert infer(png, "--mpp", 0.25, "--outputs", "geojson").exit_code == 0
    assert done.stat().st_mtime_ns > before
    assert (tmp_path / "out" / "a" / "nuclei.csv").exists()


def test_other_settings_need_overwrite(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    infer(png, "--mpp", 0.25)
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in (out / "a").iterdir()}
    result = infer(png, "--mpp", 0.3, "--outputs", "csv")
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert failures(out)[0]["stage"] == "write"
    assert {path.name: path.read_bytes() for path in (out / "a").iterdir()} == before
    assert infer(png, "--mpp", 0.3, "--outputs", "csv", "--overwrite").exit_code == 0
    # The others were of the settings before.
    assert {path.name for path in (out / "a").iterdir()} == {"nuclei.csv", "thumbnail.jpg", "slide.json"}
    assert not (out / "failed.csv").exists()


def test_equal_stems_have_folders_of_their_own(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        shutil.copyfile(png, tmp_path / folder / "a.png")
    assert infer(tmp_path / "x", tmp_path / "y", "--mpp", 0.25, "--outputs", "csv").exit_code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", "report.html", "x_a", "y_a"}


def test_another_slide_of_the_same_name_has_another_place(
    infer: Callable[..., Result], png: Path, tmp_path: Path
) -> None:
    options = ("--mpp", 0.25, "--outputs", "csv")
    infer(png, *options)
    (tmp_path / "x").mkdir()
    other = tmp_path / "x" / "a.png"
    shutil.copyfile(png, other)
    assert infer(other, *options).exit_code == 0
    assert "0 slides done, 2 skipped" in infer(png, other, *options).output  # nor does either move afterwards
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", "report.html", "a", "x_a"}


def test_results_of_a_slide_that_has_moved_are_not_made_twice(
    infer: Callable[..., Result], png: Path, tmp_path: Path
) -> None:
    infer(png, "--mpp", 0.25, "--outputs", "csv")
    (tmp_path / "x").mkdir()
    result = infer(png.rename(tmp_path / "x" / "a.png"), "--mpp", 0.25, "--outputs", "csv")
    assert result.exit_code == 1
    assert "of another slide" in result.stderr


def test_results_below_the_input_are_no_input(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    assert infer(tmp_path, "--mpp", 0.25).exit_code == 0
    assert "0 slides done, 1 skipped" in infer(tmp_path, "--mpp", 0.25).output


def test_the_report_shows_slides_of_earlier_runs_too(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    infer(png, "--mpp", 0.25, "--outputs", "csv")
    shutil.copyfile(png, tmp_path / "b.png")
    (tmp_path / "empty.svs").touch()
    assert infer(tmp_path, "--mpp", 0.25, "--outputs", "csv").exit_code == 1
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<article") == page.count("data:image/jpeg") == 2
    assert "the file is empty (0 bytes)" in page


def test_blocks_and_batches_change_no_byte(tiny_model: Path, discs: Callable[..., Any], tmp_path: Path) -> None:
    engine = load(tiny_model, device="cpu", threads=1)
    image = discs(0.25).copy()
    image[..., 0] += np.random.default_rng(0).integers(0, 30, image.shape[:2], np.uint8).clip(0, 255 - image[..., 0])
    slide = ArraySlide(image, Path("a.png"), 0.25)
    for name, options in {"1": {"batch": 1, "block_px": 4096}, "2": {"batch": 3, "block_px": 110}}.items():
        found = write_results(
            segment_slide(slide, engine, 0.25, **options), slide, 0.25, tmp_path / name, tuple(OUTPUTS)
        )
        assert found["nuclei"] == len(CENTRES_UM)
    for name in (*OUTPUTS.values(), THUMBNAIL_NAME):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_haematoxylin_is_that_of_the_pixels(
    infer: Callable[..., Result], draw_discs: DrawDiscs, tmp_path: Path
) -> None:
    """Two discs, one of the stain's own colour and one of eosin's, as dark to the network."""
    image = draw_discs((300, 100), [(50, 50), (250, 50)], 24)
    for centre, colour in ((50, (57, 51, 131)), (250, (120, 20, 40))):
        part = image[:, centre - 50 : centre + 50]
        part[part[..., 0] < 128] = colour
    Image.fromarray(image).save(tmp_path / "a.png")
    assert infer(tmp_path / "a.png", "--mpp", 0.25).exit_code == 0
    blue, red = sorted(rows_of(tmp_path / "out" / "a"), key=lambda row: row["x_px"])
    assert blue["haematoxylin_od"] == pytest.approx(1, abs=0.1)  # less at the border, where pixels mix
    assert red["haematoxylin_od"] < 0.3


# What goes wrong


def test_parquet_without_pyarrow_is_refused_before_any_work(
    infer: Callable[..., Result], png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    result = infer(png, "--mpp", 0.25, "--outputs", "csv,parquet")
    assert result.exit_code == 2
    assert "Error: `--outputs parquet`: needs pyarrow" in result.stderr
    assert not (tmp_path / "out").exists()


def test_one_failure_does_not_end_the_batch(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in ("a.png", "cut.png", "z.png"):
        shutil.copyfile(png, slides / name)
    (slides / "cut.png").write_bytes(png.read_bytes()[:300])
    (slides / "empty.svs").touch()
    (slides / "text.svs").write_text("no slide")
    result = infer(slides, "--mpp", 0.25, "--outputs", "csv")
    assert result.exit_code == 1
    assert "2 slides done, 0 skipped, 3 failed" in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("failed: `") for line in lines)
    assert [(Path(row["slide"]).name, row["stage"]) for row in failures(tmp_path / "out")] == [
        ("cut.png", "open"),
        ("empty.svs", "open"),
        ("text.svs", "open"),
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", "report.html", "failed.csv", "a", "z"}


def test_no_mpp(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    result = infer(png)
    assert result.exit_code == 1
    assert result.stderr == (
        f"failed: `{png}`: no mpp in its metadata; pass --mpp (µm per px; 0.25 for most 40x scans), which holds for "
        "all slides, or a table with the column mpp\n"
    )
    assert failures(tmp_path / "out")[0]["stage"] == "mpp"


def test_an_mpp_against_the_slide_s_own_is_told(
    infer: Callable[..., Result], png: Path, discs: Callable[[float], NDArray[np.uint8]], tmp_path: Path
) -> None:
    """`--mpp` for those that say none holds for those that do, too."""
    says = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "b.tif", discs(0.5), photometric="rgb", **says)
    result = infer(png, tmp_path / "b.tif", "--mpp", 0.25)
    against = "--mpp, against 0.5 by its resolution tags"
    assert f"b.tif: 0.25 µm/px by {against}; a table gives each slide its own" in result.stdout
    assert result.stdout.count(against) == 1
    assert against in (tmp_path / "out" / "report.html").read_text()
    assert f"0.25 µm/px ({against})" in infer(tmp_path / "b.tif", "--mpp", 0.25, "--dry-run").stdout
    assert "against 0.5" not in infer(tmp_path / "b.tif", "--mpp", 0.51, "--overwrite").stdout
    for option in ("--overwrite", "--dry-run"):  # the network is of .25, wherever it is shown the slide at
        assert "1 µm/px is too coarse" in infer(png, "--mpp", 1, "--network-mpp", 0.5, option).stdout
        assert "too coarse" not in infer(png, "--mpp", 0.4, "--network-mpp", 0.13, option).stdout


def test_mpp_option_overrules_metadata(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    Image.open(png).save(png, dpi=(5080, 5080))  # 5 µm/px
    assert "its mpp of 5 in its resolution tags is not from 0.1 to 2; pass --mpp" in infer(png).stderr
    assert infer(png, "--mpp", 0.25, "--outputs", "csv").exit_code == 0
    summary = json.loads((tmp_path / "out" / "a" / "slide.json").read_text(encoding="utf-8"))
    assert (summary["mpp"], summary["mpp_source"]) == (0.25, "--mpp")


@pytest.mark.parametrize("verbose", [False, True])
def test_the_unexpected_is_one_line(
    infer: Callable[..., Result],
    png: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    verbose: bool,
) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(job, "segment_slide", broken)
    result = infer(png, "--mpp", 0.25, *(["-v"] if verbose else []))
    assert result.exit_code == 1
    assert "failed: unexpected: ZeroDivisionError: by zero (run with -v for the traceback)\n" in result.stderr
    assert ("Traceback" in caplog.text) == verbose
    assert failures(tmp_path / "out")[0]["stage"] == "infer"


def test_files_of_the_user_are_never_replaced_unasked(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / png.stem).mkdir(parents=True)
    own = tmp_path / "out" / png.stem / "nuclei.geojson"
    own.write_text("by hand")
    result = infer(png, "--mpp", 0.25, "--outputs", "csv")
    assert result.exit_code == 1
    assert "is of no run of nsam; pass --overwrite" in result.stderr
    assert own.read_text() == "by hand"
    assert infer(png, "--mpp", 0.25, "--outputs", "csv", "--overwrite").exit_code == 0
    assert not own.exists()


@pytest.mark.parametrize("name", ["overlay", "thumbnail"])
def test_a_slide_named_as_a_result_survives(tiny_model: Path, png: Path, tmp_path: Path, name: str) -> None:
    slide = tmp_path / "in" / name / f"{name}.jpg"
    slide.parent.mkdir(parents=True)
    Image.open(png).save(slide)
    before = slide.read_bytes()
    command = [str(tmp_path / "in"), "--out", str(tmp_path / "in"), "--model", str(tiny_model), "--device", "cpu"]
    assert CliRunner().invoke(main, [*command, "--mpp", "0.25", "--outputs", "csv"]).exit_code == 0
    assert slide.read_bytes() == before
    assert (
        "0 slides done, 1 skipped" in CliRunner().invoke(main, [*command, "--mpp", "0.25", "--outputs", "csv"]).output
    )


def test_a_slide_that_was_changed_is_not_done(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    """Not by its size: uncompressed images of the same sides have the same."""
    image, slide = np.asarray(Image.open(png)), tmp_path / "s.tif"
    tifffile.imwrite(slide, image)
    assert "9 nuclei" in infer(slide, "--mpp", 0.25, "--outputs", "csv").stdout
    size = slide.stat().st_size
    tifffile.imwrite(slide, np.where(np.arange(image.shape[1])[:, None] < 100, 255, image).astype(np.uint8))
    assert slide.stat().st_size == size
    result = infer(slide, "--mpp", 0.25, "--outputs", "csv")
    assert result.exit_code == 1
    assert "holds results of the slide before it was changed; pass --overwrite" in result.stderr
    assert "9 nuclei" not in infer(slide, "--mpp", 0.25, "--outputs", "csv", "--overwrite").stdout
    assert "1 skipped" in infer(slide, "--mpp", 0.25, "--outputs", "csv").stdout


def test_a_precision_that_was_asked_for_is_had(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    """What `auto` took is the same as what is asked for by name; any that was proven will do for `auto`."""
    options = (png, "--mpp", 0.25, "--outputs", "csv")
    assert infer(*options).exit_code == 0
    path = tmp_path / "out" / "a" / "slide.json"
    done = json.loads(path.read_text())
    assert "(ONNX Runtime" in done["device"]
    assert done["precision"] == "fp32"
    assert "1 skipped" in infer(*options, "--precision", "fp32").stdout
    path.write_text(json.dumps({**done, "precision": "int8"}))
    refused = "holds results of --precision int8; pass --overwrite"
    assert refused in infer(*options).stderr, "it is not proven of this model"
    assert refused in infer(*options, "--precision", "fp32").stderr


def test_results_of_any_proven_precision_will_do_but_are_not_mixed(
    infer: Callable[..., Result], png: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = job.engines.read_card
    monkeypatch.setattr(job.engines, "read_card", lambda *of: dataclasses.replace(real(*of), proven=("fp32", "int8")))
    options = (png, "--mpp", 0.25, "--outputs")
    assert infer(*options, "csv").exit_code == 0
    path = tmp_path / "out" / "a" / "slide.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "precision": "int8"}))
    assert "1 skipped" in infer(*options, "csv").stdout
    result = infer(*options, "csv,labels")
    assert "holds results of --precision int8; pass --overwrite" in result.stderr
    assert (path.parent / "nuclei.csv").exists()
    settings = Settings(
        (str(png),), tmp_path / "out", tiny_model, mpp=0.25, device="cpu", threads=1, outputs=("labels",)
    )
    with pytest.raises(Failed, match="holds results of --precision int8"):  # a worker of a cluster, before the work
        job.Job.of(settings).make_bands(Source(png), path.parent, 0, 1)
    assert "9 nuclei" in infer(*options, "labels", "--overwrite").stdout
    assert not (path.parent / "nuclei.csv").exists(), "it is of another precision"
    assert json.loads(path.read_text())["precision"] == "fp32"


def test_bands_of_two_precisions_do_not_mix(
    infer: Callable[..., Result], png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed run left, under `auto` that now takes another."""
    real_load, real_write = job.engines.load, job.write_results

    def load(*arguments: Any) -> Any:
        engine = real_load(*arguments)
        engine.precision = "bf16"
        return engine

    def killed(strips: Any, *arguments: Any) -> Any:
        list(strips)
        raise OSError(28, "No space left on device")

    job._engine.cache_clear()
    monkeypatch.setattr(job.engines, "load", load)
    monkeypatch.setattr(job, "write_results", killed)
    assert infer(png, "--mpp", 0.25).exit_code == 1
    (kept,) = (tmp_path / "out" / "a" / "bands.part").glob("*.npz")
    made = []
    job._engine.cache_clear()
    monkeypatch.setattr(job.engines, "load", real_load)
    monkeypatch.setattr(job, "write_results", real_write)
    real_bands = pipeline.make_bands
    monkeypatch.setattr(pipeline, "make_bands", lambda *a, **k: made.append(a) or real_bands(*a, **k))
    assert kept.exists()
    assert infer(png, "--mpp", 0.25).exit_code == 0
    assert made


def test_what_settings_differ_is_told(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    assert infer(png, "--mpp", 0.25, "--outputs", "csv").exit_code == 0
    path = tmp_path / "out" / "a" / "slide.json"
    done = json.loads(path.read_text())
    assert json.loads((tmp_path / "out" / "run.json").read_text())["run_hash"] == done["run_hash"]
    path.write_text(json.dumps({**done, "run_hash": "1", "made_with": {**done["made_with"], "nsam": "0.0.1"}}))
    result = infer(png, "--mpp", 0.25, "--outputs", "csv")
    now = done["made_with"]["nsam"]
    assert f"holds results of other settings (nsam 0.0.1, now {now}); pass --overwrite" in result.stderr
    path.write_text(json.dumps({**{key: value for key, value in done.items() if key != "made_with"}, "run_hash": "1"}))
    (tmp_path / "out" / "run.json").write_text(json.dumps({"nsam": "0.1.0", "settings": {}, "run_hash": "1"}))
    assert "holds results of an earlier version of nsam; pass" in infer(png, "--mpp", 0.25).stderr
    path.write_text(json.dumps(done))
    assert "holds results of other settings (mpp 0.25, now 0.5); pass --overwrite" in infer(png, "--mpp", 0.5).stderr


@pytest.mark.parametrize("name", ["report.html", "run.json", "failed.csv"])
def test_files_of_somebody_else_stay(infer: Callable[..., Result], png: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"mine": 1}')
    result = infer(png, "--mpp", 0.25, "--outputs", "csv")
    assert result.exit_code == 2
    assert f"{name}`: is of no run of nsam; pass --overwrite" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == '{"mine": 1}'
    assert infer(png, "--mpp", 0.25, "--outputs", "csv", "--overwrite").exit_code == 0
    assert infer(png, "--mpp", 0.25, "--outputs", "csv").exit_code == 0


def test_what_is_noted_of_a_slide_goes_when_it_is_done(
    infer: Callable[..., Result], png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From whatever folder, and by whatever name."""
    image = png.read_bytes()
    png.write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    assert infer("a.png", "--mpp", 0.25).exit_code == 1
    assert [row["slide"] for row in failures(tmp_path / "out")] == [str(png)]
    png.write_bytes(image)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert infer("../a.png", "--mpp", 0.25).exit_code == 0
    assert not (tmp_path / "out" / "failed.csv").exists()
    assert "0 failed" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8").replace("</b>", " ")


def test_names_and_logs_of_any_encoding_cost_no_other_slide(tiny_model: Path, png: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"1.png", b"2 M\xfcller.png", "3 \u0141\u00f3d\u017a.png".encode(), b"4.png"):
        shutil.copyfile(png, os.path.join(os.fsencode(folder), name))
    options = ["--out", str(tmp_path / "out"), "--model", str(tiny_model), "--device", "cpu", "--mpp", "0.25"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "nsam.runtime.cli", str(folder), *options, "--outputs", "csv"]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 1
    assert b"3 slides done, 0 skipped, 1 failed" in done.stdout
    assert b"its name is no UTF-8; rename it" in done.stderr
    assert b"Traceback" not in done.stderr
    assert len((tmp_path / "out" / "failed.csv").read_text(encoding="utf-8").splitlines()) == 2


def test_a_heatmap_of_300_um_has_its_scale_bar(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    Image.open(png).resize((600, 480)).save(tmp_path / "h.png")
    assert infer(tmp_path / "h.png", "--mpp", 0.5, "--outputs", "heatmap").exit_code == 0


def test_a_slide_that_vanishes_while_it_is_worked_on_is_that_of_before(
    infer: Callable[..., Result], png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was opened: what it was then is what was segmented."""
    size = shutil.copyfile(png, tmp_path / "b.png").stat().st_size
    real = job.Job.opened

    @contextmanager
    def vanishing(self: job.Job, source: Source) -> Iterator[Any]:
        with real(self, source) as found:
            if source.path.name == "b.png":
                source.path.unlink()
            yield found

    monkeypatch.setattr(job.Job, "opened", vanishing)
    result = infer(tmp_path / "b.png", png, "--mpp", 0.25)
    assert "2 slides done, 0 skipped, 0 failed" in result.output
    assert json.loads((tmp_path / "out" / "b" / "slide.json").read_text())["bytes"] == size


def test_a_slide_that_is_written_anew_meanwhile_is_seen_to_have_changed(
    infer: Callable[..., Result], png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = job.Job.opened

    @contextmanager
    def changing(self: job.Job, source: Source) -> Iterator[Any]:
        with real(self, source) as found:
            Image.fromarray(np.full((240, 300, 3), 255, np.uint8)).save(png)
            yield found

    monkeypatch.setattr(job.Job, "opened", changing)
    assert "1 slides done" in infer(png, "--mpp", 0.25).output
    monkeypatch.setattr(job.Job, "opened", real)
    assert "of the slide before it was changed" in infer(png, "--mpp", 0.25).stderr


@pytest.mark.parametrize("at", ["results", "bands", "strips"])
def test_no_slide_closes_while_it_is_read(
    infer: Callable[..., Result], png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Results that cannot be written, a full disk for instance, end a slide in the middle; OpenSlide aborts then."""
    reading: list[str] = []
    real = ArraySlide.close

    def close(self: ArraySlide) -> None:
        reading.extend(thread.name for thread in threading.enumerate() if thread.name.startswith("nsam-"))
        real(self)

    def full(*arguments: Any) -> Any:
        if at == "results":
            next(arguments[0])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ArraySlide, "close", close)
    owner, name = {
        "results": (job, "write_results"),
        "bands": (BandStore, "write"),
        "strips": (pipeline.Canvas, "add"),
    }[at]
    monkeypatch.setattr(owner, name, full)
    Image.fromarray(np.tile(np.asarray(Image.open(png)), (12, 1, 1))).save(tmp_path / "long.png")
    result = infer(tmp_path / "long.png", "--mpp", 0.25)
    assert "No space left on device" in result.stderr
    assert reading == []


def test_a_run_that_could_not_begin_is_no_obstacle(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    assert infer(png, "--mpp", 0.25, "--device", "tensorrt").exit_code == 2
    assert not list((tmp_path / "out").iterdir())
    assert infer(png, "--mpp", 0.25).exit_code == 0


def test_interrupt_keeps_what_is_finished(
    infer: Callable[..., Result], png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(png, tmp_path / "b.png")
    real = job.segment_slide

    def interrupted(slide: Any, *arguments: Any, **options: Any) -> Any:
        if slide.path.name == "b.png":
            raise KeyboardInterrupt
        return real(slide, *arguments, **options)

    monkeypatch.setattr(job, "segment_slide", interrupted)
    result = infer(png, tmp_path / "b.png", "--mpp", 0.25, "--outputs", "csv")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; finished slides are kept\n"
    assert [path.name for path in (tmp_path / "out").rglob("slide.json")] == ["slide.json"]
    assert not list((tmp_path / "out").rglob("*.part"))
    monkeypatch.undo()
    assert "1 slides done, 1 skipped" in infer(png, tmp_path / "b.png", "--mpp", 0.25, "--outputs", "csv").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["missing.svs"], "`missing.svs`: no such file or folder"),
        (["."], "no slide or image in it"),
        (["a.png", "--mpp", "25"], "0.1<=x<=2"),
        (["a.png", "--mpp", "nan"], "must be a finite number"),
        (["a.png", "--outputs", "csv,xml"], "`xml` is none of"),
        (["a.png", "--device", "abacus"], "abacus"),
        (["a.png", "--model", "."], "no readable card.json"),
    ],
)
def test_wrong_usage(
    infer: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "a.png" in arguments:
        Image.new("RGB", (8, 8)).save("a.png")
    result = infer(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_folder_named_like_a_slide(infer: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "a.svs").mkdir()
    result = infer(tmp_path / "a.svs")
    assert (result.exit_code, "no slide or image in it" in result.stderr) == (2, True)


def test_output_below_a_file(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = infer(png, "--out", tmp_path / "file" / "out")
    assert (result.exit_code, "cannot be written" in result.stderr) == (2, True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output(infer: Callable[..., Result], png: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    result = infer(png, "--out", tmp_path / "locked")
    assert (result.exit_code, "cannot be written" in result.stderr) == (2, True)


# The command as users start it


def start(*arguments: object, forbid: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """nsam-infer in a process of its own, with modules that cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({forbid})); from nsam.runtime.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_torch(png: Path, tiny_model: Path, tmp_path: Path) -> None:
    training = ("torch", "torchvision", "timm", "segment_anything", "onnx", "sklearn", "matplotlib")
    result = start(
        png, "--mpp", 0.25, "--model", tiny_model, "--out", tmp_path / "out", "--threads", 1, forbid=training
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len(rows_of(tmp_path / "out" / "a")) == len(CENTRES_UM)


def test_help_imports_nothing_heavy() -> None:
    heavy = ("numpy", "cv2", "skimage", "scipy", "PIL", "tifffile", "openslide", "onnxruntime", "rich")
    begin = time.perf_counter()
    result = start("--help", forbid=heavy)
    assert result.returncode == 0
    assert "nsam-infer slides/ --out results/" in result.stdout
    assert time.perf_counter() - begin < 5  # .2 s where nothing else runs


def test_version() -> None:
    assert "0." in start("--version").stdout
