"""What a few annotated images of new tissue bring: LoRA, the decoder alone, or all weights, against their number."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from nsam.runtime.card import PostSpec
from nsam.runtime.errors import InputError, ModelError, OutputError
from nsam.runtime.metrics import mean_and_pooled
from nsam.runtime.options import Command
from nsam.train.crossval import claim
from nsam.train.data import Sample, find_samples
from nsam.train.evaluate import TorchEngine, score_samples
from nsam.train.fit import fit
from nsam.train.folds import final_fold
from nsam.train.settings import NSAM, Settings


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("base", type=click.Path(path_type=Path, exists=True))
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for the runs and `adaptation.json`."
)
@click.option("--test", "tested", multiple=True, required=True, help="Beginning of a file name: a patient to test on.")
@click.option("--images", multiple=True, type=click.IntRange(0), default=[2, 5, 10, 0], help="Numbers; 0 is all.")
@click.option(
    "--tune", multiple=True, type=click.Choice(["lora", "decoder", "full"]), default=["lora", "decoder", "full"]
)
@click.option("--steps", type=click.IntRange(1), default=60)
@click.option("--lr", type=float, default=3e-4)
@click.option("--threads", type=click.IntRange(1), default=1)
def main(
    base: Path,
    data: Path,
    out: Path,
    tested: tuple[str, ...],
    images: tuple[int, ...],
    tune: tuple[str, ...],
    steps: int,
    lr: float,
    threads: int,
) -> None:
    """Adapt BASE (RUN/foldK, which never saw DATA) to some images of DATA and test on its other patients."""
    torch.set_num_threads(threads)
    samples = find_samples(data)
    test = [sample for sample in samples if sample.image.name.startswith(tested)]
    pool = [sample for sample in samples if sample not in test]
    if not test or not pool:
        which = "every image's name begins so, none is left to adapt to" if test else "no image's name begins so"
        raise InputError(f"`--test {' --test '.join(tested)}`: {which}; one is {samples[0].image.name}")
    pool = [pool[i] for i in np.random.default_rng(0).permutation(len(pool))]
    if not (base / "metrics.json").is_file():
        raise ModelError(f"`{base}`: no finished fold of a run made by nsam-train; name one, such as RUN/fold0")
    if (out / "adaptation.json").exists() or any(out.glob("*/config.json")):
        raise OutputError(f"`--out {out}`: holds an adaptation already; name another folder, or remove it")
    post = PostSpec(**json.loads((base / "metrics.json").read_text(encoding="utf-8"))["post"])
    engine = TorchEngine.of_fold(base, torch.device("cpu")).with_post(post)
    mean, _ = mean_and_pooled(found for _, found in score_samples(test, engine))
    rows: list[dict[str, Any]] = [{"tune": "base", "images": 0, "minutes": 0.0, "megabytes": 0.0, **mean}]
    show(rows[-1])
    for kind in tune:
        for count in images:
            settings = replace(
                NSAM, base=str(base), mpp=engine.card.input.mpp, tune=kind, steps=steps, lr=lr, validate_every=steps
            )
            rows.append(adapt(settings, pool[: count or None], test, out / f"{kind}{count or 'all'}"))
            show(rows[-1])
            (out / "adaptation.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def adapt(settings: Settings, train: list[Sample], test: list[Sample], run: Path) -> dict[str, Any]:
    """As `nsam-train --fold final` trains on these images, thresholds from those set aside; then the test."""
    claim(run, settings, train, [], resume=False)
    began = time.monotonic()
    metrics = fit(settings, replace(final_fold(train), test=test), run / "fold0", device=torch.device("cpu"))
    assert metrics is not None
    return {
        "tune": settings.tune,
        "images": len(train),
        "minutes": metrics["minutes"],
        "minutes_with_test": (time.monotonic() - began) / 60,
        "megabytes": (run / "fold0" / "best.safetensors").stat().st_size / 1e6,
        **metrics["mean"],
    }


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    figures = " | ".join(f"{row[metric]:.3f}" for metric in ("dice", "aji", "pq"))
    click.echo(f"| {row['tune']} | {row['images']} | {figures} | {row['minutes']:.1f} | {row['megabytes']:.1f} |")


if __name__ == "__main__":
    main()
