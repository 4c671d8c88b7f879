"""Worked 4 x 4 cases: each figure can be checked by hand."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from nsam.runtime.metrics import Score, mean_and_pooled, score


def image(*rows: str) -> np.ndarray:
    return np.array([[int(c) for c in row] for row in rows], np.int32)


TRUTH = image("1100", "1100", "0022", "0022")


def test_the_same_image_is_perfect_whatever_its_ids() -> None:
    other_ids = np.where(TRUTH == 1, 700, np.where(TRUTH == 2, 3, 0))
    assert set(score(TRUTH, other_ids).as_dict().values()) == {1.0}


def test_one_found_exactly_one_missed() -> None:
    found = score(TRUTH, image("1100", "1100", "0000", "0000"))
    assert found.dice == pytest.approx(2 * 4 / (8 + 4))
    assert found.aji == found.aji_plus == pytest.approx(4 / (4 + 4))
    assert (found.dq, found.sq, found.pq, found.f1) == pytest.approx((2 / 3, 1, 2 / 3, 2 / 3))
    assert (found.count_true, found.count_predicted, found.matched) == (2, 1, 1)


def test_merged_nuclei_use_a_prediction_twice_in_aji_and_once_in_aji_plus() -> None:
    merged = (TRUTH > 0).astype(np.int32)
    found = score(TRUTH, merged)
    assert found.dice == 1
    # AJI: both take the one prediction of 8 px: (4 + 4) / (8 + 8). AJI+: one pair 4 / 8, and 4 px missed.
    assert found.aji == pytest.approx(8 / 16)
    assert found.aji_plus == pytest.approx(4 / 12)
    assert found.pq == 0  # IoU is .5, and a match needs more


def test_iou_of_exactly_half_is_no_match_and_more_is() -> None:
    truth = image("1111", "0000", "0000", "0000")
    assert score(truth, image("1100", "0000", "0000", "0000")).matched == 0
    found = score(truth, image("1110", "0000", "0000", "0000"))
    assert found.matched == 1
    assert found.pq == pytest.approx(0.75)


def test_prediction_never_chosen_adds_its_area() -> None:
    found = score(image("1110", "0000", "0000", "0000"), image("1110", "0000", "0022", "0000"))
    assert found.aji == pytest.approx(3 / (3 + 2))


def test_aji_takes_the_best_of_several() -> None:
    found = score(image("1111", "0000", "0000", "0000"), image("1222", "0000", "0000", "0000"))
    assert found.aji == pytest.approx(3 / (4 + 1))


def test_empty_images() -> None:
    empty = np.zeros((4, 4), np.int32)
    assert set(score(empty, empty).as_dict().values()) == {1.0}
    assert set(score(TRUTH, empty).as_dict().values()) == {0.0}
    assert set(score(empty, TRUTH).as_dict().values()) == {0.0}


def test_ids_beyond_8_bits_and_pieces_count_as_they_are() -> None:
    truth = image("1010", "0000", "0000", "0000") * 40_000
    assert score(truth, truth).count_true == 1
    assert score(truth, image("1020", "0000", "0000", "0000")).matched == 0


def test_mean_and_pooled_differ() -> None:
    large, small = Score(foreground_true=90, foreground_predicted=90, foreground_both=90), Score(foreground_true=10)
    mean, pooled = mean_and_pooled([large, small])
    assert mean["dice"] == pytest.approx(0.5)
    assert pooled["dice"] == pytest.approx(180 / 190)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        score(TRUTH, TRUTH[:2])
    with pytest.raises(ValueError, match="integer"):
        score(TRUTH, TRUTH.astype(float))


def test_pairs_of_aji_plus_are_the_best_there_are() -> None:
    """Against another library's assignment, on labels shifted so far that each nucleus touches several."""
    labels = np.arange(1, 401).reshape(20, 20).repeat(10, 0).repeat(10, 1)
    rng = np.random.default_rng(0)
    for _ in range(5):
        truth, predicted = (
            np.where(rng.random(labels.shape) < 0.8, np.roll(labels, rng.integers(0, 9, 2), (0, 1)), 0) for _ in "ab"
        )
        iou, overlap, union = (np.zeros((401, 401)) for _ in range(3))
        np.add.at(overlap, (truth.ravel(), predicted.ravel()), 1)
        union[:] = np.bincount(truth.ravel())[:, None] + np.bincount(predicted.ravel()) - overlap
        iou[1:, 1:] = (overlap / union)[1:, 1:]
        pairs = linear_sum_assignment(iou, maximize=True)
        paired = iou[pairs] > 0
        t, p = pairs[0][paired], pairs[1][paired]
        missed = (
            np.delete(np.bincount(truth.ravel()), [0, *t]).sum()
            + np.delete(np.bincount(predicted.ravel()), [0, *p]).sum()
        )
        found = score(truth, predicted)
        assert found.aji_plus_intersection == overlap[t, p].sum()
        assert found.aji_plus_union == union[t, p].sum() + missed


def test_each_image_counts_the_same_in_the_mean() -> None:
    perfect, missed = Score(foreground_true=9, foreground_predicted=9, foreground_both=9), Score(foreground_true=9)
    assert mean_and_pooled([perfect, missed, missed])[0]["dice"] == pytest.approx(1 / 3)
