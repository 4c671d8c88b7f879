"""Thresholds are those that the validation images ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from nsam.runtime.engines import load
from nsam.train.data import Sample
from nsam.train.thresholds import choose_post


def test_pale_things_that_nobody_annotated_are_told_by_their_probability(
    tiny_model: Path, draw_discs: Any, tmp_path: Path
) -> None:
    centres = [(x, y) for x in range(24, 240, 48) for y in range(24, 240, 48)]
    dark, pale = centres[::2], centres[1::2]
    image = draw_discs((256, 256), dark, 12)
    labels = np.zeros((256, 256), np.int32)
    for i, centre in enumerate(dark, 1):
        labels[draw_discs((256, 256), [centre], 12)[..., 0] < 255] = i
    image[draw_discs((256, 256), pale, 12) < 255] = 149  # the model's border lies at 157.5: a probability of .85
    Image.fromarray(image).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", labels)
    sample = Sample(tmp_path / "a.png", tmp_path / "a.tif", "a.png", "a", 0.25, tmp_path)
    engine: Any = load(tiny_model, "cpu", threads=1)
    post, reached = choose_post([sample], engine)
    assert post.min_probability >= 0.85
    assert reached > 0.8
    assert engine.card.post.min_probability == 0, "the card that was given is as it was"


def test_images_without_a_nucleus_choose_nothing(tiny_model: Path, draw_discs: Any, tmp_path: Path) -> None:
    """Whatever finds nothing would be best: here a `min_probability` above that of pale things."""
    image = np.where(draw_discs((64, 64), [(32, 32)], 12) < 255, 149, 255).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64), np.uint8))
    engine: Any = load(tiny_model, "cpu", threads=1)
    sample = Sample(tmp_path / "a.png", tmp_path / "a.tif", "a.png", "a", 0.25, tmp_path)
    assert choose_post([sample], engine) == (engine.card.post, 0.0)


def test_looks_count_as_much_as_the_images(
    tiny_model: Path, draw_discs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    centres = [(x, y) for x in range(32, 256, 64) for y in range(32, 256, 64)]
    labels = np.zeros((256, 256), np.int32)
    for i, centre in enumerate(centres, 1):
        labels[draw_discs((256, 256), [centre], 14)[..., 0] < 255] = i
    Image.fromarray(draw_discs((256, 256), centres, 14)).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", labels)
    sample = Sample(tmp_path / "a.png", tmp_path / "a.tif", "a.png", "a", 0.5, tmp_path)  # the network sees it at .25
    engine: Any = load(tiny_model, "cpu", threads=1)
    monkeypatch.setattr("nsam.train.thresholds.CHOICES", {"nucleus_threshold": (0.5,)})
    plain = choose_post([sample], engine)[1]
    assert plain > 0.8
    monkeypatch.setattr("nsam.train.thresholds.random_look", lambda image, rng: image)
    assert choose_post([sample], engine, looks=True)[1] == pytest.approx(plain, abs=0.01)
    monkeypatch.setattr("nsam.train.thresholds.random_look", lambda image, rng: np.full_like(image, 255))
    assert choose_post([sample], engine, looks=True)[1] == pytest.approx(plain / 2, abs=0.01)
