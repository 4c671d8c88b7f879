"""Does the cut into tiles show? Tile sizes, halos, shifted grids and batches against one pass over the whole region."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import torch
from common_options import json_option
from numpy.typing import NDArray

from nsam.runtime.card import ModelCard
from nsam.runtime.engines import DEFAULT_MODEL
from nsam.runtime.metrics import mean_and_pooled, score
from nsam.runtime.options import Command
from nsam.runtime.pipeline import segment_slide
from nsam.runtime.slides import ArraySlide, open_slide
from nsam.runtime.tiles import tile_rows
from nsam.train.evaluate import TorchEngine
from nsam.train.exported import load_exported
from nsam.train.model import NucleusNet

#: File, µm/px, and the left upper corner of a square region of tissue.
REGIONS = (
    ("CMU-1-Small-Region.svs", 0.499, (700, 600)),
    ("CMU-1-Small-Region.svs", 0.499, (900, 1900)),
    ("hgsc_nest.jpg", 0.5, (300, 300)),
    ("hgsc_stromal_he.jpg", 0.5, (300, 300)),
    ("instanseg_HE_example.tif", 0.5, (240, 300)),
)
SIDE_UM = 448.0
#: Tile, halo, tiles a pass, and how far the grid is shifted, input px. The first seven are what ships, each for the
#: slides that it suits: steps of 112 px, the period of all of the encoder's windows but the largest, of 224 px.
CUTS = (
    (448, 56, 4, 0),
    (560, 56, 1, 0),
    (672, 56, 1, 0),
    (784, 56, 1, 0),
    (896, 56, 1, 0),
    (1008, 56, 1, 0),
    (1120, 56, 1, 0),
    (448, 0, 4, 0),
    (448, 32, 4, 0),
    (448, 112, 4, 0),
    (448, 56, 4, 112),
    (448, 56, 4, 16),  # a token
    (448, 56, 4, 111),
)


@click.command(cls=Command)
@click.argument("slides", type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Path(path_type=Path), help="A folder made by nsam-export. [default: nsam's own]")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@json_option
def main(slides: Path, model: Path | None, threads: int, json_path: Path | None) -> None:
    """Segment regions of SLIDES with torch, cut in several ways; the reference is one pass over the region.

    A nucleus of the reference is `lost` when no other overlaps it by IoU > .5, and `doubled` when two have most of
    themselves in it; both for those that a tile's border crosses, and, since large ones are crossed more often, for
    those that a line half a tile away crosses.
    """
    torch.set_num_threads(threads)
    folder = model or DEFAULT_MODEL
    card = ModelCard.read(folder)
    network = NucleusNet(card.output, card.input.mean, card.input.std)
    load_exported(network, folder)
    network.eval()
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, mpp, (x, y) in REGIONS:
        side, input_side = round(SIDE_UM / mpp), round(SIDE_UM / card.input.mpp)
        with open_slide(slides / name) as slide:
            image = slide.read_region(0, x, y, side, side)
        # At the network's scale from here on: a shifted grid must see the same pixels.
        image = cv2.resize(image, (input_side, input_side), interpolation=cv2.INTER_AREA)
        whole = -(-input_side // 224) * 224
        reference, _ = segment(network, card, image, (whole, 0, 1, 0))
        for cut in CUTS:
            found, seconds = segment(network, card, image, cut)
            lines = border_lines(input_side, cut)
            rows.setdefault(str(cut), []).append({**compare(reference, found, *lines), "seconds": seconds})
    results = [{"cut": cut, **summary(of_cut)} for cut, of_cut in rows.items()]
    click.echo(
        "tile halo batch shift |   PQ against one pass | lost at borders, elsewhere | doubled at borders, elsewhere"
    )
    for row in results:
        click.echo(
            f"{row['cut']:>22} | {row['pq']:.4f} | {share(row, 'lost', 'border')}, {share(row, 'lost', 'away')} | "
            f"{share(row, 'doubled', 'border')}, {share(row, 'doubled', 'away')} | {row['seconds']:.0f}"
        )
    if json_path:
        json_path.write_text(json.dumps({"model": card.version, "results": results}, indent=1), encoding="utf-8")


def segment(
    network: torch.nn.Module, card: ModelCard, image: NDArray[np.uint8], cut: tuple[int, int, int, int]
) -> tuple[NDArray[np.int32], float]:
    """Labels of the image under a cut, and seconds."""
    size, halo, batch, shift = cut
    card = replace(card, input=replace(card.input, sizes=(size,)), post=replace(card.post, tile_halo_px=halo))
    shifted = np.pad(image, ((shift, 0), (shift, 0), (0, 0)), mode="reflect")  # as the runtime mirrors at an edge
    begin = time.perf_counter()
    engine = TorchEngine(network, card, torch.device("cpu"))
    strips = segment_slide(ArraySlide(shifted, Path("region")), engine, card.input.mpp, batch=batch)
    labels = np.concatenate([strip.labels for strip in strips])[shift:, shift:]
    return labels, time.perf_counter() - begin


def border_lines(image_side: int, cut: tuple[int, int, int, int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(H, W) bool: px to both sides of a border between what two tiles write, and of lines half a tile away."""
    size, halo, _, shift = cut
    side = image_side + shift
    starts = np.unique([tile.write.x0 for tile in next(tile_rows((side, side), size, halo))])[1:]
    lines = []
    for away in (0, (size - 2 * halo) // 2):
        line = np.zeros((side, side), bool)
        for start in starts - away:
            line[start - 1 : start + 1] = line[:, start - 1 : start + 1] = True
        lines.append(line[shift:, shift:])
    return lines[0], lines[1]


def compare(
    reference: NDArray[np.int32], found: NDArray[np.int32], borders: NDArray[np.bool_], away: NDArray[np.bool_]
) -> dict[str, Any]:
    """Score, and what became of each nucleus of the reference."""
    crossed = {
        place: set(np.unique(reference[lines]).tolist()) - {0} for place, lines in (("border", borders), ("away", away))
    }
    areas = np.bincount(found.ravel())
    counts = {f"{what}{place}": 0 for place in crossed for what in ("", "lost_", "doubled_")}
    for label in crossed["border"] | crossed["away"]:
        inside = found[reference == label]
        overlaps = np.bincount(inside)
        overlaps[0] = 0
        ids = np.flatnonzero(overlaps)
        iou = [overlaps[i] / (areas[i] + inside.size - overlaps[i]) for i in ids]
        for place, labels in crossed.items():
            if label in labels:
                counts[place] += 1
                counts[f"lost_{place}"] += int(max(iou, default=0) <= 0.5)
                counts[f"doubled_{place}"] += int(sum(overlaps[i] > areas[i] / 2 for i in ids) > 1)
    return {"score": score(reference, found), **counts}


def share(row: dict[str, Any], what: str, place: str) -> str:
    """How many, and of how many."""
    return f"{row[f'{what}_{place}']} of {row[place]} ({row[f'{what}_{place}'] / max(row[place], 1):.1%})"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Pooled PQ, and sums."""
    pooled = mean_and_pooled(row["score"] for row in rows)[1]
    return {"pq": pooled["pq"], **{key: sum(row[key] for row in rows) for key in rows[0] if key != "score"}}


if __name__ == "__main__":
    main()
