"""All folds of a run: each is trained anew, a finished one is never touched again."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nsam.runtime.errors import OutputError
from nsam.train.checkpoint import read_settings
from nsam.train.data import Sample, hash_samples
from nsam.train.fit import fit
from nsam.train.folds import make_folds, write_folds
from nsam.train.parallel import ALONE, Group
from nsam.train.report import plot_history, write_summary
from nsam.train.settings import Settings

PACKAGES = ("nsam", "torch", "timm", "segment-anything", "numpy", "opencv-python-headless", "scikit-image")


def cross_validate(
    settings: Settings,
    samples: list[Sample],
    extra: list[Sample],
    data: Path,
    out: Path,
    which: list[int],
    *,
    device: torch.device,
    group: Group = ALONE,
    workers: int = 0,
    max_minutes: float | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Train and score the folds `which` of `samples` into `out`; returns whether all of them are finished.

    Images of `extra` sources help to train and to choose thresholds in every fold; none is tested.

    Raises:
        OutputError: `out` holds another run, or holds this one and `resume` was not asked for.
    """
    deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
    folds = make_folds(samples, settings.folds, settings.validation_share, extra)
    if group.leads:
        claim(out, settings, [*samples, *extra], data, resume)
        write_folds(folds, out / "folds.csv")
    finished = True
    for k in which:
        fold_dir = out / f"fold{k}"
        if (fold_dir / "metrics.json").is_file():
            say(f"fold {k}: finished before")
            continue
        fold = folds[k]
        say(f"fold {k}: {len(fold.train)} train, {len(fold.validation)} validation, {len(fold.test)} test images")
        metrics = fit(
            settings,
            fold,
            fold_dir,
            device=device,
            group=group,
            workers=workers,
            deadline=deadline,
            resume=resume,
            say=lambda line, k=k: say(f"fold {k}: {line}"),  # type: ignore[misc]
        )
        if metrics is None:
            finished = False
            break
        if not group.leads:
            continue
        plot_history(fold_dir / "history.csv", fold_dir / "history.png")
        say(f"fold {k}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics["mean"].items()))
    if group.leads:
        write_summary(out)
    return finished


def claim(out: Path, settings: Settings, samples: list[Sample], data: Path, resume: bool) -> None:
    """Make the run's folder and its `config.json`, or see that the run in it is the same one."""
    config = out / "config.json"
    data_hash = hash_samples(samples)
    if config.is_file():
        if not resume:
            raise OutputError(f"`{out}`: holds a run already; pass --resume to go on, or another --out")
        found = read_settings(config)
        for name, value in asdict(settings).items():
            if getattr(found, name) != value:
                raise OutputError(
                    f"`{out}`: its run has {name} = {getattr(found, name)}, now {value} is asked for; "
                    "give the same options to resume"
                )
        if json.loads(config.read_text(encoding="utf-8"))["data"]["sha256"] != data_hash:
            raise OutputError(f"`{out}`: its run saw other data; resume with the same images and labels")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(describe(settings, samples, data, data_hash), indent=1)
        config.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"`{out}`: cannot be written ({error.strerror}); choose another --out") from error


def describe(settings: Settings, samples: list[Sample], data: Path, data_hash: str) -> dict[str, Any]:
    """What `config.json` holds: settings, data, versions, commit."""
    return {
        "settings": asdict(settings),
        "data": {"root": str(data.resolve()), "images": len(samples), "sha256": data_hash},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The checkout's commit, or None where nsam runs from an installed package or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
