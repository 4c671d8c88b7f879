"""A trained fold -> a model directory: merge, graph, card, proof."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nsam.export.graph import add_metadata, describe_graph, export_onnx, simplify, store_weights_fp16
from nsam.export.merge import load_merged
from nsam.export.parity import Link, as_json, compare, real_tiles
from nsam.runtime.card import FileEntry, ModelCard, PostSpec, sha256_of
from nsam.runtime.engines import load
from nsam.runtime.errors import InputError, ModelError, OutputError
from nsam.train.checkpoint import load_fold
from nsam.train.data import Sample, find_extra, find_samples
from nsam.train.evaluate import TorchEngine, draft_card
from nsam.train.exported import BASE_NAME, write_base
from nsam.train.model import NucleusNet

PACKAGES = ("nsam", "torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")


@dataclass(frozen=True)
class Settings:
    """What `nsam-export` was asked for."""

    fold_dir: Path
    out: Path
    data: tuple[Path, ...] = ()  # the run's data, then its --extra in their order; empty: where the run found them
    data_mpp: float | None = None  # µm/px of those images, when the run was given it
    name: str = "nsam"
    model_version: str = "0.1.0"
    licence: str = "Apache-2.0"
    attribution: str = ""  # whose data it was trained on, and under which licence
    limits: str = ""  # what the model is not for, and where it was never tried
    store: str = "fp32"  # fp16 halves the file; arithmetic stays fp32
    tiles: int = 8  # real tiles on which the maps are compared
    overwrite: bool = False


def build(settings: Settings, say: Callable[[str], None] = lambda line: None) -> Path:
    """Make the model directory `settings.out`; it appears whole or not at all.

    Raises:
        ModelError: the fold is unfinished or does not fit, or a link of the chain fails its gate.
        InputError: the images for the proof are not where the run found them.
        OutputError: `settings.out` exists and may not be overwritten, or cannot be written.
    """
    if settings.out.exists() and not settings.overwrite:
        raise OutputError(f"`{settings.out}`: exists; pass --overwrite to replace it, or another --out")
    model, trained = load_fold(settings.fold_dir)
    metrics = _finished_metrics(settings.fold_dir)
    samples = validation_samples(settings)
    card = replace(
        draft_card(trained, PostSpec(**metrics["post"])),
        name=settings.name,
        version=settings.model_version,
        licence=settings.licence,
        training=_training(settings, metrics),
        tool_versions={package: version(package) for package in PACKAGES},
    )
    try:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=settings.out.parent, prefix=".nsam-export-") as scratch:
            made = _build_in(Path(scratch), settings, card, model, samples, say)
            if settings.out.exists():
                shutil.rmtree(settings.out)
            made.rename(settings.out)
    except OSError as error:
        raise OutputError(f"`{settings.out}`: cannot be written ({error.strerror or error})") from error
    return settings.out


def _build_in(
    scratch: Path,
    settings: Settings,
    card: ModelCard,
    model: Any,
    samples: list[Sample],
    say: Callable[[str], None],
) -> Path:
    out = scratch / "model"
    out.mkdir()
    tiles = real_tiles(samples, card, settings.tiles)
    cpu = torch.device("cpu")
    merged = load_merged(settings.fold_dir)
    chain: list[tuple[str, Any]] = [("torch", TorchEngine(model, card, cpu))]
    links: list[Link] = []

    def prove(name: str, engine: Any, by_task: bool = False) -> None:
        link = compare(chain[-1], (name, engine), tiles, samples if by_task else None)
        links.append(link)
        shown = f"max |difference| of maps {link.max:.2e}"
        if link.metrics:
            shown += "".join(f", of {metric} {value:.4f}" for metric, value in link.metrics.items())
        say(f"{link.before} -> {link.after}: {shown}, gate {link.gate:g}: {'passed' if link.passed else 'FAILED'}")
        if not link.passed:
            raise ModelError(f"parity `{link.before} -> {link.after}`: {shown}, must be at most {link.gate:g}")
        chain.append((name, engine))

    prove("merged", TorchEngine(merged, card, cpu))
    say(f"exporting {card.input.size} px tiles")
    plain = scratch / "onnx.onnx"
    export_onnx(merged, card.input.size, plain)
    prove("onnx", _as_engine(plain, scratch / "onnx", card))
    graph = scratch / "simplified.onnx"
    problem = simplify(plain, graph)
    if problem:
        say(f"warning: {problem}; the graph stays unsimplified")
        graph = plain
    else:
        prove("simplified", _as_engine(graph, scratch / "simplified", card))
    if settings.store == "fp16":
        half = scratch / "half.onnx"
        store_weights_fp16(graph, half)
        graph = half
        prove("weights stored as fp16", _as_engine(graph, scratch / "half", card), by_task=True)
    for name, path in {"exported": plain, "shipped": graph}.items():
        say(f"{name}: " + ", ".join(f"{value:,} {what}" for what, value in describe_graph(path).items()))
    _write_model(graph, out, card, merged)
    proof = as_json(links, len(tiles), len(samples))
    (out / "parity.json").write_text(json.dumps(proof, indent=1) + "\n", encoding="utf-8")
    return out


def _as_engine(graph: Path, folder: Path, card: ModelCard) -> Any:
    """The runtime's engine over a graph: the proof passes through the code that will run it."""
    folder.mkdir()
    _write_model(graph, folder, card)
    return load(folder, device="cpu")


def _write_model(graph: Path, folder: Path, card: ModelCard, base: NucleusNet | None = None) -> None:
    """`model.onnx` with the card in its metadata, what else a base needs, and `card.json` with their hashes."""
    target = folder / "model.onnx"
    shutil.copyfile(graph, target)
    add_metadata(target, nsam_card=card.to_json())
    files = {"model.onnx": FileEntry(sha256_of(target), "fp32")}
    if base is not None:
        write_base(base, target, folder / BASE_NAME)
        files[BASE_NAME] = FileEntry(sha256_of(folder / BASE_NAME), "weights")
    listed = replace(card, files=files)
    (folder / "card.json").write_text(listed.to_json(), encoding="utf-8")


def validation_samples(settings: Settings) -> list[Sample]:
    """The fold's inner validation images, by `folds.csv`.

    Raises:
        InputError: they are not below the data folder.
    """
    run, fold = settings.fold_dir.parent, settings.fold_dir.name
    root, *extra = settings.data or [Path(source) for source in _config(settings)["data"]["sources"]]
    samples = [*find_samples(root, settings.data_mpp), *(sample for source in extra for sample in find_extra(source))]
    found = {sample.name: sample for sample in samples}
    with (run / "folds.csv").open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["fold"] == fold and row["part"] == "validation"]
    missing = [row["image"] for row in rows if row["image"] not in found]
    if missing or not rows:
        raise InputError(
            f"`{root}`: not the data of this run ({missing[:1] or 'no images'}); pass --data, once for each source"
        )
    return [found[row["image"]] for row in rows]


def _finished_metrics(fold_dir: Path) -> dict[str, Any]:
    path = fold_dir / "metrics.json"
    if not path.is_file():
        raise ModelError(f"`{fold_dir}`: not finished, it has no metrics.json; nsam-train --resume goes on with it")
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return metrics


def _config(settings: Settings) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((settings.fold_dir.parent / "config.json").read_text(encoding="utf-8"))
    return config


def _training(settings: Settings, metrics: dict[str, Any]) -> dict[str, Any]:
    config = _config(settings)
    chosen = ("recipe", "base", "tune", "steps", "batch", "crop", "lr", "seed", "folds")
    used = {name: config["settings"][name] for name in chosen}
    used["base"] = "/".join(Path(used["base"]).parts[-2:])  # RUN/foldK says enough; where it lay is nobody's concern
    return {
        "data": settings.attribution,
        "limits": settings.limits,
        "data_sha256": config["data"]["sha256"],
        "commit": config["commit"],
        "settings": used,
        "held_out": {
            "fold": settings.fold_dir.name,
            "images": metrics["images"],
            "mean": metrics["mean"],
            "pooled": metrics["pooled"],
        },
        "steps": metrics["steps"],
        "minutes": metrics["minutes"],
    }
