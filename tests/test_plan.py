"""What `--dry-run` tells of a slide is what its tiles cost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from nsam.runtime import plan
from nsam.runtime.card import InputSpec, ModelCard, PostSpec
from nsam.runtime.cli import main


def test_a_dry_run_s_figures_are_those_of_its_slides(
    make_tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At eight tiles of 64 px a second; tiles of 128 px count fourfold."""
    card = ModelCard("m", "1", "MIT", input=InputSpec(sizes=(64, 128), mpp=0.25), post=PostSpec(tile_halo_px=8))
    make_tiny_model(tmp_path / "m", card)
    for name in "ab":
        Image.new("RGB", (1000, 500), (200, 100, 150)).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(plan, "tiles_per_second", lambda *_: 8.0)
    options = ["--model", tmp_path / "m", "--device", "cpu", "--mpp", 2, "--no-tissue-mask", "--dry-run"]
    options += ["--outputs", "csv,geojson,labels", "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, [*map(str, [tmp_path / "a.png", tmp_path / "b.png", *options])])
    assert result.exit_code == 0, result.output
    tiles = int(re.findall(r"(\d+) of \d+ tiles of 128 px", result.stdout)[0])
    minutes = tiles * 4 / 8 / 60
    # 1000 x 500 px of 2 µm: 6,000 nuclei of 810 bytes, and .06 bytes of labels a px.
    assert result.stdout.count(f"about {minutes:.0f} min and 5 MB") == 2
    assert f"2 slides, 0 would fail; {2 * tiles} tiles, about {2 * minutes:.0f} min and 10 MB" in result.stdout
    assert result.stdout.count("2 µm/px is too coarse") == 2


def test_the_network_s_rate_is_of_tiles_not_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock) / 10)  # each look takes a tenth of a second

    def run_all(batches: Any) -> Iterator[np.ndarray]:
        yield from batches

    engine: Any = SimpleNamespace(card=SimpleNamespace(input=SimpleNamespace(size=8)), run_all=run_all)
    # 19 batches of 3 in two seconds, the beginning and the end of the clock looked at, too.
    assert plan.tiles_per_second(engine, 3) == pytest.approx(30, rel=0.1)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h"), (36000, "10.0 h")],
)
def test_durations_are_told_in_a_unit_that_suits(seconds: float, told: str) -> None:
    assert plan._duration(seconds) == told
