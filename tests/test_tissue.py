"""What is tissue, what is glass, and what is ink."""

from __future__ import annotations

import numpy as np
import pytest

from nsam.runtime.tissue import find_tissue


@pytest.mark.parametrize(
    ("colour", "share"),
    [
        ((205, 200, 207), 0.7),  # pale, and more of it than of glass
        ((240, 218, 236), 0.3),  # as light as glass, but pink
        ((205, 235, 240), 0.3),  # pale blue is no pen
        ((85, 60, 90), 0.3),  # a fold, dark and still no black pen
        ((150, 150, 150), 1.0),  # no glass at all, and no colour
        ((180, 120, 90), 0.7),  # DAB
    ],
)
def test_pale_dark_and_grey_tissue_is_tissue(colour: tuple[int, int, int], share: float) -> None:
    image = np.full((200, 200, 3), 244, np.uint8)
    columns = round(200 * share)
    image[:, :columns] = colour
    found = find_tissue(image, 4)
    assert found[:, :columns].all()
    assert not found[:, columns + 10 :].any()


@pytest.mark.parametrize("um_per_px", [2.0, 4.0])
@pytest.mark.parametrize(("side_um", "tissue"), [(70, True), (200, False)])
@pytest.mark.parametrize("edge", [False, True])
def test_ink_is_told_from_pigment_by_its_width(um_per_px: float, side_um: float, tissue: bool, edge: bool) -> None:
    image = np.full((300, 300, 3), 244, np.uint8)
    start, side = 0 if edge else 100, round(side_um / um_per_px)
    image[start : start + side, start : start + side] = (30, 60, 160)
    middle = start + side // 2
    found = find_tissue(image, um_per_px)
    assert found[middle, middle] == tissue
    assert found.any() == tissue, "nor is a pen's rim"
