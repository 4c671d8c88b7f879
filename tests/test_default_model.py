"""The model that ships: real, attributed, small enough; it finds nuclei, and can be trained further."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import nsam.runtime
from nsam.export.cli import main as export_main
from nsam.runtime.card import ModelCard
from nsam.runtime.errors import InputError
from nsam.runtime.metrics import mean_and_pooled, score
from nsam.train.checkpoint import build_model
from nsam.train.data import find_extra, find_samples, read_sample
from nsam.train.folds import make_folds
from nsam.train.identity import file_of, identify, recognised
from nsam.train.lineage import refuse_seen, seen_by
from nsam.train.settings import NSAM

MODEL = Path(nsam.runtime.__file__).parent / "default_model"


def test_card_and_proof_are_complete() -> None:
    card = ModelCard.read(MODEL)
    card.verify_file(MODEL, "model.onnx")
    assert "CC BY 4.0" in card.training["data"]
    assert card.training["held_out"]["images"] == 133
    assert card.input.mpp == 0.3525
    proof = json.loads((MODEL / "parity.json").read_text())
    assert proof["passed"]
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 25e6


def test_check_repeats_its_proof() -> None:
    result = CliRunner().invoke(export_main, ["--check", str(MODEL)])
    assert result.exit_code == 0, result.output


def test_it_finds_the_nuclei_of_the_example(example: np.ndarray) -> None:
    labels = nsam.runtime.segment(example, mpp=0.5)
    areas = np.bincount(labels.ravel())[1:]
    assert 100 < areas.size < 300
    assert 5 < np.median(areas) * 0.5**2 < 80  # µm²


def test_blank_glass_has_no_nuclei() -> None:
    for grey in (255, 240):
        assert nsam.runtime.segment(np.full((500, 700, 3), grey, np.uint8), mpp=0.25).max() == 0


@pytest.mark.parametrize(("source", "least"), [("tnbc", 0.7), ("dsb2018_he", 0.8)])
def test_it_finds_nuclei_of_scanners(data_dir: Path, source: str, least: float) -> None:
    """Ten images of each source, most of them trained on: a lost stain or scale would show. Pooled Dice."""
    samples = find_samples(data_dir / source)
    scores = []
    for sample in samples[:: len(samples) // 10][:10]:
        image, truth = read_sample(sample)
        scores.append(score(truth, nsam.runtime.segment(image, mpp=sample.mpp)))
    assert mean_and_pooled(scores)[1]["dice"] > least


def test_it_says_what_it_has_seen(data_dir: Path) -> None:
    """Its list is the training and validation part of official fold 0; as a base it is refused where it would be
    tested on one of these."""
    extra = [sample for source in ("tnbc", "dsb2018_he") for sample in find_extra(data_dir / source)]
    first, second, *_ = make_folds(find_samples(data_dir / "nuinsseg"), extra=extra)
    lines = [identify(sample.image) for sample in (*first.train, *first.validation)]
    assert {file_of(line) for line in seen_by("default")} == {file_of(line) for line in lines}
    assert all(recognised([line.replace(line[:16], "0" * 16) for line in lines], seen_by("default"))), "as other files"
    settings = replace(NSAM, base="default")
    refuse_seen(settings, "fold0", first.test)
    with pytest.raises(InputError, match="133 of the 133 test images of fold1"):
        refuse_seen(settings, "fold1", second.test)


def test_it_is_a_base_for_training(example: np.ndarray) -> None:
    """`nsam-train --base default` has what it needs, and begins where the model that ships ends."""
    settings = replace(NSAM, base="default")
    model = build_model(settings)[0].eval()
    image = example[:448, :448]
    with torch.inference_mode():
        maps = model(torch.from_numpy(image[None].copy())).numpy()
    shipped = nsam.runtime.load(device="cpu").run(image[None])
    assert np.abs(maps - shipped).max() < 0.1
