"""An export that cannot be proven leaves no model, one whose simplifier crashes does; what it makes is a base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner

from nsam.export import build as export_build
from nsam.export import graph, images
from nsam.export.cli import main as export_main
from nsam.export.merge import load_merged
from nsam.export.parity import Chain, _place, real_tiles
from nsam.export.settings import Settings
from nsam.runtime.card import InputSpec, ModelCard, PostSpec
from nsam.runtime.engines import DEFAULT_MODEL, Engine, load
from nsam.runtime.errors import InputError, ModelError, OutputError
from nsam.train.checkpoint import build_model, load_fold
from nsam.train.data import find_samples


def test_a_crash_of_onnxsim_keeps_the_unsimplified_graph(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_SIMPLIFY", "import os; os.abort()")
    monkeypatch.setattr(export_build, "make_int8", lambda *_: (None, {"tried": []}))
    lines: list[str] = []
    settings = Settings(lora_run / "fold0", tmp_path / "m", tiles=2, tile=(448,), precisions=("fp32", "int8"))
    export_build.build(settings, lines.append)
    assert any("warning: onnxsim ended with -6" in line for line in lines)
    proof = json.loads((tmp_path / "m" / "parity.json").read_text())
    assert [link["after"] for link in proof["links"]] == ["merged", "exported"]
    # One validation image gives several tiles, and training images help out: equality needs no unseen tissue.
    assert (proof["tiles"], proof["batches"], proof["images"], proof["trained_on"]) == (2, [1, 2], 8, 7)
    assert proof["int8"]["ranges_of_proof"]
    assert (
        "training images, also those of the proof, for there are few others"
        in (tmp_path / "m" / "parity.md").read_text()
    )
    assert load(tmp_path / "m", device="cpu").card.name == "lora", "the run's folder"


def test_a_link_that_fails_leaves_no_model(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_merged = export_build.load_merged

    def wrong(fold_dir: Path) -> torch.nn.Module:
        merged = load_merged(fold_dir)
        with torch.no_grad():
            merged.encoder.vit.stages[1].blocks[0].mlp.fc1.weight.mul_(1.01)
        return merged

    monkeypatch.setattr(export_build, "load_merged", wrong)
    options = [str(lora_run / "fold0"), "--out", str(tmp_path / "m"), "--tiles", "2", "--tile", "448"]
    options += ["--images", "1", "--precisions", "fp32"]
    result = CliRunner().invoke(export_main, options)
    assert result.exit_code == 2
    assert "parity `torch -> merged` failed" in result.stderr
    assert not list(tmp_path.iterdir())
    result = CliRunner().invoke(export_main, [*options, "--force"])
    assert result.exit_code == 0, result.output
    card = ModelCard.read(tmp_path / "m")
    assert card.failed_links == ("torch -> merged",)
    assert "parity failed at torch -> merged" in load(tmp_path / "m", device="cpu").device
    result = CliRunner().invoke(export_main, ["--check", str(tmp_path / "m")])
    assert result.exit_code == 2
    assert "parity failed when it was made (torch -> merged)" in result.stderr


def test_a_tile_that_differs_fails_its_link_whatever_images_say(
    disc_pairs: Path, make_tiny_model: Callable[[Path, ModelCard], Path], tmp_path: Path
) -> None:
    card = ModelCard("m", "1", "MIT", input=InputSpec(sizes=(64, 96)), post=PostSpec(tile_halo_px=8))
    engine = load(make_tiny_model(tmp_path / "m", card), device="cpu")
    samples = find_samples(disc_pairs, 0.25)[:2]

    class Wrong:
        card, precision, device = engine.card, "fp16", "none"

        def __init__(self, where: Callable[[np.ndarray], bool], value: float) -> None:
            self.where, self.value = where, value

        def run(self, images: np.ndarray) -> np.ndarray:
            return engine.run(images) * np.float32(self.value if self.where(images) else 1)

        def run_all(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
            return map(self.run, batches)

    chain = Chain(real_tiles(samples, card, 64, 5), [real_tiles(samples, card, 96, 1)], samples, tmp_path)
    chain.add("fp32", engine)
    for value in (np.nan, -1):
        for where in (lambda images: images.shape[1] > 64, lambda images: len(images) > 2):
            link = chain.measure("fp32", "fp16", Wrong(where, value), rewrites_only=False)
            assert max(link.metrics.values()) == 0
            assert not link.passed
    assert chain.measure("fp32", "fp16", Wrong(lambda images: True, 1 + 1e-4), rewrites_only=False).passed


def test_tensorrt_that_fails_its_proof_marks_the_card(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_engine = export_build.load

    def tensorrt(folder: Path, device: str = "cpu", precision: str = "auto") -> Engine:
        engine = load_engine(folder, "cpu", precision="fp32")
        if device == "tensorrt":
            run = engine.run
            monkeypatch.setattr(engine, "run", lambda images: run(images) + 1)
        return engine

    monkeypatch.setattr(export_build, "load", tensorrt)
    options = [str(lora_run / "fold0"), "--out", str(tmp_path / "m"), "--tiles", "2", "--tile", "448", "--images", "1"]
    result = CliRunner().invoke(export_main, [*options, "--precisions", "fp32", "--tensorrt", "--force"])
    assert result.exit_code == 0, result.output
    card = ModelCard.read(tmp_path / "m")
    assert (card.failed_links, card.proven) == (("simplified -> tensorrt",), ("fp32",))


def test_what_a_fold_lacks_is_told_before_its_proof(lora_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(lora_run, tmp_path / "run"))
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="a link; give the folder"):
        export_build.build(Settings(run / "fold0", tmp_path / "link", overwrite=True))
    (run / "folds.csv").write_text("fold,part,image\nfold0,train,a\nfold0,validation,a\n")
    with pytest.raises(ModelError, match=r"folds\.csv`: cannot be read \('mpp'\)"):
        export_build.build(Settings(run / "fold0", tmp_path / "m"))
    (run / "fold0" / "seen.txt").unlink()
    with pytest.raises(ModelError, match=r"seen\.txt`: missing"):
        export_build.build(Settings(run / "fold0", tmp_path / "m"))
    for text in ("{", '{"post": {"unknown": 1}}'):
        (run / "fold0" / "metrics.json").write_text(text)
        with pytest.raises(ModelError, match=r"metrics\.json`: broken, or of another version"):
            export_build.build(Settings(run / "fold0", tmp_path / "m"))


def test_a_card_credits_the_data_of_its_base_s_card(lora_run: Path, tmp_path: Path) -> None:
    """Through runs that went on from one another; what the user says of the own data stands first."""
    metrics = json.loads((lora_run / "fold0" / "metrics.json").read_text())
    trained = replace(load_fold(lora_run / "fold0")[1], base="default")
    default = ModelCard.read(DEFAULT_MODEL)
    (tmp_path / "first" / "fold0").mkdir(parents=True)
    (tmp_path / "first" / "config.json").write_text(json.dumps({"settings": asdict(trained)}))
    begun = f"begun from nsam-he {default.version} (Apache-2.0), trained on: NuInsSeg"
    for base in ("default", str(DEFAULT_MODEL), str(tmp_path / "first" / "fold0")):
        settings = Settings(lora_run / "fold0", tmp_path / "m", attribution="slides of ours, CC0")
        told = export_build._training(settings, replace(trained, base=base), metrics)
        assert told["data"].startswith(f"slides of ours, CC0; {begun}")
        assert told["limits"] == default.training["limits"]
    settings = Settings(lora_run / "fold0", tmp_path / "m", limits="mice only")
    assert export_build._training(settings, trained, metrics)["limits"] == "mice only"
    assert export_build._training(settings, replace(trained, base="mobile_sam"), metrics)["data"] == ""


@pytest.mark.parametrize(("asked", "counts"), [(1, (1, 0, 7)), (3, (3, 2, 5)), (6, (6, 5, 7)), (40, (8, 7, 7))])
def test_int8_takes_its_ranges_from_images_that_do_not_prove_it(
    lora_run: Path, asked: int, counts: tuple[int, ...]
) -> None:
    settings = Settings(lora_run / "fold0", lora_run / "m", images=asked)
    proof, trained_on, ranges = images.proof_samples(settings)
    assert (len(proof), len(trained_on), len(ranges)) == counts
    assert set(trained_on) <= set(proof)
    assert bool(set(proof) & set(ranges)) == (asked > 3), "two would be too few for ranges, though none proves"


def test_scales_are_those_of_the_run_whatever_images_say(tmp_path: Path) -> None:
    """One that needed --data-mpp, as its images state theirs wrongly, is exported without it."""
    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
    pixels = np.zeros((8, 8, 3), np.uint8)
    wrong = {"resolution": (20000, 22000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "data" / "images" / "a.tif", pixels, photometric="rgb", **wrong)
    tifffile.imwrite(tmp_path / "data" / "labels" / "a.tif", pixels[..., 0])
    with pytest.raises(InputError, match="pass its scale"):
        find_samples(tmp_path / "data")
    (tmp_path / "folds.csv").write_text("fold,part,image,group,mpp\nfinal,train,images/a.tif,data,0.5\n")
    (tmp_path / "config.json").write_text(json.dumps({"data": {"sources": [str(tmp_path / "data")]}}))
    (sample,) = images.fold_samples(Settings(tmp_path / "final", tmp_path / "m"), "train")
    assert sample.mpp == 0.5


def test_tiles_of_one_image_lie_apart() -> None:
    assert len({_place(i) for i in range(100)}) == 100


@pytest.mark.parametrize("store", ["fp32", "fp16"])
def test_an_exported_model_is_a_base(lora_run: Path, tmp_path: Path, store: str) -> None:
    out = tmp_path / "m"
    options = ["--tiles", "2", "--store", store, "--precisions", "fp32", "--tile", "224", "--tile-halo", "16"]
    options += ["--mpp", "0.3", "--images", "1"]
    result = CliRunner().invoke(export_main, [str(lora_run / "fold0"), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    card = load(out, device="cpu").card
    assert (card.input.size, card.post.tile_halo_px, card.input.mpp) == (224, 16, 0.3)
    settings = replace(load_fold(lora_run / "fold0")[1], base=str(out), tune="lora")
    reread = build_model(settings)[0].eval()
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = load_merged(lora_run / "fold0")(images)
        # LoRA begins with B = 0; the base alone answers.
        torch.testing.assert_close(reread(images), expected, rtol=0, atol=1e-4 if store == "fp32" else 0.05)
    for weights, beside in (
        (out / "base.safetensors", out / "card.json"),
        (lora_run / "fold0" / "best.safetensors", lora_run / "fold0" / "history.csv"),
    ):
        assert weights.stat().st_mode == beside.stat().st_mode, "colleagues read them, too"
    assert (out / "base.safetensors").stat().st_size < (17e6 if store == "fp32" else 9e6)
    with pytest.raises(ModelError, match="are asked for"):
        build_model(replace(settings, channels=("nucleus",)))
    (out / "base.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="was changed or cut"):
        build_model(settings)
