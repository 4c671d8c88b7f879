"""Nuclei of blocks come together: numbers, doubles and what was cut do not depend on where blocks end."""

from __future__ import annotations

import numpy as np
import pytest
from test_measure import ellipses, measure_shapes

from nsam.runtime.bands import pack, unpack
from nsam.runtime.canvas import Canvas
from nsam.runtime.measure import Nucleus, measure


def rectangle(x: int, y: int, width: int, height: int) -> Nucleus:
    ones = np.ones((height, width), np.int32)
    return measure(ones, ones.astype(np.float32), ones.astype(np.float32), (x, y), 0.25)[0]


def test_a_strip_numbers_what_begins_in_its_rows_and_no_more() -> None:
    """The next band may add a nucleus that begins in the same row, farther left: it comes first."""
    canvas = Canvas(40)
    canvas.add([rectangle(20, 10, 4, 4), rectangle(2, 9, 4, 4)])
    first = canvas.finish(10)
    assert [(n.id, n.first_yx) for n in first.nuclei] == [(1, (9, 2))]
    canvas.add([rectangle(10, 10, 4, 4)])
    second = canvas.finish(20)
    assert [(n.id, n.first_yx) for n in second.nuclei] == [(2, (10, 10)), (3, (10, 20))]
    labels = np.concatenate([first.labels, second.labels])
    assert np.bincount(labels.ravel()).tolist() == [20 * 40 - 48, 16, 16, 16]


@pytest.mark.parametrize(("shared", "kept", "doubled"), [(0, 2, 0), (5, 2, 0), (6, 1, 1), (10, 1, 1)])
def test_a_nucleus_goes_where_more_than_half_of_it_is_another_s(shared: int, kept: int, doubled: int) -> None:
    canvas = Canvas(40)
    canvas.add([rectangle(0, 0, 10, 10), rectangle(10 - shared, 1, 10, 5)])
    strip = canvas.finish(20)
    assert (len(strip.nuclei), strip.doubled) == (kept, doubled)
    assert [n.cut for n in strip.nuclei] == [False, shared > 0][:kept]
    assert np.unique(strip.labels).tolist() == list(range(kept + 1))


def test_what_its_block_cut_stays_cut() -> None:
    canvas = Canvas(40)
    canvas.add([rectangle(0, 0, 10, 10)._replace(cut=True), rectangle(20, 0, 10, 10)])
    assert [n.cut for n in canvas.finish(20).nuclei] == [True, False]


def test_a_band_comes_back_as_it_was() -> None:
    nuclei = [n._replace(id=0, cut=i % 3 == 0) for i, n in enumerate(measure_shapes(ellipses(), (1000, 70), 0.25))]
    back = unpack(pack(nuclei))
    assert [n._replace(mask=None) for n in back] == [n._replace(mask=None) for n in nuclei]
    for one, other in zip(nuclei, back, strict=True):
        np.testing.assert_array_equal(one.mask, other.mask)
    assert unpack(pack([])) == []
