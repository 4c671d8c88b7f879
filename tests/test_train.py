"""The training loop: what is trained moves, what is not does not, no test image is used, a stop costs nothing."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsam.runtime.errors import ModelError
from nsam.train import fit as fit_module
from nsam.train.checkpoint import build_model, load_fold
from nsam.train.data import Sample, find_samples
from nsam.train.fit import fit
from nsam.train.folds import Fold
from nsam.train.model import NucleusNet
from nsam.train.settings import NSAM, SEED, Settings
from nsam.train.step import train_mode

#: A minute's work cut down to seconds; the network keeps its size.
TINY = replace(
    NSAM,
    base="none",
    tune="full",
    crop=32,
    tiles=(64,),
    tile_halo=8,
    batch=2,
    steps=4,
    validate_every=4,
    save_every=2,
    precision="fp32",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def fold(disc_pairs: Path) -> Fold:
    samples = find_samples(disc_pairs)
    return Fold(samples[:6], samples[6:8], samples[8:])


def config(out: Path, settings: Settings) -> Path:
    """A run's folder with its config, as the command makes it."""
    from nsam.train.crossval import claim

    claim(out, settings, [], [out], resume=False)
    return out / "fold0"


def test_one_fold_leaves_what_the_design_promises(tmp_path: Path, fold: Fold) -> None:
    out = config(tmp_path, TINY)
    metrics = fit(TINY, fold, out, device=CPU)
    assert metrics is not None
    files = {"last.pt", "best.safetensors", "history.csv", "seen.txt", "metrics.json"}
    assert {p.name for p in out.iterdir()} == files
    assert metrics["images"] == 2
    assert metrics["nuclei_true"] == 8
    model, settings = load_fold(out)
    assert settings == TINY
    assert not model.training


def test_lora_moves_and_its_base_does_not(tmp_path: Path, fold: Fold) -> None:
    base_dir = config(tmp_path / "base", TINY)
    fit(TINY, fold, base_dir, device=CPU)
    settings = replace(TINY, base=str(base_dir), tune="lora")
    before = {n: p.detach().clone() for n, p in build_model(settings)[0].named_parameters()}
    out = config(tmp_path / "lora", settings)
    fit(settings, fold, out, device=CPU)
    # `best` may stem from the first validation; the last state is what four steps made.
    after = torch.load(out / "last.pt", weights_only=True)["model"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    lora = {name for name in before if ".parametrizations.weight.0." in name}
    assert len(lora) == 80
    assert lora <= moved
    assert any(name.startswith("mask_decoder.") for name in moved)
    assert not [name for name in moved if name.startswith("encoder.") and name not in lora]
    saved = load_fold(out)[0].state_dict()
    for name in (n for n in before if n.startswith("encoder.") and n not in lora):
        torch.testing.assert_close(saved[name], before[name], rtol=0, atol=0)
    buffers = {n: b for n, b in build_model(settings)[0].named_buffers() if "running_" in n}
    assert all(torch.equal(buffers[name], saved[name]) for name in buffers)


def test_batchnorm_keeps_its_base_s_statistics() -> None:
    model = NucleusNet()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    train_mode(model, replace(NSAM, base="none", tune="full"))
    assert all(norm.training for norm in norms)
    train_mode(model, replace(NSAM, base="default", tune="full"))
    assert not any(norm.training for norm in norms)
    assert model.training


def test_the_seed_recipe_trains(tmp_path: Path, fold: Fold) -> None:
    settings = replace(SEED, base="none", tune="full", crop=32, tiles=(64,), tile_halo=8, steps=2, precision="fp32")
    metrics = fit(settings, fold, config(tmp_path, settings), device=CPU)
    assert metrics is not None
    assert load_fold(tmp_path / "fold0")[0].output.channels == ("nucleus",)


def test_nothing_but_validation_images_chooses(tmp_path: Path, fold: Fold, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which images are scored while epoch and thresholds are open, and which once, at the end."""
    looked_at: list[tuple[str, list[Sample]]] = []

    def recorded(name: str) -> None:
        original = getattr(fit_module, name)

        def record(samples: list[Sample], *rest: Any, **options: Any) -> Any:
            looked_at.append((name, list(samples)))
            return original(samples, *rest, **options)

        monkeypatch.setattr(fit_module, name, record)

    for name in ("score_samples", "choose_post", "score_with_progress"):
        recorded(name)
    assert fit(replace(TINY, validate_every=2), fold, config(tmp_path, TINY), device=CPU)
    chosen = [("score_samples", fold.validation)] * 2 + [("choose_post", fold.validation)]
    assert looked_at == [*chosen, ("score_with_progress", fold.test)]


def test_test_labels_change_no_weight_and_no_threshold(tmp_path: Path, fold: Fold) -> None:
    """The same fold with other test images and labels: everything that is kept is the same to the byte."""
    results = []
    for name, test in (("a", fold.test), ("b", [replace(fold.train[0], labels=fold.train[1].labels)])):
        metrics = fit(TINY, replace(fold, test=test), config(tmp_path / name, TINY), device=CPU)
        assert metrics is not None
        results.append((metrics["post"], (tmp_path / name / "fold0" / "best.safetensors").read_bytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize(("every", "steps", "seen_at"), [(2, 4, 2), (50, 4, 4), (50, 1, 1)])
def test_a_loss_that_is_lost_ends_the_run(
    tmp_path: Path, fold: Fold, monkeypatch: pytest.MonkeyPatch, every: int, steps: int, seen_at: int
) -> None:
    monkeypatch.setattr("nsam.train.fit.LOG_EVERY", every)
    settings = replace(TINY, lr=1e30 if steps > 1 else math.inf, warmup=0.0, steps=steps)
    out = config(tmp_path, settings)
    with pytest.raises(ModelError, match=rf"not finite at step {seen_at}; begin anew.*smaller --lr"):
        fit(settings, fold, out, device=CPU)
    assert not (out / "best.safetensors").exists()


@pytest.mark.parametrize(("pause", "checkpoints"), [(0, 4), (1e9, 2)])
def test_a_slow_disk_is_written_to_less_often(
    tmp_path: Path, fold: Fold, monkeypatch: pytest.MonkeyPatch, pause: float, checkpoints: int
) -> None:
    written: list[Path] = []
    monkeypatch.setattr("nsam.train.fit.SAVE_PAUSE", pause)
    monkeypatch.setattr("nsam.train.fit.write_bytes", lambda path, _: written.append(path))
    fit(replace(TINY, steps=8), fold, config(tmp_path, TINY), device=CPU)
    assert [path.name for path in written] == ["last.pt"] * checkpoints


def test_time_out_saves_and_says_how_to_go_on(tmp_path: Path, fold: Fold) -> None:
    lines: list[str] = []
    out = config(tmp_path, TINY)
    assert fit(TINY, fold, out, device=CPU, deadline=0, say=lines.append) is None
    assert "--resume" in lines[-1]
    assert fit(TINY, fold, out, device=CPU, resume=True, say=lines.append) is not None


def test_a_run_goes_on_only_from_where_it_stopped(tmp_path: Path, fold: Fold) -> None:
    bases = [config(tmp_path / f"base{seed}", replace(TINY, seed=seed)) for seed in (0, 1)]
    for seed, base in enumerate(bases):
        fit(replace(TINY, seed=seed), fold, base, device=CPU)
    settings = replace(TINY, base=str(bases[0]), tune="lora")
    out = config(tmp_path / "lora", settings)
    fit(settings, fold, out, device=CPU, deadline=0)
    shutil.copy(bases[0] / "best.safetensors", tmp_path)
    shutil.copy(bases[1] / "best.safetensors", bases[0])
    with pytest.raises(ModelError, match="another base"):
        fit(settings, fold, out, device=CPU, resume=True)
    shutil.copy(tmp_path / "best.safetensors", bases[0])
    assert fit(settings, fold, out, device=CPU, resume=True) is not None
    shutil.copy(bases[1] / "best.safetensors", bases[0])
    with pytest.raises(ModelError, match="was trained on another base"):
        load_fold(out)
    shutil.copy(tmp_path / "best.safetensors", bases[0])
    assert load_fold(out)[1] == settings
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:1000])
    with pytest.raises(ModelError, match="delete it to begin this fold anew"):
        fit(settings, fold, out, device=CPU, resume=True)


@pytest.mark.parametrize("tune", ["decoder", "lora"])
def test_a_base_is_the_same_whatever_is_random_and_not_needed(tune: str) -> None:
    """Kinds of CPU differ in the last bits of random weights: a fold of one must be exported on another."""
    settings = replace(NSAM, base="default", tune=tune)
    assert build_model(settings)[1] == build_model(replace(settings, seed=1))[1]
    assert build_model(settings)[1] != build_model(replace(settings, base="none", tune="full"))[1]


def test_a_run_that_tunes_all_goes_on_from_no_base_of_other_images(tmp_path: Path, fold: Fold) -> None:
    """Of such a base no weight is left to tell it by, but the images that it has seen must stay known."""
    bases = [config(tmp_path / name, TINY) for name in ("one", "other")]
    fit(TINY, replace(fold, train=fold.train[:3]), bases[0], device=CPU)
    fit(TINY, replace(fold, train=fold.train[3:]), bases[1], device=CPU)
    settings, half = replace(TINY, base=str(bases[0])), replace(fold, train=fold.train[3:])
    out = config(tmp_path / "run", settings)
    fit(settings, half, out, device=CPU, deadline=0)
    seen = (out / "seen.txt").read_text()
    assert seen.count("\n") == 8
    shutil.move(bases[0], tmp_path / "kept")
    shutil.copytree(bases[1], bases[0])
    with pytest.raises(ModelError, match="its base has been trained on other images than it was; use the same base"):
        fit(settings, half, out, device=CPU, resume=True)
    assert (out / "seen.txt").read_text() == seen
    shutil.rmtree(bases[0])
    shutil.move(tmp_path / "kept", bases[0])
    assert fit(settings, half, out, device=CPU, resume=True) is not None


def test_checkpoints_of_another_version_are_told_as_such(tmp_path: Path, fold: Fold) -> None:
    out = config(tmp_path, TINY)
    assert fit(TINY, fold, out, device=CPU) is not None
    save_file(load_file(out / "best.safetensors"), out / "best.safetensors", {"base_hash": "1"})
    with pytest.raises(ModelError, match=r"best\.safetensors`: of another version of nsam; train the fold again"):
        load_fold(out)
    saved = torch.load(out / "last.pt", weights_only=True)
    del saved["kept_sha256"]
    torch.save({**saved, "base_hash": "1"}, out / "last.pt")
    with pytest.raises(ModelError, match=r"last\.pt`: of another version of nsam; begin this fold anew"):
        fit(TINY, fold, out, device=CPU, resume=True)
