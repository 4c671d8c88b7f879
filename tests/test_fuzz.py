"""Damaged files: whatever bytes change, a slide fails with one line or is done; no traceback, hang or crash."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

MUTATIONS = 520


@pytest.fixture
def originals(data_dir: Path, tmp_path: Path) -> list[Path]:
    """Real slides, and real tissue in each other format that is read."""
    slides = data_dir / "slides"
    tissue = np.asarray(Image.open(slides / "hgsc_nest.jpg"))[:400, :500]
    folder = tmp_path / "originals"
    folder.mkdir()
    scale = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(folder / "tiled.tif", tissue, photometric="rgb", tile=(128, 128), compression="jpeg", **scale)
    tifffile.imwrite(folder / "plain.tif", tissue, photometric="rgb", compression="lzw", predictor=True, **scale)
    tifffile.imwrite(folder / "deep.tif", tissue.astype(np.uint16) * 16, photometric="rgb", **scale)
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    with tifffile.TiffWriter(folder / "pyramid.ome.tif", ome=True) as tif:
        options = {"photometric": "rgb", "tile": (128, 128), "compression": "zlib"}
        tif.write(tissue, subifds=1, metadata=metadata, **options)
        tif.write(tissue[::2, ::2], subfiletype=1, **options)
    Image.fromarray(tissue).save(folder / "image.png", dpi=(50800, 50800))
    Image.fromarray(tissue).save(folder / "image.jpg", dpi=(50800, 50800))
    Image.fromarray(tissue).quantize(64).save(folder / "palette.png", dpi=(50800, 50800))
    return [*sorted(folder.iterdir()), slides / "CMU-1-Small-Region.svs", slides / "instanseg_HE_example.tif"]


def bit_flips(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 10, 200))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def damaged_head(content: bytearray, rng: random.Random) -> None:
    """Where sizes, counts and offsets are."""
    for _ in range(rng.choice((1, 4, 30))):
        content[rng.randrange(min(len(content), 400))] = rng.randrange(256)


def damaged_tail(content: bytearray, rng: random.Random) -> None:
    """Where TIFF writers put their directories."""
    for _ in range(rng.choice((1, 4, 30))):
        content[-1 - rng.randrange(min(len(content), 600))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))


def cut_off(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def hole(content: bytearray, rng: random.Random) -> None:
    """A lost block of a disk or a download."""
    start, length = rng.randrange(len(content)), rng.choice((64, 4096, 65536))
    content[start : start + length] = bytes(len(content[start : start + length]))


def missing_piece(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    del content[start : start + rng.choice((1, 100, 5000))]


KINDS: list[Callable[[bytearray, random.Random], None]] = [
    bit_flips,
    damaged_head,
    damaged_tail,
    cut_off,
    hole,
    missing_piece,
]


def test_mutated_files(originals: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    rng = random.Random(int(os.environ.get("NSAM_FUZZ_SEED", "0")))
    for i in range(MUTATIONS):
        path = originals[i % len(originals)]
        content = bytearray(path.read_bytes())
        kind = KINDS[i // len(originals) % len(KINDS)]
        kind(content, rng)
        (slides / f"{i:03d}_{kind.__name__}_{path.name}").write_bytes(content)
    out = tmp_path / "out"
    options = ["--out", out, "--model", tiny_model, "--device", "cpu", "--threads", "1", "--outputs", "csv"]
    command = [sys.executable, "-m", "nsam.runtime.cli", *map(str, [slides, *options, "--roi", 0, 0, 300, 300])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 1, run.stderr[-2000:]
    assert "Traceback" not in run.stderr
    done = {path.parent.name for path in out.glob("*/slide.json")}
    with (out / "failed.csv").open(encoding="utf-8", newline="") as stream:
        failed = {Path(row["slide"]): row["reason"] for row in csv.DictReader(stream)}
    assert len(done) + len(failed) == MUTATIONS
    assert len(done) > 50, "all files failed: the test proves little"
    assert len(failed) > 100
    unexpected = {path.name: reason for path, reason in failed.items() if "unexpected" in reason}
    assert not unexpected
    assert not [reason for reason in failed.values() if "\n" in reason]
    # Nothing else on stderr, but for libtiff's own lines: inside OpenSlide it cannot be silenced from here.
    talk = [line for line in run.stderr.splitlines() if not line.startswith(("failed: ", "TIFF"))]
    assert not talk
    assert not list(out.rglob("*.part"))
