"""Each benchmark script runs: what it patches, imports or passes on may change in the packages that it measures."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import wholeslide
from click.testing import CliRunner, Result
from latency import read_times
from numpy.typing import NDArray
from PIL import Image
from wholeslide import write_mosaic

from nsam.runtime import pipeline
from nsam.runtime.card import FileEntry, ModelCard, sha256_of
from nsam.runtime.slides import open_slide
from nsam.train.data import Sample, find_samples
from nsam.train.folds import make_folds
from nsam.train.identity import identify
from nsam.train.lineage import SEEN_NAME, write_seen

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "@click.command" in path.read_text(encoding="utf-8"))


def invoke(script: str, *arguments: object) -> Result:
    """A script in this process."""
    return CliRunner().invoke(importlib.import_module(script).main, [str(one) for one in arguments])


def output_of(script: str, *arguments: object) -> str:
    """What a script prints, in a process of its own: it replaces functions of the runtime."""
    command = [sys.executable, FOLDER / f"{script}.py", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, which has been trained on no image."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    train_on([], folder)
    return folder


def train_on(samples: list[Sample], model: Path) -> None:
    """Let a model say that these images have trained it."""
    write_seen(model / SEEN_NAME, [identify(sample.image) for sample in samples])
    card = ModelCard.read(model)
    files = {**card.files, SEEN_NAME: FileEntry(sha256_of(model / SEEN_NAME), "text")}
    (model / "card.json").write_text(dataclasses.replace(card, files=files).to_json(), encoding="utf-8")


@pytest.fixture
def slide(example: NDArray[np.uint8], tmp_path: Path) -> Path:
    """600 x 600 px of tissue, in tiles, its scale not told."""
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, np.pad(example, ((0, 88), (0, 88), (0, 0)), "reflect"), tile=(256, 256), photometric="rgb")
    return path


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str) -> None:
    result = invoke(script, "--help")
    assert result.exit_code == 0
    assert "--help" in result.output


def test_stages_account_for_a_run(slide: Path, tiny_model: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--mpp", 0.25, "--model", tiny_model, "--device", "cpu", "--threads", 1, "--json", figures]
    printed = output_of("stages", slide, *options)
    assert "is the bottleneck" in printed
    found = json.loads(figures.read_text(encoding="utf-8"))
    waits: dict[str, Any] = found["waits"]
    assert found["tiles"] > 100
    assert {"decode, resize", "inference", "separate", "write geojson"} <= {row["stage"] for row in found["stages"]}
    assert waits["network for tiles"] > 0


def test_training_steps_whatever_is_tuned() -> None:
    kinds = ("lora", "decoder", "full")
    options = ["--device", "cpu", "--batch", 1, "--crop", 32, "--steps", 1, "--precision", "fp32"]
    rows = output_of("training", *options, "--threads", 1, *(part for kind in kinds for part in ("--tune", kind)))
    assert [json.loads(row)["tune"] for row in rows.splitlines()] == list(kinds)


def test_training_refuses_in_one_line() -> None:
    result = invoke("training", "--crop", 40)
    assert result.exit_code == 2
    assert result.stderr == "Error: `crop` must be a multiple of 16, is 40\n"


def test_latency_of_an_engine_against_an_earlier_run(tiny_model: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--model", tiny_model, "--engines", "cpu:fp32", "--batches", 1, "--sizes", 64, "--passes", 1]
    output_of("latency", *options, "--threads", 1, "--json", figures)
    (row,) = json.loads(figures.read_text(encoding="utf-8"))["rows"]
    assert row["p50_ms"] > 0
    assert row["peak_mb"] > 20
    assert read_times(figures) == {("cpu:fp32", 1, 64): row["p50_ms"]}


def test_latency_refuses_before_the_work(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.json"
    for content in ("[1]", "{}", "no JSON", '{"rows": [{"engine": "cpu:fp32"}]}'):
        foreign.write_text(content, encoding="utf-8")
        result = invoke("latency", "--compare", foreign)
        assert result.exit_code == 2
        assert "not what latency.py --json has written" in result.stderr
    for text in ("x", "0", "1,"):
        result = invoke("latency", "--batches", text)
        assert result.exit_code == 2
        assert f"not `{text}`" in result.stderr
    result = invoke("latency", "--engines", "abacus:fp32", "--json", tmp_path / "missing" / "figures.json")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


def test_latency_of_nothing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latency.matrix_rate", lambda threads: 1.0)
    result = invoke("latency", "--engines", "abacus:fp32", "--batches", 1)
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: no engine could be timed\n")


def test_a_mosaic_appears_whole(example: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mosaic.tif"
    write_mosaic(example, path, 1200, 700)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with open_slide(path) as slide:
        assert slide.size_wh == (1200, 700)
        assert slide.mpp == pytest.approx(0.25)
    path.unlink()
    monkeypatch.setattr("wholeslide.tiles_of", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_mosaic(example, path, 1200, 700)
    assert not path.exists()


def test_a_mosaic_is_of_its_tissue(example: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another input of the same size is another file, and only results of a run are removed."""
    commands: list[list[str]] = []

    def no_child(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, '{"nuclei": 1}')

    monkeypatch.setattr("wholeslide.subprocess.run", no_child)
    out = tmp_path / "wholeslide-out"
    out.mkdir()
    (out / "run.json").touch()
    (tmp_path / "out").mkdir()
    for i in range(2):
        Image.fromarray(example[i:]).save(tmp_path / f"{i}.png")
        result = invoke("wholeslide", tmp_path / f"{i}.png", tmp_path, "--side", 600)
        assert result.exit_code == 0, result.output
    assert not out.exists()
    assert (tmp_path / "out").exists()
    assert len({command[-1] for command in commands}) == len(list(tmp_path.glob("mosaic-600-600-*.tif"))) == 2
    out.mkdir()
    result = invoke("wholeslide", tmp_path / "0.png", tmp_path, "--side", 600)
    assert result.exit_code == 2
    assert "it has no run.json" in result.stderr
    assert out.exists()


@pytest.mark.parametrize(
    ("script", "more"),
    [("wholeslide", ["missing/folder", "--side", 300]), ("scaling", ["--sides", 300, "--threads", 1])],
)
def test_tissue_of_another_scale_is_refused(
    script: str, more: list[object], example: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tissue = tmp_path / "tissue.tif"
    tifffile.imwrite(tissue, example, photometric="rgb", resolution=(4e4, 4e4), resolutionunit="CENTIMETER")
    result = invoke(script, tissue, *more)
    assert result.exit_code == 2
    assert "tissue of about 0.5 µm/px is wanted, it has 0.25" in result.stderr


def test_a_run_of_a_whole_slide_counts_its_stages(
    example: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wholeslide.seconds_per_tile", lambda *arguments: 0.1)
    for name in ("read_input", "haematoxylin", "block_nuclei"):
        monkeypatch.setattr(pipeline, name, getattr(pipeline, name))  # given back afterwards
    write_mosaic(example, tmp_path / "mosaic.tif", 600, 600)
    figures = wholeslide.run(tmp_path / "mosaic.tif", tmp_path / "wholeslide-out", "cpu")
    assert figures["nuclei"] > 20
    assert {"CPU: read", "CPU: separate and measure", "CPU: network"} <= figures.keys()


def test_scaling_of_a_small_mosaic(example: NDArray[np.uint8], tmp_path: Path) -> None:
    Image.fromarray(example).save(tmp_path / "tissue.png")
    figures = tmp_path / "figures.json"
    options = ["--sides", 500, "--shares", 1, "--threads", 1, "--workers", 1, "--device", "cpu", "--json", figures]
    output_of("scaling", tmp_path / "tissue.png", *options)
    (row,) = json.loads(figures.read_text(encoding="utf-8"))["size"]
    assert row["nuclei"] > 0
    assert row["peak_mb"] >= row["before_mb"] > 20


def test_accuracy_says_what_it_measured(disc_pairs: Path, model: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = [
        "--model",
        model,
        "--every",
        10,
        "--tta",
        2,
        "--network-mpp",
        0.3,
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    result = invoke("accuracy", disc_pairs, *options, "--threads", 1, "--json", figures)
    assert result.exit_code == 0, result.output
    assert "has been trained on" not in result.stderr
    found = json.loads(figures.read_text(encoding="utf-8"))
    wanted = {"model": str(model), "name": "tiny", "version": "1", "fold": None, "every": 10, "images": 1, "tta": 2}
    wanted |= {"mpp": [0.25], "network_mpp": 0.3, "precision": "fp32", "trained_on": 0}
    assert {name: found[name] for name in wanted} == wanted
    assert found["device"].startswith("cpu")
    assert found["results"]["as it is"]["mean"]["dice"] > 0.8


@pytest.mark.parametrize("script", ["accuracy", "errors"])
def test_a_model_that_knows_the_images_is_told(script: str, disc_pairs: Path, model: Path) -> None:
    parts = make_folds(find_samples(disc_pairs))[0]
    own = [*parts.train, *parts.validation]
    options = ["--model", model, "--fold", 0, "--device", "cpu", "--threads", 1]
    for trained, words in ((own, None), ([*own, *parts.test], "the model has been trained on 2 of the")):
        train_on(trained, model)
        result = invoke(script, disc_pairs, *options)
        assert result.exit_code == 0, result.output
        assert words in result.stderr if words else "has been trained on" not in result.stderr


def test_separation_of_an_image(disc_pairs: Path, model: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    result = invoke("separation", disc_pairs, "--model", model, "--every", 10, "--json", figures)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found["scores"]["nsam"]["mean"]["dice"] > 0.8
    assert found["ms_per_mpx"]["nsam, block"]["total"] > 0


@pytest.mark.parametrize("script", ["peers", "peers_accuracy"])
def test_a_peer_that_is_none_is_refused_first(
    script: str, disc_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module(script), "install", lambda *arguments: 1 / 0)
    files = (disc_pairs / "images" / "0.png", disc_pairs / "labels" / "0.tif") if script == "peers" else (disc_pairs,)
    folders = ["--envs", tmp_path / "envs", *(["--work", tmp_path / "work"] if script == "peers_accuracy" else [])]
    for name in ("Abacus", *(["InstanSeg"] if script == "peers_accuracy" else [])):
        result = invoke(script, *files, *folders, "--peers", f"nsam,{name}")
        assert result.exit_code == 2
        assert f"`{name}` is none of" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_row_of_peers_is_of_one_round(disc_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the least whole time, though another had the faster network."""
    rows = iter([(3.0, 1.0, 700), (1.0, 3.5, 800), (2.0, 1.5, 900)])

    def run(env: Path, task: str, image: Path, *rest: object) -> dict[str, Any]:
        assert tifffile.imread(image).shape == (64, 64, 3)  # made of a PNG
        network, post, peak = next(rows)
        return {"network_s": network, "post_s": post, "peak_mb": peak, "mm2": 1, "seen_mpp": 0.5, "weights": "none"}

    monkeypatch.setattr("peers.install", lambda *arguments: 5.0)
    monkeypatch.setattr("peers.run", run)
    files = [disc_pairs / "images" / "0.png", disc_pairs / "labels" / "0.tif"]
    result = invoke("peers", *files, "--envs", tmp_path, "--peers", "StarDist-0.5", "--rounds", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "| StarDist-0.5 at 0.5 µm/px | 2.00 | 1.50 | 3.5 | 900 | 5 | none |"
    monkeypatch.setattr("peers.run", lambda *arguments: {"error": "no"})
    result = invoke("peers", *files, "--envs", tmp_path, "--peers", "StarDist")
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: no peer could be run\n")


@pytest.mark.parametrize("task", ["nsam", "classical"])
def test_peer_worker(task: str, example: NDArray[np.uint8], tmp_path: Path) -> None:
    """Those peers whose environments are part of this one."""
    paths = tmp_path / "image.tif", tmp_path / "labels.tif"
    tifffile.imwrite(paths[0], example[:200, :200], photometric="rgb")
    tifffile.imwrite(paths[1], np.zeros((200, 200), np.uint16))
    row = json.loads(output_of("peer_worker", task, *paths, 0.5, 1).splitlines()[-1])
    assert row["nuclei"] > 0
    assert row["whole_s"] > 0
    assert row["peak_mb"] > 20
    assert row["seen_mpp"] > 0.3


def test_adaptation_refuses_before_the_work(disc_pairs: Path, tmp_path: Path) -> None:
    for test, words in (("zz", "no image's name begins so"), ("", "none is left"), ("1", "no finished fold of a run")):
        result = invoke("adaptation", tmp_path, disc_pairs, "--test", test, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert words in result.stderr
    (tmp_path / "metrics.json").touch()
    (tmp_path / "adaptation.json").touch()
    result = invoke("adaptation", tmp_path, disc_pairs, "--test", "1", "--out", tmp_path)
    assert result.exit_code == 2
    assert "holds an adaptation already; name another folder" in result.stderr
