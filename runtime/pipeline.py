"""Slide -> strips of labels and nuclei: read | infer | separate | own, each stage in threads of its own.

The network fills a rolling strip of maps, each map px predicted once; blocks of it are separated with a halo, and
a nucleus belongs to the block whose write box holds its centroid. Nothing is merged. A band is what a row of blocks
owns; bands can be kept on disk and made in any order. Ids follow the raster order of the nuclei's first pixels, so
they depend neither on the blocks nor on the threads.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from nsam.runtime.bands import BandStore
from nsam.runtime.canvas import Canvas, Strip
from nsam.runtime.engines import Engine
from nsam.runtime.frame import BLOCK_PX, Frame
from nsam.runtime.level0 import carry, nearest
from nsam.runtime.mapstrip import MapStrip
from nsam.runtime.measure import Nucleus, measure
from nsam.runtime.prefetch import prefetch
from nsam.runtime.region import Region
from nsam.runtime.slides import Slide, read_input
from nsam.runtime.stains import haematoxylin
from nsam.runtime.tiles import Block, Box, Tile, map_span
from nsam.runtime.watershed import separate

READ_AHEAD = 2  # batches of tiles before the network
PIECE_ROWS = 64  # of a piece of the maps, at most
STRIP_PX = 256  # rows of a strip of labels, at most
_SURELY_NOT = -20.0  # logit

Progress = Callable[[int, int], None]


def segment_slide(
    slide: Slide,
    engine: Engine,
    mpp: float,
    *,
    batch: int = 4,
    region: Region | None = None,
    block_px: int = BLOCK_PX,
    workers: int = 1,
    store: BandStore | None = None,
    on_progress: Progress | None = None,
) -> Generator[Strip, None, None]:
    """Segment a slide, strip by strip, in memory that grows with its width only.

    Args:
        slide: an open slide.
        engine: the network.
        mpp: µm per level-0 px.
        batch: tiles of `card.input.size` in a pass of the network; of larger ones as many as have their pixels.
        region: where nuclei are wanted; tiles that cannot change one there are skipped. None: everywhere.
        block_px: side of a post-processing block; the result does not depend on it.
        workers: threads that separate nuclei while the network runs on; the result does not depend on them.
        store: keeps finished bands, and gives those of an earlier run.
        on_progress: called with (tiles done, tiles in all).

    Yields:
        `Strip`s that cover the slide.

    Raises:
        InputError: the slide could not be read.
    """
    frame = Frame.of(slide, engine.card, mpp, region, block_px)
    with closing(_stored_or_made(slide, engine, frame, batch, workers, store, on_progress)) as made:
        yield from assemble(made, frame)


def assemble(bands: Iterable[list[Nucleus]], frame: Frame) -> Iterator[Strip]:
    """All bands of a slide, top to bottom -> its strips."""
    canvas = Canvas(frame.grid.level0_wh[0])
    height = frame.grid.level0_wh[1]
    for nuclei, row in zip(bands, frame.bands, strict=True):
        canvas.add(nuclei)
        # The next band can still add nuclei that begin in its halo.
        y1 = row[0].write.y1
        end = height if y1 == height else max(canvas.y0, y1 - frame.halo)
        while canvas.y0 < end:
            yield canvas.finish(min(end, canvas.y0 + STRIP_PX))


def make_bands(
    slide: Slide,
    engine: Engine,
    frame: Frame,
    first: int,
    last: int,
    *,
    batch: int = 4,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> Generator[list[Nucleus], None, None]:
    """The nuclei that bands [first, last) own, each measured, ids 0; see `segment_slide`.

    Maps at the upper and lower end are predicted for the neighbours, too: by the same tiles, so to the same values.
    """
    rows = range(*frame.tile_rows(first, last))
    total, done = sum(len(frame.wanted(frame.tiles[row])) for row in rows), 0

    stop = threading.Event()

    def count(tiles: int) -> None:
        nonlocal done
        if stop.is_set():
            raise InterruptedError("nobody waits for the rest of this row")
        done += tiles
        if on_progress:
            on_progress(done, total)

    # A row of tiles may wait for the separation, while the network fills the next.
    ahead = math.ceil(frame.tile_px / frame.card.output.stride / PIECE_ROWS)
    with closing(prefetch(map_rows(slide, engine, frame, rows, batch, count), ahead, stop)) as maps:
        yield from separate_bands(maps, frame, first, last, workers)


def map_rows(
    slide: Slide,
    engine: Engine,
    frame: Frame,
    rows: range | None = None,
    batch: int = 4,
    on_tiles: Callable[[int], None] = lambda tiles: None,
) -> Iterator[NDArray[np.float32]]:
    """The maps that all rows of tiles make, or those of `rows`, in pieces from top to bottom.

    A piece is (C + 1, h, map width) float32, of `PIECE_ROWS` rows or less, so that memory is free again piece by piece.
    The last channel is haematoxylin: made of the pixels that the network sees, so that the slide is read once.
    """
    stride = frame.card.output.stride
    at_once = frame.card.input.scaled(batch, frame.tile_px)
    chosen = frame.tiles if rows is None else [frame.tiles[row] for row in rows]
    wanted = [frame.wanted(row) for row in chosen]
    # What a skipped tile would have said: no nucleus.
    nothing = np.array([_SURELY_NOT if kind == "logit" else 0 for kind in (*frame.card.output.kinds, "stain")])

    read: deque[tuple[list[Tile], NDArray[np.float32]]] = deque()  # tiles and their stain, until their maps come

    def batches() -> Iterator[NDArray[np.uint8]]:
        # A batch ends with its row, so a tile's company, and with it the last bit of its maps, is always the same.
        for row in wanted:
            for start in range(0, len(row), at_once):
                tiles = row[start : start + at_once]
                images = np.stack([read_input(slide, tile.read, frame.grid) for tile in tiles])
                read.append((tiles, haematoxylin(images, stride)))
                yield images

    with closing(prefetch(batches(), READ_AHEAD)) as images, closing(engine.run_all(images)) as results:
        for row, needed in zip(chosen, wanted, strict=True):
            top, bottom = frame.written(row)
            starts = range(0, bottom - top, PIECE_ROWS)
            heights = [min(PIECE_ROWS, bottom - top - start) for start in starts]
            pieces = [np.empty((nothing.size, height, frame.grid.map_wh[0]), np.float32) for height in heights]
            if len(needed) < len(row):
                for piece in pieces:
                    piece[:] = nothing[:, None, None]
            filled = 0
            while filled < len(needed):
                maps = next(results)
                tiles, stains = read.popleft()
                for tile, result, stain in zip(tiles, maps, stains, strict=True):
                    left, right = tile.write.x0 // stride, -(-tile.write.x1 // stride)
                    x, y = left - tile.read.x0 // stride, top - tile.read.y0 // stride
                    for start, height, piece in zip(starts, heights, pieces, strict=True):
                        of = np.s_[..., y + start : y + start + height, x : x + right - left]
                        piece[:-1, :, left:right] = result[of]
                        piece[-1, :, left:right] = stain[of]
                filled += len(tiles)
                on_tiles(len(tiles))
            while pieces:
                yield pieces.pop(0)


def separate_bands(
    pieces: Iterator[NDArray[np.float32]], frame: Frame, first: int = 0, last: int | None = None, workers: int = 1
) -> Iterator[list[Nucleus]]:
    """Separate and measure the nuclei of bands [first, last) in maps that arrive as from `map_rows`."""
    last = len(frame.bands) if last is None else last
    strip = MapStrip(pieces, frame.written(frame.tiles[frame.tile_rows(first, last)[0]])[0])
    with ThreadPoolExecutor(workers, "nsam-separate") as pool:
        for band in range(first, last):
            strip.advance(*frame.map_rows(band))
            futures = [pool.submit(block_nuclei, strip, block, frame) for block in frame.bands[band]]
            yield [nucleus for future in futures for nucleus in future.result()]


def block_nuclei(maps: MapStrip, block: Block, frame: Frame) -> list[Nucleus]:
    """The nuclei that a block owns.

    Args:
        maps: holds those of the block's band.
        block: of one of the frame's bands.
        frame: the slide's.
    """
    grid, post = frame.grid, frame.card.post
    if not frame.region.meets(block.write):
        return []
    left, right = map_span(block.read.x0, block.read.x1, grid.map_per_level0[0], grid.map_wh[0])
    part = maps.columns(left, right)
    basins = separate(part, frame.card.output, post, frame.mpp / grid.map_per_level0[0])
    labels, probability = carry(basins, part[0], post.nucleus_threshold, (left, maps.top), block.read, grid)
    stain = nearest(part[-1], (left, maps.top), block.read, grid)
    corner = (block.read.x0, block.read.y0)
    found = measure(labels, probability, stain, corner, frame.mpp, post.min_area_um2, post.min_probability)
    owned = [nucleus for nucleus in found if _owns(block.write, nucleus) and frame.region.holds(*nucleus.centroid_xy)]
    return [nucleus._replace(id=0, cut=_is_cut(nucleus, block.read, grid.level0_wh)) for nucleus in owned]


def _stored_or_made(
    slide: Slide,
    engine: Engine,
    frame: Frame,
    batch: int,
    workers: int,
    store: BandStore | None,
    on_progress: Progress | None,
) -> Generator[list[Nucleus], None, None]:
    """All bands, top to bottom: from the store where they are, else made, and stored."""
    count = len(frame.bands)
    band = 0
    while band < count:
        if store and (nuclei := store.read(band)) is not None:
            yield nuclei
            band += 1
            continue
        end = band + 1
        while end < count and not (store and store.has(end)):
            end += 1
        made = make_bands(slide, engine, frame, band, end, batch=batch, workers=workers, on_progress=on_progress)
        with closing(made):
            for nuclei in made:
                if store:
                    store.write(band, nuclei)
                yield nuclei
                band += 1


def _owns(write: Box, nucleus: Nucleus) -> bool:
    x, y = nucleus.centroid_xy
    return write.x0 <= x < write.x1 and write.y0 <= y < write.y1


def _is_cut(nucleus: Nucleus, read: Box, size_wh: tuple[int, int]) -> bool:
    """Whether it reaches the end of what its block has read, where the slide goes on."""
    x, y, width, height = nucleus.bbox_xywh
    return (
        (x == read.x0 > 0)
        or (y == read.y0 > 0)
        or (x + width == read.x1 < size_wh[0])
        or (y + height == read.y1 < size_wh[1])
    )
