"""The table of a run, made from the files in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nsam.runtime.files import write_text
from nsam.runtime.metrics import NAMES

TITLES = dict(zip(NAMES, ("Dice", "AJI", "AJI+", "PQ", "SQ", "DQ", "F1"), strict=True))


def write_summary(run: Path) -> None:
    """`summary.md`: test metrics of each finished fold, mean ± standard deviation over folds, and by organ."""
    folds = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(run.glob("fold*/metrics.json"))
    }
    if not folds:
        return
    lines = [f"# {run.name}", "", f"Finished folds: {', '.join(folds)}."]
    for kind, meaning in (("mean", "mean of the images"), ("pooled", "all images of a fold pooled")):
        lines += ["", f"## Test metrics, {meaning}", "", _row("fold", "images", *TITLES.values())]
        lines.append(_row(*["---"] * (len(TITLES) + 2)))
        lines += [_row(name, m["images"], *(f"{m[kind][metric]:.4f}" for metric in NAMES)) for name, m in folds.items()]
        if len(folds) > 1:
            table = np.array([[m[kind][metric] for metric in NAMES] for m in folds.values()])
            spread = zip(table.mean(axis=0), table.std(axis=0, ddof=1), strict=True)
            lines.append(_row("mean ± std", "", *(f"{mean:.4f} ± {std:.4f}" for mean, std in spread)))
    lines += ["", "## By organ, mean of the images", "", _row("organ", "images", *TITLES.values())]
    lines.append(_row(*["---"] * (len(TITLES) + 2)))
    by_organ: dict[str, list[dict[str, float]]] = {}
    for m in folds.values():
        for metrics in m["per_image"].values():
            by_organ.setdefault(metrics["group"], []).append(metrics)
    for organ, rows in sorted(by_organ.items()):
        means = (f"{np.mean([row[metric] for row in rows]):.4f}" for metric in NAMES)
        lines.append(_row(organ, len(rows), *means))
    write_text(run / "summary.md", "\n".join(lines) + "\n")


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
