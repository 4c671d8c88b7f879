"""Killed with SIGKILL anywhere and run again, a run ends with the bytes of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from nsam.runtime.settings import BANDS_NAME, OUTPUTS

KILLS = 20 if os.environ.get("NSAM_SLOW") else 4


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, draw_discs: Any) -> Path:
    """Two images of several bands each."""
    folder = tmp_path_factory.mktemp("slides")
    rng = random.Random(0)
    for name, (width, times) in {"a": (700, 9), "b": (900, 5)}.items():
        centres = [(rng.uniform(0, width), rng.uniform(0, 1000)) for _ in range(15)]
        image = np.tile(draw_discs((width, 1000), centres, 9), (times, 1, 1))
        tifffile.imwrite(folder / f"{name}.tif", image, photometric="rgb", compression="zlib", tile=(256, 256))
    return folder


def command(slides: Path, model: Path, out: Path) -> list[str]:
    options = ["--out", out, "--model", model, "--mpp", "0.25", "--outputs", ",".join(OUTPUTS)]
    options += ["--device", "cpu", "--threads", "1", "--overwrite"]  # results without slide.json are nobody's
    return [sys.executable, "-m", "nsam.runtime.cli", *map(str, [slides, *options])]


def results(out: Path) -> dict[str, bytes]:
    return {f"{slide}/{file}": (out / slide / file).read_bytes() for slide in "ab" for file in OUTPUTS.values()}


def test_killed_anywhere(slides: Path, tiny_model: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    subprocess.run(command(slides, tiny_model, tmp_path / "whole"), check=True, capture_output=True)
    seconds = time.monotonic() - begin
    rng = random.Random(1)
    out = tmp_path / "killed"
    kept = killed = 0
    while killed < KILLS:
        process = subprocess.Popen(command(slides, tiny_model, out), stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=seconds * rng.uniform(0.25, 0.9))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            kept = max(kept, len(list(out.glob(f"*/{BANDS_NAME}/*.npz"))))
            continue
        # It came to its end: the next kill begins anew.
        assert results(out) == results(tmp_path / "whole")
        for slide in "ab":
            (out / slide / "slide.json").unlink()
    assert kept, "no kill met a slide in the middle: the test proves nothing"
    subprocess.run(command(slides, tiny_model, out), check=True, capture_output=True)
    assert results(out) == results(tmp_path / "whole")
    assert not list(out.rglob("*.part"))
    nuclei = [json.loads((out / slide / "slide.json").read_text())["nuclei"] for slide in "ab"]
    assert min(nuclei) > 30
