"""Does the cut into tiles show? Tile sizes, halos, shifted grids and batches against one pass over the whole region."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from nsam.runtime.card import ModelCard
from nsam.runtime.engines import DEFAULT_MODEL
from nsam.runtime.frame import Frame
from nsam.runtime.metrics import mean_and_pooled, score
from nsam.runtime.pipeline import segment_slide
from nsam.runtime.slides import ArraySlide, open_slide
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
#: Tile, halo, tiles a pass, and how far the grid is shifted, input px. The first is what ships.
CUTS = (
    (448, 32, 4, 0),
    (448, 32, 1, 0),
    (448, 32, 4, 111),
    (448, 0, 4, 0),
    (448, 16, 4, 0),
    (448, 64, 4, 0),
    (448, 112, 4, 0),  # steps of 224, the period of the windows
    (896, 32, 1, 0),
    (896, 112, 1, 0),
)


@click.command()
@click.argument("slides", type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Path(path_type=Path), help="A folder made by nsam-export. [default: nsam's own]")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
def main(slides: Path, model: Path | None, threads: int, json_path: Path | None) -> None:
    """Segment regions of SLIDES with torch, cut in several ways; the reference is one pass over the region.

    A nucleus of the reference is `lost` when no other overlaps it by IoU > .5, and `doubled` when two have most of
    themselves in it; both for those that a tile's border crosses, and for the others.
    """
    torch.set_num_threads(threads)
    folder = model or DEFAULT_MODEL
    card = ModelCard.read(folder)
    network = NucleusNet(card.output, card.input.mean, card.input.std)
    load_exported(network, folder)
    network.eval()
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, mpp, (x, y) in REGIONS:
        side = round(SIDE_UM / mpp)
        with open_slide(slides / name) as slide:
            image = slide.read_region(0, x, y, side, side).copy()
        whole = -(-round(side * mpp / card.input.mpp) // 224) * 224
        reference, _ = segment(network, card, image, mpp, (whole, 0, 1, 0))
        for cut in CUTS:
            found, seconds = segment(network, card, image, mpp, cut)
            borders = border_lines(card, image, mpp, cut)
            rows.setdefault(str(cut), []).append({**compare(reference, found, borders), "seconds": seconds})
    results = [{"cut": cut, **summary(of_cut)} for cut, of_cut in rows.items()]
    click.echo(
        "tile halo batch shift |   PQ against one pass | lost at borders, elsewhere | doubled at borders, elsewhere"
    )
    for row in results:
        click.echo(
            f"{row['cut']:>22} | {row['pq']:.4f} | {row['lost_border']} of {row['border']}, {row['lost_else']} of "
            f"{row['else']} | {row['doubled_border']}, {row['doubled_else']} | {row['seconds']:.0f} s"
        )
    if json_path:
        json_path.write_text(json.dumps({"model": card.version, "results": results}, indent=1), encoding="utf-8")


def segment(
    network: torch.nn.Module, card: ModelCard, image: NDArray[np.uint8], mpp: float, cut: tuple[int, int, int, int]
) -> tuple[NDArray[np.int32], float]:
    """Labels of the image under a cut, and seconds."""
    size, halo, batch, shift = cut
    card = replace(card, input=replace(card.input, size=size), post=replace(card.post, tile_halo_px=halo))
    pad = round(shift * card.input.mpp / mpp)
    shifted = np.pad(image, ((pad, 0), (pad, 0), (0, 0)), mode="reflect")  # as the runtime mirrors at an edge
    begin = time.perf_counter()
    engine = TorchEngine(network, card, torch.device("cpu"))
    strips = segment_slide(ArraySlide(shifted, Path("region")), engine, mpp, batch=batch)
    labels = np.concatenate([strip.labels for strip in strips])[pad:, pad:]
    return labels, time.perf_counter() - begin


def border_lines(
    card: ModelCard, image: NDArray[np.uint8], mpp: float, cut: tuple[int, int, int, int]
) -> NDArray[np.bool_]:
    """(H, W) bool: the px to both sides of a border between what two tiles write."""
    size, halo, _, shift = cut
    pad = round(shift * card.input.mpp / mpp)
    card = replace(card, input=replace(card.input, size=size), post=replace(card.post, tile_halo_px=halo))
    blank = np.zeros((image.shape[0] + pad, image.shape[1] + pad, 3), np.uint8)
    frame = Frame.of(ArraySlide(blank, Path("region")), card, mpp)
    lines = np.zeros(blank.shape[:2], bool)
    scale = card.input.mpp / mpp
    for y0 in {tile.write.y0 for row in frame.tiles for tile in row} - {0}:
        lines[round(y0 * scale) - 1 : round(y0 * scale) + 1] = True
    for x0 in {tile.write.x0 for row in frame.tiles for tile in row} - {0}:
        lines[:, round(x0 * scale) - 1 : round(x0 * scale) + 1] = True
    return lines[pad:, pad:]


def compare(reference: NDArray[np.int32], found: NDArray[np.int32], borders: NDArray[np.bool_]) -> dict[str, Any]:
    """Score, and what became of each nucleus of the reference."""
    crossed = set(np.unique(reference[borders]).tolist()) - {0}
    areas = np.bincount(found.ravel())
    counts = dict.fromkeys(("border", "else", "lost_border", "lost_else", "doubled_border", "doubled_else"), 0)
    for label in np.unique(reference)[1:].tolist():
        inside = found[reference == label]
        overlaps = np.bincount(inside)
        overlaps[0] = 0
        ids = np.flatnonzero(overlaps)
        iou = [overlaps[i] / (areas[i] + inside.size - overlaps[i]) for i in ids]
        place = "border" if label in crossed else "else"
        counts[place] += 1
        counts[f"lost_{place}"] += max(iou, default=0) <= 0.5
        counts[f"doubled_{place}"] += sum(overlaps[i] > areas[i] / 2 for i in ids) > 1
    return {"score": score(reference, found), **counts}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Pooled PQ, and sums."""
    pooled = mean_and_pooled(row["score"] for row in rows)[1]
    return {"pq": pooled["pq"], **{key: sum(row[key] for row in rows) for key in rows[0] if key != "score"}}


if __name__ == "__main__":
    main()
