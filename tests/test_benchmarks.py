"""Each benchmark script runs: what it patches, imports or passes on may change in the packages that it measures."""

from __future__ import annotations

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
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from nsam.train.lineage import SEEN_NAME

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
    (folder / SEEN_NAME).touch()
    return folder


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
