"""Tables and plots of a run, made from the files in it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

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
        for name, metrics in m["per_image"].items():
            by_organ.setdefault(name.split("/")[0], []).append(metrics)
    for organ, rows in sorted(by_organ.items()):
        means = (f"{np.mean([row[metric] for row in rows]):.4f}" for metric in NAMES)
        lines.append(_row(organ, len(rows), *means))
    (run / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot_history(history: Path, picture: Path) -> None:
    """Losses and validation against steps, from `history.csv`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with history.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        return
    steps = [int(row["step"]) for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in rows[0]:
        if name not in ("step", "lr", "validation"):
            left.plot(steps, [float(row[name]) for row in rows], label=name)
    left.set(xlabel="step", ylabel="loss")
    left.legend()
    measured = [(int(row["step"]), float(row["validation"])) for row in rows if row["validation"]]
    right.plot(*zip(*measured, strict=True), marker="o") if measured else None
    right.set(xlabel="step", ylabel="validation (AJI + PQ) / 2")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
