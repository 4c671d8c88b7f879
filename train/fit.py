"""One fold: a new network, one visible loop, a checkpoint from which it goes on exactly."""

from __future__ import annotations

import io
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsam.runtime.errors import ModelError
from nsam.runtime.files import output_errors, write_bytes, write_csv, write_text
from nsam.train import checkpoint
from nsam.train.evaluate import TorchEngine, draft_card, report, score_samples, score_with_progress
from nsam.train.folds import Fold
from nsam.train.identity import identify
from nsam.train.lineage import SEEN_NAME, check_seen, refuse_seen, seen_by, write_seen
from nsam.train.losses import total
from nsam.train.parallel import ALONE, Group
from nsam.train.settings import Settings
from nsam.train.step import TrainState
from nsam.train.thresholds import choose_post
from nsam.train.views import Views, batches

LOG_EVERY = 50  # steps a row of history.csv averages over, the last row what is left
SAVE_PAUSE = 30  # times as long as the last checkpoint took: it has 150 MB, and a GPU makes 100 steps in seconds


def fit(
    settings: Settings,
    fold: Fold,
    out: Path,
    *,
    device: torch.device,
    group: Group = ALONE,
    workers: int = 0,
    deadline: float = math.inf,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Train one fold, choose thresholds on its validation part, score its test part once.

    Args:
        settings: what to do, of this fold (`lineage.of_fold`).
        fold: disjoint train, validation and test samples.
        out: the fold's folder: `last.pt`, `best.safetensors`, `history.csv`, `seen.txt` and `metrics.json` are written
            into it.
        device: where to train.
        group: the processes that share the work; all call `fit` alike.
        workers: processes that make views.
        deadline: `time.monotonic()` at which training stops with a checkpoint.
        resume: go on from `last.pt` if it is there.
        say: takes lines of progress.

    Returns:
        What `metrics.json` holds, or None when the deadline came first; nothing where another process leads.

    Raises:
        InputError: the base has been trained on test images of this fold.
        ModelError: the base cannot be had, or is not that of the checkpoint to go on from; or the loss has left the
            finite numbers.
        OutputError: `out` cannot be written; what it held before stays.
    """
    refuse_seen(settings, out.name, fold.test)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for part in out.glob("*.part") if group.leads else ():  # what a kill left
            part.unlink()
    model, kept = checkpoint.build_model(settings)
    steps = settings.total_steps(len(fold.train))
    state = TrainState(model.to(device), settings, steps, group)
    engine = TorchEngine(model, draft_card(settings), device)
    step, best, history, minutes = 0, -1.0, [], 0.0

    own = (identify(sample.image) for sample in (*fold.train, *fold.validation))
    seen = seen_by(settings.base).union(own)
    last = out / "last.pt"
    if resume and last.is_file():
        check_seen(out / SEEN_NAME, seen)  # what training changes is all in the checkpoint: its base might be another
        saved = checkpoint.read_last(last, kept, device)
        state.load_state_dict(saved, str(last))
        step, best, history, minutes = (saved[name] for name in ("step", "best", "history", "minutes"))
        say(f"resumed at step {step} of {steps}")

    if group.leads:
        write_seen(out / SEEN_NAME, seen)
    views = Views(fold.train, settings, steps * settings.batch)
    stream = batches(views, settings.batch, step, workers, group)
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    began, first = time.monotonic() - 60 * minutes, step
    started, next_save = time.monotonic(), 0.0
    while step < steps:
        images, targets = (part.to(device, non_blocking=True) for part in next(stream))
        terms = state.step(images, targets)
        step += 1

        for name, term in terms.items():
            sums[name] += term  # not read here: the GPU would stand still until the next step comes
        if step % LOG_EVERY == 0 or step == steps:
            # The loss of this step: fp16 gets over a lone one. It tells of the weights before the step.
            if not torch.isfinite(total(terms)) or (step == steps and not state.is_finite()):
                raise ModelError(
                    f"`{out}`: the loss is not finite at step {step}; begin anew, in another --out, with a smaller "
                    "--lr or --precision fp32"
                )
            summed = (step - 1) % LOG_EVERY + 1
            means = group.mean({name: float(value) / summed for name, value in sums.items()})
            history.append({"step": step, "lr": state.lr, **means})
            rate = (step - first) / (time.monotonic() - started)
            losses = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            say(
                f"step {step}/{steps}, {losses}, {rate * settings.batch:.1f} images/s, "
                f"{(steps - step) / rate / 60:.0f} min left"
            )
            sums.clear()
        if group.leads and (step % settings.validate_every == 0 or step == steps):
            with state.ema.applied(model):
                reached = validate(fold, engine)
                if reached > best:
                    best = reached
                    checkpoint.save_fold(out / "best.safetensors", checkpoint.trained_state(model, settings.base), kept)
            if history:
                history[-1]["validation"] = reached
            say(f"step {step}/{steps}, validation (AJI + PQ) / 2 {reached:.3f}, best {best:.3f}")
        if step % settings.save_every and step < steps:
            continue
        late = group.agrees(time.monotonic() > deadline)
        if group.leads and (late or step == steps or time.monotonic() > next_save):
            save_began = time.monotonic()
            saved = {
                **state.state_dict(),
                checkpoint.KEPT: kept,
                "step": step,
                "best": best,
                "history": history,
                "minutes": (time.monotonic() - began) / 60,
            }
            content = io.BytesIO()
            torch.save(saved, content)
            write_bytes(last, content.getbuffer())
            write_history(history, out / "history.csv")
            next_save = time.monotonic() + SAVE_PAUSE * (time.monotonic() - save_began)
        if late and step < steps:
            say(f"time is up at step {step} of {steps}; --resume goes on from there")
            return None
    if not group.leads:
        return {}
    if device.type == "cuda":
        say(f"peak GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    return finish(settings, fold, out, device, (time.monotonic() - began) / 60, step, say)


def finish(
    settings: Settings,
    fold: Fold,
    out: Path,
    device: torch.device,
    minutes: float,
    step: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Thresholds from the validation part, then the one look at the test part; writes `metrics.json`."""
    engine = TorchEngine.of_fold(out, device)
    post, reached = choose_post(fold.validation, engine, looks=settings.look > 0)
    say(f"thresholds from {len(fold.validation)} validation images: {post}, (AJI + PQ) / 2 {reached:.3f}")
    scored = score_with_progress(fold.test, engine.with_post(post), say)
    metrics = {"post": asdict(post), "minutes": round(minutes, 1), "steps": step, **report(scored)}
    write_text(out / "metrics.json", json.dumps(metrics, indent=1))
    return metrics


def validate(fold: Fold, engine: TorchEngine) -> float:
    """(AJI + PQ) / 2 on the validation part, at middling thresholds."""
    found = [s for _, s in score_samples(fold.validation, engine)]
    return float(np.mean([(s.aji + s.pq) / 2 for s in found]))


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """`history.csv`: a row for every 50 steps and for the last; `validation` where it was measured."""
    names = list(dict.fromkeys(name for row in history for name in row if name != "validation"))
    names.append("validation")
    write_csv(path, names, [[row.get(name, "") for name in names] for row in history])
