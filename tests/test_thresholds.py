"""Thresholds are those that the validation images ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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
