"""One change of the recipe a row, each trained from the same start for the same number of crops."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from nsam.runtime.card import PostSpec
from nsam.runtime.errors import InputError
from nsam.runtime.metrics import mean_and_pooled
from nsam.runtime.options import Command
from nsam.train.crossval import claim
from nsam.train.data import Sample, find_extra, find_samples
from nsam.train.evaluate import TorchEngine, score_samples
from nsam.train.fit import fit
from nsam.train.folds import Fold, make_folds
from nsam.train.identity import hash_samples
from nsam.train.settings import NSAM, Settings

SHOWN = ("dice", "aji", "pq")
#: What each row changes in the recipe; a batch of another size takes as many crops in all.
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "mask-alone": {"channels": ("nucleus",)},
    "stride-4": {"stride": 4},
    "half-scale": {"mpp": 0.5},
    "no-looks": {"look": 0.0},
    "no-scales": {"scale_low": 1.0, "scale_high": 1.0},
    "no-turns": {"turn": False},
    "no-soft-dice": {"dice": False},
    "no-ema": {"ema": 0.0},
    "batch-16": {"batch": 16},
}
#: Beside them, where there are weights to keep: what of them is tuned.
TUNED: dict[str, dict[str, Any]] = {
    "decoder": {"tune": "decoder"},
    "lora": {"tune": "lora"},
    "lora-16": {"tune": "lora", "rank": 16, "alpha": 16.0},
}


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder a row, and `ablations.json`.")
@click.option("--extra", multiple=True, type=click.Path(path_type=Path), help="Another source to train on.")
@click.option("--unseen", multiple=True, type=click.Path(path_type=Path), help="A source to test on, never trained on.")
@click.option("--only", help=f"Rows, separated by commas. [default: all: {', '.join(VARIANTS)}]")
@click.option("--base", default="none", help="Weights that each row starts from, as of nsam-train.")
@click.option("--crops", type=click.IntRange(8), default=3200, help="Training crops of each row.")
@click.option("--fold", type=click.IntRange(0, 4), default=0, help="Official fold; its test part is not looked at.")
@click.option("--seed", type=click.IntRange(0), default=NSAM.seed, help="Of crops, views and new weights.")
@click.option("--at-once", type=click.IntRange(1), default=1, help="Rows side by side, a thread each.")
def main(
    data: Path,
    out: Path,
    extra: tuple[Path, ...],
    unseen: tuple[Path, ...],
    only: str | None,
    base: str,
    crops: int,
    fold: int,
    seed: int,
    at_once: int,
) -> None:
    """Train each variant on DATA's fold; score its validation images and all of --unseen.

    Thresholds are those that suit the validation images best, row by row. A row that is done is not done again.
    All weights are tuned; with a --base the rows of TUNED say what tuning fewer costs.
    With `--only recipe`, the other sources as --extra and one as --unseen, it tells how the recipe does on a laboratory
    that it has not seen.
    """
    more = [sample for root in extra for sample in find_extra(root)]
    parts = make_folds(find_samples(data), extra=more)[fold]
    strangers = [sample for root in unseen for sample in find_extra(root)]
    out.mkdir(parents=True, exist_ok=True)
    saved = out / "ablations.json"
    asked = {"base": base, "crops": crops, "fold": fold, "seed": seed}
    asked |= {"data": hash_samples([*parts.train, *parts.validation, *strangers])}
    found = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {"asked": asked, "rows": {}}
    if (before := found.get("asked")) != asked:
        raise InputError(f"`--out {out}`: its rows are of other data or options ({before}); pass another")
    rows: dict[str, Any] = found["rows"]
    variants = VARIANTS if base == "none" else VARIANTS | TUNED
    wanted = [name for name in (only.split(",") if only else variants) if name not in rows]
    if unknown := set(wanted) - variants.keys():
        raise InputError(f"`--only`: {', '.join(sorted(unknown))}: no such rows; there are {', '.join(variants)}")
    start = replace(NSAM, base=base, tune="full", seed=seed)
    with ProcessPoolExecutor(at_once, get_context("spawn")) as pool:
        jobs = {
            pool.submit(train, replace(start, **variants[name]), parts, strangers, crops, out / name): name
            for name in wanted
        }
        for job in as_completed(jobs):
            rows[jobs[job]] = job.result()
            saved.write_text(json.dumps(found, indent=1), encoding="utf-8")
            click.echo(f"{jobs[job]}: {rows[jobs[job]]['minutes']:.0f} minutes", err=True)
    places = ["validation", *(root.name for root in unseen)]
    print(
        "| | " + " | ".join(f"{place}: Dice, AJI, PQ" for place in places) + " |\n" + "|---" * (1 + len(places)) + "|"
    )
    for name in (name for name in variants if name in rows):
        cells = (", ".join(f"{rows[name][place][metric]:.3f}" for metric in SHOWN) for place in places)
        print(f"| {name} | " + " | ".join(cells) + " |")


def train(settings: Settings, parts: Fold, strangers: list[Sample], crops: int, out: Path) -> dict[str, Any]:
    """A row: minutes, and mean scores on the validation images and on each stranger's source."""
    torch.set_num_threads(1)
    steps = crops // settings.batch
    settings = replace(settings, steps=steps, validate_every=steps)
    claim(out, settings, parts.train, [], resume=True)
    cpu = torch.device("cpu")
    metrics = fit(settings, replace(parts, test=strangers), out / "fold0", device=cpu, resume=True)
    assert metrics is not None
    engine = TorchEngine.of_fold(out / "fold0", cpu).with_post(PostSpec(**metrics["post"]))
    own, _ = mean_and_pooled(found for _, found in score_samples(parts.validation, engine))
    places: dict[str, list[dict[str, float]]] = {}
    for name, scores in metrics["per_image"].items():
        places.setdefault(name.partition("/")[0], []).append(scores)
    away = {place: {m: float(np.mean([one[m] for one in found])) for m in SHOWN} for place, found in places.items()}
    return {"minutes": metrics["minutes"], "validation": own, **away}


if __name__ == "__main__":
    main()
