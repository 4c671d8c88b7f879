"""The gates of the proof are where they are said to be, and nothing passes beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nsam.export.parity import Chain, as_json
from nsam.runtime.errors import ModelError
from nsam.runtime.metrics import Score


def dice_of(*shares: float) -> list[Score]:
    """Scores of two images, a large and a small one, whose Dice are the shares, and whose other figures are 1."""
    return [Score(n, n, round(n * share)) for n, share in zip((100_000, 1000), shares, strict=True)]


@pytest.mark.parametrize(
    ("rewrites_only", "change", "before", "after", "passed"),
    [
        (True, (slice(None), 5e-5), (1, 1), (0.5, 0.5), True),
        (True, (3, 2e-4), (1, 1), (1, 1), False),
        (False, (slice(None), 8e-3), (1, 1), (0.999, 0.999), True),
        (False, (3, 1.5e-2), (1, 1), (1, 1), False),  # one tile of six
        (False, (3, 0), (1, 1), (1, 0.994), False),  # each image counts the same
        (False, (3, 0), (1, 0.994), (1, 1), False),  # better is different, too
    ],
)
def test_gates_are_where_they_are_said_to_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rewrites_only: bool,
    change: tuple[Any, float],
    before: tuple[float, float],
    after: tuple[float, float],
    passed: bool,
) -> None:
    tiles = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    maps = np.random.default_rng(0).normal(size=(6, 2, 4, 4)).astype(np.float32)

    class Told:
        def __init__(self, maps: NDArray[np.float32]) -> None:
            self.maps = maps

        def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
            return self.maps[images[:, 0, 0, 0]]

    scores = iter([before, after])
    monkeypatch.setattr("nsam.export.parity.score_samples", lambda *_: [("", s) for s in dice_of(*next(scores))])
    chain = Chain(tiles, [], [], tmp_path)
    chain.add("one", Told(maps))
    changed = maps.copy()
    changed[change[0], 1] += 2 * change[1] if not rewrites_only else change[1]  # one of two channels: half in the mean
    if passed:
        assert chain.prove("one", "other", Told(changed), rewrites_only=rewrites_only).passed
    else:
        with pytest.raises(ModelError, match="parity `one -> other` failed"):
            chain.prove("one", "other", Told(changed), rewrites_only=rewrites_only)
    assert [link.passed for link in chain.links] == [passed]
    if change == (3, 2e-4):
        assert chain.links[0].worst_tile == 3
    chain.links.insert(0, replace(chain.links[0], passed=True))
    assert as_json(chain)["passed"] is passed
    assert chain.failed() == ({} if passed else {"other": "one -> other"})
