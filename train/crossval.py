"""All folds of a run: each is trained anew, a finished one is never touched again."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nsam.runtime.card import PostSpec
from nsam.runtime.errors import InputError, ModelError, OutputError
from nsam.runtime.files import output_errors, write_text
from nsam.train.data import Sample, read_sample
from nsam.train.evaluate import TorchEngine, report, score_with_progress
from nsam.train.fit import fit
from nsam.train.folds import FINAL, Fold, final_fold, make_folds, write_folds
from nsam.train.identity import hash_samples
from nsam.train.lineage import of_fold, refuse_seen
from nsam.train.pages import write_report
from nsam.train.parallel import ALONE, Group
from nsam.train.report import write_summary
from nsam.train.settings import Settings, read_settings

#: Metrics of two machines differ by less: a pixel here and there lies at a threshold.
REPEATS_TO = 0.002
PACKAGES = ("nsam", "torch", "timm", "segment-anything", "numpy", "opencv-python-headless", "scikit-image")


def cross_validate(
    settings: Settings,
    samples: list[Sample],
    extra: list[Sample],
    sources: list[Path],
    out: Path,
    which: list[str],
    *,
    device: torch.device,
    group: Group = ALONE,
    workers: int = 0,
    max_minutes: float | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Train and score the folds `which` of `samples` into `out`; returns whether all of them are finished.

    Images of `extra` sources help to train and to choose thresholds in every fold; none is tested, unless the folds
    are of sources.

    Raises:
        OutputError: `out` holds another run, or holds this one and `resume` was not asked for.
        InputError: an image or its labels cannot be read, they do not fit together, a fold has nothing to train on, or
            the base has been trained on its test images.
    """
    deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
    folds = name_folds(settings, samples, extra, which)
    for name in which:  # the last of them would else be refused after hours
        if not folds[name].train:
            raise InputError(
                f"`{name}`: has nothing to train on; a source's only image is set aside to choose thresholds"
            )
        refuse_seen(of_fold(settings, name), name, folds[name].test)
    if group.leads:
        claim(out, settings, [*samples, *extra], sources, resume)
        write_folds(folds, out / "folds.csv")
    finished = True
    for name in which:
        fold_dir = out / name
        if (fold_dir / "metrics.json").is_file():
            say(f"{name}: finished before")
            continue
        fold = folds[name]
        say(f"{name}: {len(fold.train)} train, {len(fold.validation)} validation, {len(fold.test)} test images")
        metrics = fit(
            of_fold(settings, name),
            fold,
            fold_dir,
            device=device,
            group=group,
            workers=workers,
            deadline=deadline,
            resume=resume,
            say=lambda line, name=name: say(f"{name}: {line}"),  # type: ignore[misc]
        )
        if metrics is None:
            finished = False
            break
        if not group.leads:
            continue
        if fold.test:
            say(f"{name}: " + ", ".join(f"{metric} {value:.3f}" for metric, value in metrics["mean"].items()))
    if group.leads:
        write_summary(out)
        write_report(out, [*samples, *extra], device)
    return finished


def name_folds(settings: Settings, samples: list[Sample], extra: list[Sample], which: list[str]) -> dict[str, Fold]:
    """The folds, `fold0` and on, and `final`, by the names of their folders; `final` alone where it alone is asked for
    and images are too few for folds.

    Raises:
        InputError: too few images, or groups of them.
    """
    try:
        folds = make_folds(samples, settings.folds, settings.validation_share, extra)
    except InputError:
        if which != [FINAL] or settings.folds == "source":
            raise
        folds = []
    named = {f"fold{k}": fold for k, fold in enumerate(folds)}
    return {**named, FINAL: final_fold(samples, settings.validation_share, extra)}


def repeat_tests(
    samples: list[Sample],
    extra: list[Sample],
    out: Path,
    which: list[str],
    *,
    device: torch.device,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Score the test parts of a run's finished folds again, from their checkpoints and thresholds; writes nothing.

    Raises:
        ModelError: a fold is not finished, or its figures are not those of its `metrics.json`.
        OutputError: other data.
    """
    settings = read_settings(out / "config.json")
    check_data(out, [*samples, *extra])
    folds = name_folds(settings, samples, extra, which)
    for name in which:
        if not folds[name].test:
            raise ModelError(f"`{out / name}`: has no test part; name one of the five folds")
        fold_dir = out / name
        if not (fold_dir / "metrics.json").is_file():
            raise ModelError(f"`{fold_dir}`: not finished; train it with --resume, or name another --fold")
        before = json.loads((fold_dir / "metrics.json").read_text(encoding="utf-8"))
        engine = TorchEngine.of_fold(fold_dir, device).with_post(PostSpec(**before["post"]))
        after = report(score_with_progress(folds[name].test, engine, lambda line, name=name: say(f"{name}: {line}")))  # type: ignore[misc]
        for metric, value in after["mean"].items():
            say(f"{name}: {metric} {value:.4f}, was {before['mean'][metric]:.4f}")
            if abs(value - before["mean"][metric]) > REPEATS_TO:
                raise ModelError(f"`{fold_dir}`: {metric} of its test part does not repeat; was it trained elsewhere?")


def claim(out: Path, settings: Settings, samples: list[Sample], sources: list[Path], resume: bool) -> None:
    """Make the run's folder and its `config.json`, or see that the run in it is the same one."""
    if goes_on(out, settings, resume):
        check_data(out, samples)
        return
    with ThreadPoolExecutor() as pool:  # a bad one would else show after hours, when its part has its turn
        for _ in pool.map(read_sample, samples):
            pass
    description = json.dumps(describe(settings, samples, sources), indent=1)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", description)


def goes_on(out: Path, settings: Settings, resume: bool) -> bool:
    """Whether `out` holds a run already, which is then the one that is asked for.

    Raises:
        OutputError: it is another one, or `resume` was not asked for.
    """
    config = out / "config.json"
    if not config.is_file():
        return False
    if not resume:
        raise OutputError(f"`{out}`: holds a run already; pass --resume to go on, or another --out")
    found = read_settings(config)
    for name, value in asdict(settings).items():
        if getattr(found, name) != value:
            raise OutputError(
                f"`{out}`: its run has {name} = {getattr(found, name)}, now {value} is asked for; "
                "give the same options to resume"
            )
    return True


def check_data(out: Path, samples: list[Sample]) -> None:
    """See that a run's images and labels are these.

    Raises:
        OutputError: they are not.
    """
    if json.loads((out / "config.json").read_text(encoding="utf-8"))["data"]["sha256"] != hash_samples(samples):
        raise OutputError(f"`{out}`: its run saw other data; give the same images, labels, --data-mpp and --extra")


def describe(settings: Settings, samples: list[Sample], sources: list[Path]) -> dict[str, Any]:
    """What `config.json` holds: settings, data, versions, commit."""
    return {
        "settings": asdict(settings),
        "data": {
            "sources": [str(source.resolve()) for source in sources],
            "images": len(samples),
            "sha256": hash_samples(samples),
        },
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
