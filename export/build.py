"""A trained fold -> a model directory: merge, graph, card, proof."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nsam.export.check import REFERENCE_NAME, write_reference
from nsam.export.graph import add_metadata, describe_graph, export_onnx, simplify, store_weights_fp16
from nsam.export.images import proof_samples, read_config
from nsam.export.merge import load_merged
from nsam.export.parity import Chain, as_json, real_tiles
from nsam.export.report import as_markdown
from nsam.export.settings import Settings
from nsam.export.variants import make_fp16, make_int8, prove_bf16
from nsam.runtime.card import FileEntry, ModelCard, PostSpec, sha256_of
from nsam.runtime.engines import FILES, Engine, load
from nsam.runtime.errors import DeviceError, InputError, ModelError, OutputError
from nsam.runtime.settings import Device, Precision
from nsam.train.checkpoint import load_fold
from nsam.train.encoder import WINDOW
from nsam.train.evaluate import TorchEngine, draft_card
from nsam.train.exported import BASE_NAME, write_base
from nsam.train.lineage import SEEN_NAME, base_card, seen_by
from nsam.train.model import NucleusNet
from nsam.train.settings import Settings as Trained

PACKAGES = ("nsam", "torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")


def build(settings: Settings, say: Callable[[str], None] = lambda line: None) -> Path:
    """Make the model directory `settings.out`; it appears whole or not at all.

    Raises:
        ModelError: the fold is unfinished or does not fit, or a link of the chain fails its gate.
        InputError: the images for the proof are not where the run found them.
        OutputError: `settings.out` exists and may not be overwritten, or cannot be written.
    """
    _check_replaceable(settings.out, settings.overwrite)
    model, trained = load_fold(settings.fold_dir)
    metrics = _finished_metrics(settings.fold_dir)
    seen_by(str(settings.fold_dir))  # raises where nobody knows: now, and not after the proof
    card = replace(
        _draft(settings, trained, metrics),
        name=settings.name or settings.fold_dir.resolve().parent.name,
        version=settings.model_version,
        licence=settings.licence,
        training=_training(settings, trained, metrics),
        tool_versions={package: version(package) for package in PACKAGES},
    )
    try:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=settings.out.parent, prefix=".nsam-export-") as scratch:
            made = _build_in(Path(scratch), settings, card, model, say)
            if settings.out.exists():
                shutil.rmtree(settings.out)
            made.rename(settings.out)
    except OSError as error:
        raise OutputError(f"`{settings.out}`: cannot be written ({error.strerror or error})") from error
    return settings.out


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if out.is_symlink():
        raise OutputError(f"`{out}`: a link; give the folder that it leads to")
    if not out.exists():
        return
    if not overwrite:
        raise OutputError(f"`{out}`: exists; pass --overwrite to replace it, or another --out")
    if out.is_file() or (any(out.iterdir()) and not (out / "card.json").is_file()):  # a run, or a folder of models
        raise OutputError(f"`{out}`: no model; --overwrite replaces nothing else, give another --out")


def _draft(settings: Settings, trained: Trained, metrics: dict[str, Any]) -> ModelCard:
    """The run's card, with the scale and the tiles that were asked for."""
    card = draft_card(trained, PostSpec(**metrics["post"])).shown_at(settings.mpp)
    sizes = tuple(sorted(set(settings.tile))) or card.input.sizes
    halo = card.post.tile_halo_px if settings.tile_halo is None else settings.tile_halo
    if sizes[0] <= 2 * halo:
        raise InputError(f"`--tile-halo` must be less than half a tile of {sizes[0]} px, is {halo}")
    if len(sizes) > 1 and any(size % WINDOW for size in sizes):
        raise InputError(f"`--tile`: several sizes must be multiples of {WINDOW}, are {sizes}")
    return replace(card, input=replace(card.input, sizes=sizes), post=replace(card.post, tile_halo_px=halo))


def _build_in(
    scratch: Path,
    settings: Settings,
    card: ModelCard,
    model: NucleusNet,
    say: Callable[[str], None],
) -> Path:
    out = scratch / "model"
    out.mkdir()
    images, trained_on, for_ranges = proof_samples(settings)
    chain = Chain(
        real_tiles(images, card, card.input.size, settings.tiles),
        [real_tiles(images, card, size, 1) for size in card.input.other_sizes],
        images,
        out,
        force=settings.force,
        say=say,
    )

    def load_graph(graph: Path, device: Device = "cpu", precision: Precision = "fp32") -> Engine:
        """The runtime's engine over a graph: the proof passes through the code that will run it."""
        folder = Path(tempfile.mkdtemp(dir=scratch))
        _write_model(folder, card, {FILES[precision]: (precision, graph)})
        return load(folder, device=device, precision=precision)

    cpu = torch.device("cpu")
    say(
        f"proof: {len(chain.tiles)} tiles and {len(images)} labelled images, {len(trained_on)} of them of the training "
        "part and the others of those that chose the thresholds"
    )
    chain.add("torch", TorchEngine(model, card, cpu))
    merged = load_merged(settings.fold_dir)
    chain.prove("torch", "merged", TorchEngine(merged, card, cpu), rewrites_only=True)
    graphs = {"exported": scratch / "exported.onnx", "simplified": scratch / "simplified.onnx"}
    export_onnx(merged, card.input.sizes, graphs["exported"])
    chain.prove("merged", "exported", load_graph(graphs["exported"]), rewrites_only=True)
    problem = simplify(graphs["exported"], graphs["simplified"])
    if problem:
        say(f"warning: {problem}; the graph stays unsimplified")
        del graphs["simplified"]
    else:
        chain.prove("exported", "simplified", load_graph(graphs["simplified"]), rewrites_only=True)
    fp32 = ships = list(graphs)[-1]
    details: dict[str, Any] = {}
    if settings.store == "fp16":
        ships = "stored as fp16"
        graphs[ships] = scratch / "stored.onnx"
        store_weights_fp16(graphs[fp32], graphs[ships])
        chain.prove(fp32, ships, load_graph(graphs[ships]), rewrites_only=False)
    shipped = {"model.onnx": ("fp32", graphs[ships])}
    proven = ["fp32"]
    if "fp16" in settings.precisions:
        proven.append("fp16")
        graphs["fp16"], details["fp16"] = make_fp16(graphs[fp32], scratch, chain, fp32, load_graph)
        shipped["model.fp16.onnx"] = ("fp16", graphs["fp16"])
    if "bf16" in settings.precisions:
        passed, details["bf16"] = prove_bf16(graphs[ships], scratch, chain, ships, load_graph, say)
        if passed:
            proven.append("bf16")
    if "int8" in settings.precisions:
        tiles = real_tiles(for_ranges, card, card.input.size, settings.calibration)
        int8, details["int8"] = make_int8(graphs[fp32], scratch, chain, fp32, load_graph, tiles, say)
        details["int8"]["ranges_of_proof"] = any(sample in images for sample in for_ranges)
        if int8:
            graphs["int8"] = int8
            shipped["model.int8.onnx"] = ("int8", int8)
            proven.append("int8")
    failed = chain.failed()
    card = replace(
        card, proven=tuple(name for name in proven if name not in failed), failed_links=tuple(failed.values())
    )
    shutil.copyfile(settings.fold_dir / SEEN_NAME, out / SEEN_NAME)
    write_reference(out / REFERENCE_NAME, chain.tiles, chain.maps("torch"), card)
    card = _write_model(out, card, shipped, merged)
    if settings.tensorrt:
        try:
            engine = load(out, device="tensorrt")
            before = "fp16" if engine.precision == "fp16" else ships
            chain.prove(before, "tensorrt", engine, rewrites_only=False)
        except DeviceError as error:
            say(f"warning: no TensorRT engine; {error}")
        card = replace(card, failed_links=tuple(chain.failed().values()))
        (out / "card.json").write_text(card.to_json(), encoding="utf-8")
    sizes = {name: describe_graph(path) for name, path in graphs.items()}
    proof = as_json(chain, trained_on=len(trained_on), graphs=sizes, **details)
    (out / "parity.json").write_text(json.dumps(proof, indent=1) + "\n", encoding="utf-8")
    (out / "parity.md").write_text(as_markdown(proof, card), encoding="utf-8")
    for name, size in sizes.items():
        say(f"{name}: " + ", ".join(f"{value:,} {what}" for what, value in size.items()))
    return out


def _write_model(
    folder: Path, card: ModelCard, graphs: dict[str, tuple[str, Path]], base: NucleusNet | None = None
) -> ModelCard:
    """Graphs with the card in their metadata, what else a base needs, and `card.json` with their hashes: returns it."""
    files = {}
    for name, (precision, graph) in graphs.items():
        shutil.copyfile(graph, folder / name)
        add_metadata(folder / name, nsam_card=card.to_json())
        files[name] = FileEntry(sha256_of(folder / name), precision)
    if base is not None:
        write_base(base, folder / "model.onnx", folder / BASE_NAME)
        files[BASE_NAME] = FileEntry(sha256_of(folder / BASE_NAME), "weights")
        files[REFERENCE_NAME] = FileEntry(sha256_of(folder / REFERENCE_NAME), "reference")
        files[SEEN_NAME] = FileEntry(sha256_of(folder / SEEN_NAME), "images seen")
    listed = replace(card, files=files)
    (folder / "card.json").write_text(listed.to_json(), encoding="utf-8")
    return listed


def _finished_metrics(fold_dir: Path) -> dict[str, Any]:
    path = fold_dir / "metrics.json"
    if not path.is_file():
        raise ModelError(f"`{fold_dir}`: not finished, it has no metrics.json; nsam-train --resume goes on with it")
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        PostSpec(**metrics["post"])
        _ = [metrics[name] for name in ("images", "mean", "pooled", "steps", "minutes")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"`{path}`: broken, or of another version of nsam ({error}); train the fold again") from error
    return metrics


def _training(settings: Settings, trained: Trained, metrics: dict[str, Any]) -> dict[str, Any]:
    config = read_config(settings)
    base = base_card(trained.base)
    credit, limits = [settings.attribution], settings.limits
    if base:
        credit.append(
            f"begun from {base.name} {base.version} ({base.licence}), trained on: {base.training.get('data')}"
        )
        limits = limits or base.training.get("limits", "")
    chosen = ("recipe", "base", "tune", "mpp", "steps", "batch", "crop", "lr", "seed", "folds")
    used = {name: config["settings"][name] for name in chosen}
    used["base"] = "/".join(Path(used["base"]).parts[-2:])  # RUN/foldK says enough; where it lay is nobody's concern
    return {
        "data": "; ".join(filter(None, credit)),
        "limits": limits,
        "data_sha256": config["data"]["sha256"],
        "commit": config["commit"],
        "settings": used,
        "held_out": {
            "fold": settings.fold_dir.name,
            "mpp": trained.mpp,  # at which it was tested; the model may be shown another
            "images": metrics["images"],
            "mean": metrics["mean"],
            "pooled": metrics["pooled"],
        },
        "steps": metrics["steps"],
        "minutes": metrics["minutes"],
    }
