"""Measurements against scikit-image's, and in the slide's coordinates."""

import cv2
import numpy as np
import pytest
import shapely
from skimage.measure import regionprops_table

from nsam.runtime.measure import Nucleus, measure


def ellipses(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = np.zeros((200, 240), np.int32)
    for i in range(25):
        centre = (int(rng.integers(0, 240)), int(rng.integers(0, 200)))
        axes = (int(rng.integers(1, 16)), int(rng.integers(1, 12)))
        cv2.ellipse(labels, centre, axes, float(rng.uniform(0, 180)), 0, 360, 3 * i + 1, -1)
    return labels


def measure_shapes(labels: np.ndarray, origin_xy: tuple[int, int], mpp: float, least: float = 0) -> list[Nucleus]:
    ones = np.ones(labels.shape, np.float32)
    return measure(labels, ones, ones, origin_xy, mpp, least)


def largest_pieces(labels: np.ndarray) -> np.ndarray:
    result = np.zeros_like(labels)
    for value in np.unique(labels)[1:]:
        _, pieces, stats, _ = cv2.connectedComponentsWithStats((labels == value).astype(np.uint8), connectivity=8)
        result[pieces == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()] = value
    return result


def test_of_several_pieces_the_largest_is_measured() -> None:
    labels = ellipses()
    whole = largest_pieces(labels)
    assert (whole != labels).any()
    probability = np.random.default_rng(1).random(labels.shape).astype(np.float32)
    values = probability, probability[::-1]
    for a, b in zip(measure(labels, *values, (7, 9), 0.5), measure(whole, *values, (7, 9), 0.5), strict=True):
        np.testing.assert_array_equal(a.mask, b.mask)
        assert a._replace(mask=b.mask) == b


def test_small_nuclei_are_left_out() -> None:
    labels = np.array([[1, 1, 0, 3], [1, 1, 0, 3]], np.int32)
    for least, wanted in ((0.75, [1]), (0.5, [1, 3]), (1.01, [])):
        assert [n.id for n in measure_shapes(labels, (0, 0), 0.5, least)] == wanted


def test_doubtful_nuclei_are_left_out_and_so_are_doubtful_largest_pieces() -> None:
    labels = np.array([[1, 1, 0, 1, 0, 2]], np.int32)
    for likely, wanted in (
        ([0.8, 0.8, 0, 0.6, 0, 0.6], [1]),
        ([0.6, 0.6, 0, 1, 0, 0.7], [2]),
        ([1, 1, 0, 0, 0, 0], [1]),
    ):
        probability = np.array([likely], np.float32)
        found = measure(labels, probability, probability, (0, 0), 0.5, min_probability=0.65)
        assert [n.id for n in found] == wanted


def test_measurements_equal_regionprops() -> None:
    labels = largest_pieces(ellipses())
    probability = np.random.default_rng(1).random(labels.shape).astype(np.float32)
    found = measure(labels, probability, 2 * probability, (0, 0), 0.5)
    names = ("label", "area", "centroid", "axis_major_length", "axis_minor_length", "eccentricity", "mean_intensity")
    wanted = regionprops_table(labels, probability, properties=names)
    assert [n.id for n in found] == wanted["label"].tolist()
    np.testing.assert_array_equal([n.area_px for n in found], wanted["area"])
    np.testing.assert_allclose([n.area_um2 for n in found], wanted["area"] * 0.25)
    np.testing.assert_allclose([n.centroid_xy[0] for n in found], wanted["centroid-1"] + 0.5)
    np.testing.assert_allclose([n.centroid_xy[1] for n in found], wanted["centroid-0"] + 0.5)
    np.testing.assert_allclose([n.major_um for n in found], wanted["axis_major_length"] * 0.5)
    np.testing.assert_allclose([n.minor_um for n in found], wanted["axis_minor_length"] * 0.5)
    np.testing.assert_allclose([n.eccentricity for n in found], wanted["eccentricity"], atol=1e-6)
    np.testing.assert_allclose([n.probability for n in found], wanted["mean_intensity"], rtol=1e-5)
    np.testing.assert_allclose([n.haematoxylin for n in found], 2 * wanted["mean_intensity"], rtol=1e-5)
    convex = regionprops_table(labels, properties=("solidity",))["solidity"]
    np.testing.assert_allclose([n.solidity for n in found], convex, atol=0.15)  # skimage counts pixels in the hull


@pytest.mark.parametrize("radius", [8, 12, 20, 50])
def test_perimeter_of_a_circle(radius: int) -> None:
    """A polygon through pixel centres alone overstates it by 6 %, and circularity is then .89."""
    labels = np.zeros((120, 120), np.int32)
    y, x = np.mgrid[:120, :120] - 59.5
    labels[x**2 + y**2 <= radius**2] = 1
    (nucleus,) = measure_shapes(labels, (0, 0), 0.25)
    assert nucleus.perimeter_um == pytest.approx(2 * np.pi * radius * 0.25, rel=0.02)


def test_origin_moves_every_coordinate_and_nothing_else() -> None:
    labels = ellipses(1)
    for a, b in zip(measure_shapes(labels, (0, 0), 1), measure_shapes(labels, (1000, 70), 1), strict=True):
        assert b.centroid_xy == (pytest.approx(a.centroid_xy[0] + 1000), pytest.approx(a.centroid_xy[1] + 70))
        assert b.first_yx == (a.first_yx[0] + 70, a.first_yx[1] + 1000)
        assert b.bbox_xywh == (a.bbox_xywh[0] + 1000, a.bbox_xywh[1] + 70, *a.bbox_xywh[2:])
        assert b.solidity == a.solidity
        assert b.area_px == a.area_px


def test_solidity_is_against_the_hull_of_the_pixels_squares() -> None:
    labels = ellipses(2)
    labels[:3, :9] = [[200, 0, 0, 201, 0, 0, 202, 202, 202], [0, 200, 0, 201, 0, 0, 202, 202, 202], [0] * 9]
    labels = largest_pieces(labels)
    for nucleus in measure_shapes(labels, (0, 0), 1):
        y, x = np.nonzero(labels == nucleus.id)
        squares = shapely.union_all(shapely.box(x, y, x + 1, y + 1))
        assert nucleus.solidity == pytest.approx(nucleus.area_px / squares.convex_hull.area)
        assert 0 < nucleus.solidity <= 1


def test_nothing_in_an_empty_image() -> None:
    assert measure_shapes(np.zeros((5, 5), np.int32), (0, 0), 0.25) == []


def image(*rows: str) -> np.ndarray:
    return np.array([[int(c) for c in row] for row in rows], np.int32)


def test_the_first_pixel_is_the_topmost_then_leftmost() -> None:
    (nucleus,) = measure_shapes(image("0000", "0011", "0110", "0100"), (10, 20), 1)
    assert (nucleus.first_yx, nucleus.bbox_xywh) == ((21, 12), (11, 21, 3, 3))


def test_pieces_that_meet_at_a_corner_are_one() -> None:
    (nucleus,) = measure_shapes(image("1100000", "0011000", "0000000", "0000111"), (0, 0), 1)
    assert (nucleus.area_px, nucleus.bbox_xywh) == (4, (0, 0, 4, 2))


def test_a_nucleus_as_wide_as_its_block() -> None:
    """The end of a row and the beginning of the next are not neighbours."""
    wide, other = measure_shapes(image("0001", "1111", "1112", "2222"), (0, 0), 1)
    assert (wide.area_px, wide.bbox_xywh, wide.first_yx) == (8, (0, 0, 4, 3), (0, 3))
    assert (other.area_px, other.bbox_xywh, other.first_yx) == (5, (0, 2, 4, 2), (2, 3))
    assert wide.centroid_xy == (2, 1.75)


def test_who_reaches_the_least_probability_stays() -> None:
    labels = np.ones((2, 2), np.int32)
    values = np.full((2, 2), 0.75, np.float32)
    assert len(measure(labels, values, values, (0, 0), 1, min_probability=0.75)) == 1
