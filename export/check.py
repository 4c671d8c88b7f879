"""`nsam-export --check`: does a model directory hold what its card says, and run so on this machine?"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nsam.export.graph import check_graph
from nsam.export.parity import BATCHES, MEAN_GATE, distances
from nsam.runtime.bysize import BySize
from nsam.runtime.card import ModelCard
from nsam.runtime.engines import available_cores
from nsam.runtime.errors import ModelError
from nsam.runtime.metrics import score
from nsam.runtime.onnx_engine import OnnxEngine
from nsam.runtime.watershed import separate

REFERENCE_NAME = "reference.npz"
#: Share of the reference's nuclei that may be missing here, or found beside them, but for one: precisions differ in a
#: border pixel now and then, and one decides at times whether a nucleus is.
MOST_APART = 0.04
#: A tile's maps may not depend on what else is in its batch.
BATCH_TOLERANCE = 1e-2


def write_reference(path: Path, tiles: NDArray[np.uint8], maps: NDArray[np.float32], card: ModelCard) -> None:
    """Keep the tile of (N, S, S, 3) that has most nuclei, and its maps of (N, C, h, w) by torch, for machines without
    data.
    """
    most = int(np.argmax([_nuclei(each, card).max() for each in maps]))
    np.savez_compressed(path, tile=tiles[most : most + 1], maps=maps[most : most + 1].astype(np.float16))


def check(model_dir: Path, say: Callable[[str], None] = lambda line: None) -> None:
    """Verify hashes, card, graphs, batch sizes and agreement with the reference.

    Raises:
        ModelError: something does not fit; the message says what.
        DeviceError: ONNX Runtime is missing.
    """
    card = ModelCard.read(model_dir)
    for name in card.files:
        card.verify_file(model_dir, name)
    say(f"card of {card.name} {card.version}; {len(card.files)} files have their hashes")
    passed, links = _proof(model_dir / "parity.json")
    if not passed:
        raise ModelError(f"`{model_dir}`: parity failed when it was made ({', '.join(card.failed_links)})")
    say(f"parity: {links} links passed when it was made")
    with np.load(card.verify_file(model_dir, REFERENCE_NAME), allow_pickle=False) as stored:
        tile, maps = stored["tile"], stored["maps"].astype(np.float32)
    nuclei = _nuclei(maps[0], card)
    for name, entry in card.files.items():
        if not name.endswith(".onnx"):
            continue
        check_graph(model_dir / name)
        # fp16's nodes are for GPUs; here ONNX Runtime's CPU provider runs them, in fp32.
        make = partial(OnnxEngine, model_dir / name, card, "cpu", entry.precision, available_cores())
        engine = BySize(make, card.input.size)
        alone = engine.run(tile)[0]
        for batch in BATCHES:
            images = np.zeros((batch, *tile.shape[1:]), np.uint8)
            images[-1] = tile[0]
            apart = float(np.abs(engine.run(images)[-1] - alone).max())
            if apart > BATCH_TOLERANCE:
                raise ModelError(f"`{model_dir / name}`: in a batch of {batch} a tile's maps change by {apart:.2g}")
        found = score(nuclei, _nuclei(alone, card))
        missing, more = found.count_true - found.matched, found.count_predicted - found.matched
        apart = float(distances(alone[None], maps).mean())
        shown = (
            f"maps {apart:.1g} from the reference in the mean; of its {found.count_true} nuclei {missing} missing, "
            f"{more} more found"
        )
        if apart > MEAN_GATE or missing + more > max(1, MOST_APART * found.count_true):
            raise ModelError(f"`{model_dir / name}`: {shown}; that is another network, export the model again")
        for size in card.input.other_sizes:
            side, more = size // card.output.stride, max(0, size - tile.shape[1])
            tissue = np.pad(tile, ((0, 0), (0, more), (0, more), (0, 0)), "symmetric")[:, :size, :size]
            made = engine.run(tissue)
            if made.shape[2:] != (side, side) or not np.isfinite(made).all():
                raise ModelError(f"`{model_dir / name}`: does not take tiles of {size} px, as its card says")
        say(f"{name} on {engine.device}: batches of {', '.join(map(str, BATCHES))} agree; {shown}")


def _nuclei(maps: NDArray[np.float32], card: ModelCard) -> NDArray[np.int32]:
    return separate(maps, card.output, card.post, card.input.mpp * card.output.stride)


def _proof(path: Path) -> tuple[bool, int]:
    """Whether all links passed, and how many there are."""
    try:
        proof = json.loads(path.read_text(encoding="utf-8"))
        return proof["passed"], len(proof["links"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"`{path}`: broken; export the model again") from error
