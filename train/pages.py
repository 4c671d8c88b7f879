"""`report.html`: one self-contained page of a run. Curves, organs, and overlays of best, median and worst images."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nsam.runtime.card import PostSpec
from nsam.runtime.files import write_text
from nsam.train.data import Sample, read_sample
from nsam.train.evaluate import TorchEngine, segment_sample
from nsam.train.report import TITLES

SHOWN = 3  # images each of best, median and worst
_TRUE_RGB, _FOUND_RGB = (40, 220, 80), (255, 210, 0)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } img { max-width: 100% }
.row { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px }
figure { margin: 0 } figcaption { font-size: 13px }
"""


def write_report(run: Path, samples: list[Sample], device: torch.device) -> None:
    """Write `report.html` from the finished folds of a run; nothing when there is none.

    Args:
        run: the run's folder.
        samples: the images that its folds tested, at least.
        device: where the network makes the overlays.
    """
    folds = {path.parent.name: json.loads(path.read_text("utf-8")) for path in sorted(run.glob("fold*/metrics.json"))}
    if not folds:
        return
    parts = [
        f"<h1>{html.escape(run.resolve().name)}</h1>",
        "<p>Test parts of the finished folds: mean of the images, then all images of a fold pooled.</p>",
        _table(folds, "mean"),
        _table(folds, "pooled"),
        "<h2>Training</h2>",
        _picture(_curves({name: run / name / "history.csv" for name in folds})),
        "<h2>Organs</h2><p>Mean of the test images, whiskers: standard deviation over them.</p>",
        _picture(_organs(folds)),
        "<h2>Best, median and worst images by PQ</h2>",
        "<p>Green: annotated; yellow: found.</p>",
        *_overlays(run, folds, {sample.name: sample for sample in samples}, device),
    ]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>nsam: {html.escape(run.resolve().name)}</title>"
    write_text(run / "report.html", f"{page}<style>{_STYLE}</style>" + "\n".join(parts) + "</html>\n")


def _table(folds: dict[str, Any], kind: str) -> str:
    head = "".join(f"<th>{title}</th>" for title in ("images", *TITLES.values()))
    rows = [
        f"<tr><td>{name}</td><td>{m['images']}</td>" + "".join(f"<td>{m[kind][key]:.3f}</td>" for key in TITLES)
        for name, m in folds.items()
    ]
    return f"<table><tr><th>{kind}</th>{head}</tr>{'</tr>'.join(rows)}</tr></table>"


def _curves(histories: dict[str, Path]) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, path in histories.items():
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        terms = [key for key in rows[0] if key not in ("step", "lr", "validation")] if rows else []
        left.plot([int(r["step"]) for r in rows], [sum(float(r[t]) for t in terms) for r in rows], label=name)
        measured = [(int(r["step"]), float(r["validation"])) for r in rows if r["validation"]]
        if measured:
            right.plot(*zip(*measured, strict=True), marker="o", label=name)
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="validation (AJI + PQ) / 2")
    left.legend()
    return figure


def _organs(folds: dict[str, Any]) -> Figure:
    by_organ: dict[str, list[dict[str, Any]]] = {}
    for m in folds.values():
        for row in m["per_image"].values():
            by_organ.setdefault(row["group"], []).append(row)
    shown = ("dice", "aji", "pq")
    names = sorted(by_organ, key=lambda organ: np.mean([row["pq"] for row in by_organ[organ]]))
    figure = Figure(figsize=(11, 1 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, metric in zip(axes, shown, strict=True):
        values = [[row[metric] for row in by_organ[name]] for name in names]
        axis.barh(names, [np.mean(v) for v in values], xerr=[np.std(v) for v in values], color="#5a7fb5", ecolor="#999")
        axis.set(title=TITLES[metric], xlim=(0, 1))
    return figure


def _overlays(run: Path, folds: dict[str, Any], samples: dict[str, Sample], device: torch.device) -> list[str]:
    ranked = sorted(
        ((row["pq"], name, fold) for fold, m in folds.items() for name, row in m["per_image"].items()), reverse=True
    )
    middle = max(0, (len(ranked) - SHOWN) // 2)
    engines: dict[str, TorchEngine] = {}
    parts = []
    for title, chosen in (
        ("Best", ranked[:SHOWN]),
        ("Median", ranked[middle : middle + SHOWN]),
        ("Worst", ranked[-SHOWN:]),
    ):
        figures = []
        for pq, name, fold in chosen:
            if fold not in engines:
                engines[fold] = TorchEngine.of_fold(run / fold, device).with_post(PostSpec(**folds[fold]["post"]))
            image, truth = read_sample(samples[name])
            found = segment_sample(image, samples[name], engines[fold])
            figures.append(
                f"<figure>{_photograph(_outlined(image, truth, found))}"
                f"<figcaption>{html.escape(name)} ({fold}), PQ {pq:.3f}</figcaption></figure>"
            )
        parts.append(f"<h3>{title}</h3><div class=row>{''.join(figures)}</div>")
    return parts


def _outlined(image: NDArray[np.uint8], truth: NDArray[np.int32], found: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The image with the inner borders of both label images."""
    picture = image.copy()
    for labels, colour in ((truth, _TRUE_RGB), (found, _FOUND_RGB)):
        values = labels.astype(np.float32)
        cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
        picture[(cv2.dilate(values, cross) != cv2.erode(values, cross)) & (labels > 0)] = colour
    return picture


def _picture(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return _img(stream.getvalue(), "png")


def _photograph(rgb: NDArray[np.uint8]) -> str:
    return _img(cv2.imencode(".jpg", rgb[..., ::-1])[1].tobytes(), "jpeg")


def _img(code: bytes, kind: str) -> str:
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(code).decode()}">'
