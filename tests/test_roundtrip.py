"""Train a few steps with LoRA -> export -> infer: ONNX equals PyTorch, and the command repeats training's figures."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tifffile
import torch
from click.testing import CliRunner

from nsam.export import graph
from nsam.export.check import write_reference
from nsam.export.cli import main as export_main
from nsam.export.precision import rounded
from nsam.runtime.card import FileEntry, ModelCard, sha256_of
from nsam.runtime.cli import main as infer_main
from nsam.runtime.engines import load
from nsam.runtime.metrics import mean_and_pooled, score
from nsam.runtime.onnx_engine import OnnxEngine
from nsam.train.checkpoint import load_fold
from nsam.train.data import find_samples
from nsam.train.evaluate import TorchEngine, draft_card


@pytest.fixture(scope="module")
def model_dir(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "m"
    # Of the second size's px the encoder's largest windows hold no whole number. One image: after so few steps all
    # nuclei are in doubt, and over several a gate would be passed by luck.
    options = ["--tiles", "5", "--images", "1", "--tile", "448", "--tile", "560", "--model-version", "3.1"]
    options += ["--precisions", "fp32,fp16"]
    result = CliRunner().invoke(export_main, [str(lora_run / "fold0"), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    return out


def test_the_chain_is_proven_and_written_down(model_dir: Path) -> None:
    proof = json.loads((model_dir / "parity.json").read_text())
    assert [(link["before"], link["after"]) for link in proof["links"]] == [
        ("torch", "merged"),
        ("merged", "exported"),
        ("exported", "simplified"),
        ("simplified", "fp16"),
    ]
    assert proof["passed"]
    assert (proof["tiles"], proof["batches"], proof["images"], proof["trained_on"]) == (5, [1, 2, 5], 1, 0)
    assert all(link["max"] <= 1e-4 for link in proof["links"][:3])
    assert 1e-4 < proof["links"][3]["max"] < 1, "a proof that does not round proves nothing"
    assert all(value <= 0.002 for link in proof["links"] for value in link["metrics"].values())
    page = (model_dir / "parity.md").read_text()
    assert page.count("| passed |") == 4
    assert "| LayerNormalization | 25 |" in page
    assert [path.name for path in model_dir.glob("*.jpg")] == ["parity-fp16.jpg"]
    assert proof["links"][0]["max"] > 0, "LoRA with B = 0 would prove nothing"
    card = ModelCard.read(model_dir)
    assert card.proven == ("fp32", "fp16")
    assert card.version == "3.1"
    assert card.training["held_out"]["images"] == 2
    assert card.post.min_area_um2 > 0


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_onnx_equals_pytorch_on_odd_inputs_too(lora_run: Path, model_dir: Path, batch: int) -> None:
    model, settings = load_fold(lora_run / "fold0")
    torch_engine = TorchEngine(model, draft_card(settings), torch.device("cpu"))
    onnx_engine = load(model_dir, device="cpu")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, 448, 448, 3), np.uint8)
    images[0] = 255
    images[-1] = 0 if batch > 1 else 255
    np.testing.assert_allclose(onnx_engine.run(images), torch_engine.run(images), atol=2e-4)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_fp16_is_near_pytorch_on_odd_inputs_too(lora_run: Path, model_dir: Path, tmp_path: Path, batch: int) -> None:
    """With fp16's rounding, which ONNX Runtime's CPU provider alone would leave out."""
    model, settings = load_fold(lora_run / "fold0")
    torch_engine = TorchEngine(model, draft_card(settings), torch.device("cpu"))
    rounded(model_dir / "model.fp16.onnx", tmp_path / "rounded.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "rounded.onnx", providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (batch, 448, 448, 3), np.uint8)
    images[0] = 255
    images[-1] = 0 if batch > 1 else 255
    apart = np.abs(session.run(["maps"], {"image": images})[0] - torch_engine.run(images))
    assert 0 < apart.max() < 0.1


def test_check_repeats_the_proof_without_data(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = OnnxEngine.run
    with monkeypatch.context() as patch:  # an engine that is wrong in large tiles alone
        patch.setattr(
            OnnxEngine, "run", lambda self, images: run(self, images) * (np.nan if images.shape[1] > 448 else 1)
        )
        result = CliRunner().invoke(export_main, ["--check", str(model_dir)])
        assert "does not take tiles of 560 px" in result.stderr
    result = CliRunner().invoke(export_main, ["--check", str(model_dir)])
    assert result.exit_code == 0, result.output
    assert "model.onnx on cpu fp32" in result.output
    assert "model.fp16.onnx on cpu" in result.output
    copy = Path(shutil.copytree(model_dir, tmp_path / "m"))
    with (copy / "model.fp16.onnx").open("ab") as stream:
        stream.write(b"x")
    result = CliRunner().invoke(export_main, ["--check", str(copy)])
    assert result.exit_code == 2
    assert "was changed or cut" in result.stderr
    card = ModelCard.read(copy)
    tile = np.full((1, 448, 448, 3), 255, np.uint8)
    maps = load(model_dir, "cpu").run(tile)
    maps[:, 0] = -10  # neither has a nucleus
    write_reference(copy / "reference.npz", tile, maps + np.array([[[5]], [[1]]], np.float32), card)
    files = {
        "model.onnx": card.files["model.onnx"],
        "reference.npz": FileEntry(sha256_of(copy / "reference.npz"), "reference"),
    }
    (copy / "card.json").write_text(replace(card, files=files).to_json())
    result = CliRunner().invoke(export_main, ["--check", str(copy)])
    assert result.exit_code == 2
    assert "that is another network, export the model again" in result.stderr


def test_the_graph_is_plain(model_dir: Path) -> None:
    graph.check_graph(model_dir / "model.onnx")
    model = onnx.load(model_dir / "model.onnx")
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["maps"]
    unused = ("iou_prediction_head", "prompt_encoder.mask_downscaling", "vit.head.fc")
    assert not [t.name for t in model.graph.initializer if any(part in t.name for part in unused)]


def test_infer_repeats_training_s_test_figures(
    small_data: Path, lora_run: Path, model_dir: Path, tmp_path: Path
) -> None:
    trained = json.loads((lora_run / "fold0" / "metrics.json").read_text())
    with (lora_run / "folds.csv").open(newline="") as stream:
        names = [r["image"] for r in csv.DictReader(stream) if (r["fold"], r["part"]) == ("fold0", "test")]
    samples = [s for s in find_samples(small_data) if s.name in names]
    inputs = [str(s.image) for s in samples]
    options = ["--out", str(tmp_path), "--model", str(model_dir), "--mpp", "0.25", "--device", "cpu"]
    result = CliRunner().invoke(infer_main, [*inputs, *options])
    assert result.exit_code == 0, result.output
    scores = []
    for sample in samples:
        truth = tifffile.imread(sample.labels).astype(np.int32)
        scores.append(score(truth, tifffile.imread(tmp_path / sample.image.stem / "labels.tif")))
    mean = mean_and_pooled(scores)[0]
    for name in ("dice", "aji", "pq"):
        assert mean[name] == pytest.approx(trained["mean"][name], abs=0.002)


def test_weights_stored_as_fp16_halve_the_file(model_dir: Path, tmp_path: Path) -> None:
    graph.store_weights_fp16(model_dir / "model.onnx", tmp_path / "half.onnx")
    whole, half = (graph.describe_graph(p) for p in (model_dir / "model.onnx", tmp_path / "half.onnx"))
    assert half["megabytes"] < 0.55 * whole["megabytes"]
    assert half["parameters"] == whole["parameters"]


def test_what_cannot_be_exported_is_one_line(lora_run: Path, model_dir: Path, small_data: Path, tmp_path: Path) -> None:
    def fails(*arguments: str) -> str:
        result = CliRunner().invoke(export_main, list(arguments))
        assert result.exit_code == 2
        assert len(result.stderr.strip().splitlines()) == 1
        return result.stderr

    fold = str(lora_run / "fold0")
    assert "exists; pass --overwrite" in fails(fold, "--out", str(model_dir))
    for no_model in (lora_run, lora_run.parent):
        assert "no model; --overwrite replaces nothing else" in fails(fold, "--out", str(no_model), "--overwrite")
    shutil.copytree(model_dir, tmp_path / "damaged")
    (tmp_path / "damaged" / "parity.json").write_text("{")
    assert "parity.json`: broken" in fails("--check", str(tmp_path / "damaged"))
    assert "missing; name a fold" in fails(str(tmp_path), "--out", str(tmp_path / "m"))
    assert "a whole run; name a fold of it" in fails(str(lora_run), "--out", str(tmp_path / "m"))
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    assert "no images in it" in fails(fold, "--out", str(tmp_path / "m"), "--data", str(tmp_path))
    assert "`--tile` must be a multiple of 16, is 100" in fails(fold, "--out", str(tmp_path / "m"), "--tile", "100")
    assert "too far from the 0.25 of this network" in fails(fold, "--out", str(tmp_path / "m"), "--mpp", "0.6")
    assert "less than half a tile of 224 px, is 224" in fails(fold, "--out", str(tmp_path / "m"), "--tile-halo", "224")
