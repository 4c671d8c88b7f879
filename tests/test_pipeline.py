"""Tiling changes nothing: over the same maps, blocks give the very label image of one pass."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from nsam.runtime.canvas import Canvas, Strip
from nsam.runtime.card import InputSpec, ModelCard
from nsam.runtime.engines import Engine
from nsam.runtime.frame import Frame
from nsam.runtime.mapstrip import MapStrip
from nsam.runtime.measure import Nucleus, measure
from nsam.runtime.pipeline import assemble, make_bands, segment_slide, separate_bands
from nsam.runtime.region import Region
from nsam.runtime.slides import ArraySlide
from nsam.runtime.tiles import Grid
from nsam.train.data import find_samples, read_sample
from nsam.train.targets import make_targets


class Replay(Engine):
    """An engine that gives every tile the maps it was told."""

    precision, device = "fp32", "test"

    def __init__(self, card: ModelCard, run: Callable[[NDArray[np.uint8]], NDArray[np.float32]]) -> None:
        self.card = card
        self.run = run


CARD = ModelCard("test", "1", "Apache-2.0")


def label_image(strips: Iterator[Strip]) -> NDArray[np.int32]:
    strips = list(strips)
    assert [strip.y0 for strip in strips] == np.cumsum([0, *(len(s.labels) for s in strips[:-1])]).tolist()
    ids = [nucleus.id for strip in strips for nucleus in strip.nuclei]
    assert ids == list(range(1, len(ids) + 1))
    return np.concatenate([strip.labels for strip in strips])


def mosaic(data_dir: Path, side: int = 4) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """NuInsSeg's first images side by side, 512 px each: crowded and sparse tissue, nuclei cut by the joints."""
    samples = find_samples(data_dir / "nuinsseg")[:: 665 // side**2][: side**2]
    pairs = [read_sample(sample) for sample in samples]
    for i, (_, labels) in enumerate(pairs):
        labels[labels > 0] += 1000 * i
    return tuple(  # type: ignore[return-value]
        np.concatenate([np.concatenate([p[part] for p in pairs[r * side :][:side]], axis=1) for r in range(side)])
        for part in (0, 1)
    )


@pytest.mark.parametrize(("noise", "doubt"), [(0.0, 0.0), (0.08, 0.0), (0.08, 0.97)])
def test_a_mosaic_of_real_images_is_the_same_in_any_blocks(data_dir: Path, noise: float, doubt: float) -> None:
    """2048 x 2048, maps made of real labels, rough as a network's: 1 block against 16 and 81."""
    card = replace(CARD, post=replace(CARD.post, min_probability=doubt))
    truth = mosaic(data_dir)[1]
    targets = make_targets(truth, CARD.output.channels, 2)
    maps = np.stack([(targets[0] - 0.5) * 12, targets[1]]).astype(np.float32)
    maps += np.random.default_rng(0).normal(0, noise, maps.shape).astype(np.float32) * [[[12.0]], [[1.0]]]
    maps = np.concatenate([maps, maps[:1]]).astype(np.float32)  # haematoxylin comes last, whatever it is
    grid = Grid.of((2048, 2048), 0.25, 0.25, 2)

    def run(block_px: int, rows: int, workers: int) -> NDArray[np.int32]:
        parts = (maps[:, y : y + rows] for y in range(0, maps.shape[1], rows))
        frame = Frame(grid, card, 0.25, Region.whole((2048, 2048)), block_px)
        return label_image(assemble(separate_bands(parts, frame, workers=workers), frame))

    whole = run(4096, 1024, 1)
    assert 0 < whole.max() < 500 if doubt else whole.max() > 500, whole.max()
    for block_px, rows, workers in ((512, 192, 1), (512, 192, 3), (230, 100, 2)):
        np.testing.assert_array_equal(run(block_px, rows, workers), whole)


def test_random_blobs_keep_together_at_any_scale() -> None:
    rng = np.random.default_rng(3)
    for mpp in (0.17, 0.25, 0.5):
        grid = Grid.of((700, 500), mpp, 0.25, 2)
        rough = rng.normal(size=(grid.map_wh[1], grid.map_wh[0])).astype(np.float32)
        smooth = cv2.GaussianBlur(rough, (0, 0), 4)
        smooth /= smooth.std()
        maps = np.stack([smooth * 4 - 3, np.clip(smooth / 3, 0, 1), smooth])
        large, small = (Frame(grid, CARD, mpp, Region.whole(grid.level0_wh), px) for px in (1000, 256))
        whole = label_image(assemble(separate_bands(iter([maps]), large), large))
        parts = label_image(assemble(separate_bands(iter([maps[:, :50], maps[:, 50:]]), small), small))
        assert whole.max() > 10
        np.testing.assert_array_equal(parts, whole)


def test_the_network_s_tiles_meet_without_seam(tiny_model: Path, draw_discs: Any) -> None:
    """Where the network itself is local, tiles, batches and one large tile agree."""
    from nsam.runtime.engines import load

    engine = load(tiny_model, device="cpu", threads=1)
    centres = [(x + 9.5, y + 11.5) for x in range(0, 300, 37) for y in range(0, 200, 31)]
    slide = ArraySlide(draw_discs((310, 215), centres, 8), Path("discs.png"))
    a, b = (label_image(segment_slide(slide, engine, 0.25, batch=batch)) for batch in (1, 4))
    np.testing.assert_array_equal(a, b)
    assert a.max() == sum(1 for x, y in centres)


def test_nuclei_larger_than_the_halo_are_counted(tiny_model: Path, draw_discs: Any) -> None:
    from nsam.runtime.engines import load

    engine = load(tiny_model, device="cpu", threads=1)
    image = draw_discs((700, 600), [(300, 300)], 250) & draw_discs((700, 600), [(640, 40), (640, 560)], 20)
    slide = ArraySlide(image, Path("discs.png"))
    for block_px, least, most in ((200, 1, 9), (4096, 0, 0)):
        nuclei = [n for strip in segment_slide(slide, engine, 0.25, block_px=block_px) for n in strip.nuclei]
        assert least <= sum(n.cut for n in nuclei) <= most
        assert [n.cut for n in nuclei if n.area_px < 3000] == [False, False]


def test_progress_ends_at_the_total(tiny_model: Path, draw_discs: Any) -> None:
    from nsam.runtime.engines import load

    seen: list[tuple[int, int]] = []
    slide = ArraySlide(draw_discs((200, 100), [(50, 50)], 8), Path("disc.png"))
    engine = load(tiny_model, device="cpu", threads=1)
    list(segment_slide(slide, engine, 0.25, on_progress=lambda done, total: seen.append((done, total))))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 1


def test_bands_are_kept_and_any_part_of_them_can_be_made(tiny_model: Path, draw_discs: Any, tmp_path: Path) -> None:
    """Killed after any band, or made elsewhere in any order: the strips are the same to the byte."""
    from nsam.runtime.bands import BandStore
    from nsam.runtime.engines import load

    engine = load(tiny_model, device="cpu", threads=1)
    rng = np.random.default_rng(1)
    centres = [tuple(xy) for xy in rng.uniform(0, 380, (150, 2))]
    slide = ArraySlide(draw_discs((390, 380), centres, 7), Path("discs.png"))
    frame = Frame.of(slide, engine.card, 0.25, block_px=128)
    whole = list(segment_slide(slide, engine, 0.25, block_px=128))
    assert len(frame.bands) == 3 <= len(whole)

    def same(strips: list[Strip]) -> bool:
        return all(
            one.y0 == other.y0
            and np.array_equal(one.labels, other.labels)
            and [n._replace(mask=None) for n in one.nuclei] == [n._replace(mask=None) for n in other.nuclei]
            for one, other in zip(whole, strips, strict=True)
        )

    for kept in range(4):
        store = BandStore(tmp_path / str(kept), {"key": "key"})
        for band in reversed(range(kept)):  # each on its own, as another machine would
            store.write(band, next(make_bands(slide, engine, frame, band, band + 1, batch=2 if band else 4)))
        made: list[int] = []
        progress = partial(lambda seen, done, total: seen.append(done), made)
        strips = segment_slide(slide, engine, 0.25, block_px=128, store=store, workers=2, on_progress=progress)
        assert same(list(strips))
        assert bool(made) == (kept < 3)
    (path,) = (tmp_path / "3" / "bands.part").glob("000001-*.npz")
    path.write_bytes(b"cut off")
    assert same(list(segment_slide(slide, engine, 0.25, block_px=128, store=BandStore(tmp_path / "3", {"key": "key"}))))
    other = BandStore(tmp_path / "3", {"key": "other settings"})
    assert not other.has(0)


def test_who_stops_does_not_wait_for_the_rest_of_a_row() -> None:
    """Ctrl-C in a wide slide: a row of it takes a minute."""
    runs: list[int] = []

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        runs.append(len(images))
        time.sleep(0.02)
        return np.zeros((len(images), 2, images.shape[1] // 2, images.shape[1] // 2), np.float32)

    slide = ArraySlide(np.full((2048, 100 * 352, 3), 200, np.uint8), Path("wide.png"))
    card = replace(CARD, input=InputSpec(sizes=(448,), mpp=0.25), post=replace(CARD.post, tile_halo_px=48))
    frame = Frame.of(slide, card, 0.25)
    assert len(frame.tiles[0]) > 90
    bands = make_bands(slide, Replay(card, run), frame, 0, len(frame.bands), batch=1)
    next(bands)
    before = len(runs)
    bands.close()
    assert len(runs) - before < 10


def test_what_two_blocks_own_is_there_once_and_counted() -> None:
    """Each nucleus of the table is in the label image, and the other way round."""

    def nucleus(box: tuple[int, int, int, int]) -> Nucleus:
        labels = np.zeros((60, 60), np.int32)
        labels[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = 1
        ones = np.ones(labels.shape, np.float32)
        return measure(labels, ones, ones, (0, 0), 0.25)[0]

    canvas = Canvas(60)
    canvas.add([nucleus((20, 20, 10, 10)), nucleus((5, 5, 30, 30)), nucleus((30, 8, 20, 20)), nucleus((50, 50, 4, 4))])
    strip = canvas.finish(60)
    assert [(n.id, n.bbox_xywh[0], n.cut) for n in strip.nuclei] == [(1, 5, False), (2, 30, True), (3, 50, False)]
    assert np.unique(strip.labels).tolist() == [0, 1, 2, 3]
    assert strip.doubled == 1


def test_a_window_over_pieces_is_a_window_over_the_maps() -> None:
    """Whatever ends where: windows and pieces of any heights."""
    maps = np.random.default_rng(0).random((2, 60, 9)).astype(np.float32)
    for height in (1, 3, 7):
        for step in (1, 2, 5):
            pieces = [maps[:, y : y + height] for y in range(4, 60, height)]
            strip = MapStrip(iter(pieces), 4)
            for top in range(5, 50, step):
                strip.advance(top, top + 10)
                np.testing.assert_array_equal(strip.columns(2, 7), maps[:, top : top + 10, 2:7])
