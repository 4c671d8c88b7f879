"""The training half: what is trained moves, what is not does not, a kill costs nothing, no test image is used."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageOps

from nsam.runtime.errors import ModelError
from nsam.train.checkpoint import build_model, load_fold
from nsam.train.cli import main
from nsam.train.data import find_samples
from nsam.train.fit import fit
from nsam.train.folds import Fold
from nsam.train.lineage import SEEN_NAME
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
def discs(tmp_path_factory: pytest.TempPathFactory, draw_discs: Callable) -> Path:
    """A labelled folder pair of ten images of 64 x 64."""
    root = tmp_path_factory.mktemp("discs")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        centres = [(x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)) for x in (16, 48) for y in (16, 48)]
        Image.fromarray(draw_discs((64, 64), centres, 9)).save(root / "images" / f"{i}.png")
        labels = np.zeros((64, 64), np.uint16)
        for value, centre in enumerate(centres, 1):
            labels[draw_discs((64, 64), [centre], 9)[..., 0] < 128] = value
        tifffile.imwrite(root / "labels" / f"{i}.tif", labels)
    return root


@pytest.fixture(scope="session")
def fold(discs: Path) -> Fold:
    samples = find_samples(discs)
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


def test_test_labels_change_no_weight_and_no_threshold(tmp_path: Path, fold: Fold) -> None:
    """The same fold with other test images and labels: everything that is kept is the same to the byte."""
    results = []
    for name, test in (("a", fold.test), ("b", [replace(fold.train[0], labels=fold.train[1].labels)])):
        metrics = fit(TINY, replace(fold, test=test), config(tmp_path / name, TINY), device=CPU)
        assert metrics is not None
        results.append((metrics["post"], (tmp_path / name / "fold0" / "best.safetensors").read_bytes()))
    assert results[0] == results[1]


def test_a_killed_run_resumes_to_the_same_history(tmp_path: Path, discs: Path) -> None:
    """SIGKILL after the first checkpoint, then --resume: history and weights equal an undisturbed run's."""
    options = ["--base", "none", "--tune", "full", "--fold", "0", "--crop", "32", "--batch", "2", "--workers", "0"]
    options += ["--steps", "250", "--precision", "fp32", "--threads", "1"]

    def command(out: Path, *more: str) -> list[str]:
        return [sys.executable, "-m", "nsam.train.cli", str(discs), "--out", str(out), *options, *more]

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen(command(killed), env=env, stdout=subprocess.DEVNULL) as process:
        while not (killed / "fold0" / "last.pt").exists():
            assert process.poll() is None, "ended before its first checkpoint"
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
    assert not (killed / "fold0" / "metrics.json").exists()
    subprocess.run(command(killed, "--resume"), env=env, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(command(whole), env=env, check=True, stdout=subprocess.DEVNULL)
    for name in ("history.csv", "best.safetensors"):
        assert (killed / "fold0" / name).read_bytes() == (whole / "fold0" / name).read_bytes()
    with (whole / "fold0" / "history.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [50, 100, 150, 200, 250]
    losses = [float(row["bce"]) + float(row["dice"]) + float(row["distance"]) for row in rows]
    assert losses[-1] < 0.8 * losses[0], "it does not learn to find dark discs"


def test_eval_only_repeats_the_figures_and_notices_other_weights(tmp_path: Path, discs: Path) -> None:
    options = ["--base", "none", "--tune", "full", "--fold", "0", "--crop", "32", "--batch", "2", "--workers", "0"]
    command = [str(discs), "--out", str(tmp_path), *options, "--steps", "60", "--precision", "fp32"]
    assert CliRunner().invoke(main, command).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 6, "two test images, in each of three rows"
    assert "http" not in page, "the page must need nothing else"
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    result = CliRunner().invoke(main, [str(discs), "--out", str(tmp_path), "--fold", "0", "--eval-only"])
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == files, "it writes"
    metrics = json.loads((tmp_path / "fold0" / "metrics.json").read_text())
    metrics["mean"]["dice"] += 0.01
    (tmp_path / "fold0" / "metrics.json").write_text(json.dumps(metrics))
    result = CliRunner().invoke(main, [str(discs), "--out", str(tmp_path), "--fold", "0", "--eval-only"])
    assert result.exit_code == 2
    assert "dice of its test part does not repeat" in result.stderr
    result = CliRunner().invoke(main, [str(discs), "--out", str(tmp_path), "--fold", "1", "--eval-only"])
    assert "not finished" in result.stderr
    more = ["--fold", "0", "--eval-only", "--data-mpp", "0.5"]
    assert "saw other data" in CliRunner().invoke(main, [str(discs), "--out", str(tmp_path), *more]).stderr


def test_a_bad_label_of_any_part_is_named_before_the_run_begins(tmp_path: Path, discs: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(discs, data)
    tifffile.imwrite(data / "labels" / "7.tif", np.zeros((5, 5), np.uint8))
    for fold in range(5):
        result = CliRunner().invoke(
            main, [str(data), "--out", str(tmp_path / "out"), "--base", "none", "--fold", str(fold)]
        )
        assert result.exit_code == 2
        assert "7.tif`: has 5 x 5 px" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("images", [1, 2])
def test_few_images_train_a_final_model(tmp_path: Path, discs: Path, images: int) -> None:
    for part, kind in (("images", "png"), ("labels", "tif")):
        (tmp_path / "data" / part).mkdir(parents=True)
        for i in range(images):
            shutil.copy(discs / part / f"{i}.{kind}", tmp_path / "data" / part)
    options = ["--base", "none", "--tune", "full", "--crop", "32", "--batch", "1", "--steps", "1", "--workers", "0"]
    command = [str(tmp_path / "data"), "--out", str(tmp_path / "out"), *options]
    assert "--fold final trains on all" in CliRunner().invoke(main, command).stderr
    result = CliRunner().invoke(main, [*command, "--fold", "final"])
    if images == 1:
        assert "give two or more" in result.stderr
    else:
        assert result.exit_code == 0, result.output
        assert (tmp_path / "out" / "final" / "metrics.json").is_file()


def test_a_final_model_is_of_all_images(tmp_path: Path, discs: Path) -> None:
    options = ["--base", "none", "--tune", "full", "--fold", "final", "--crop", "32", "--batch", "2", "--steps", "2"]
    result = CliRunner().invoke(main, [str(discs), "--out", str(tmp_path), *options, "--workers", "0"])
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "final" / "metrics.json").read_text())
    assert metrics["images"] == 0
    assert metrics["mean"] == {}
    assert load_fold(tmp_path / "final")[1].steps == 2
    again = CliRunner().invoke(main, [str(discs), "--out", str(tmp_path), "--fold", "final", "--eval-only"])
    assert "has no test part" in again.stderr


def test_no_base_has_seen_the_images_that_test_it(tmp_path: Path, discs: Path) -> None:
    """A fold goes on from the same fold of a run, and from no other; what a base of its base saw counts, too."""
    options = ["--tune", "full", "--crop", "32", "--batch", "2", "--steps", "2", "--workers", "0", "--resume"]

    def run(out: str, base: Path | str, fold: str) -> Result:
        command = [str(discs), "--out", str(tmp_path / out), "--base", str(base), "--fold", fold]
        return CliRunner().invoke(main, [*command, *options])

    first = tmp_path / "first"
    for out, base, fold in (
        ("first", "none", "0"),
        ("first", "none", "1"),
        ("fold", first / "fold0", "0"),
        ("run", first, "1"),
        ("final", first / "fold0", "final"),  # it tests nothing
    ):
        result = run(out, base, fold)
        assert result.exit_code == 0, result.output
    for path in (tmp_path / "fold" / "fold0", tmp_path / "run" / "fold1"):
        assert (path / SEEN_NAME).read_text() == (first / path.name / SEEN_NAME).read_text()
    assert (tmp_path / "final" / "final" / SEEN_NAME).read_text().count("\n") == 10
    goes_on = build_model(load_fold(tmp_path / "run" / "fold1")[1])[0].state_dict()
    begun = load_fold(first / "fold1")[0].state_dict()
    assert all(torch.equal(goes_on[name], begun[name]) for name in begun)
    for base in (first / "fold0", tmp_path / "fold" / "fold0"):
        for fold in ("1", "all"):
            result = run("leak", base, fold)
            assert result.exit_code == 2
            assert "has been trained on 2 of the 2 test images of fold1" in result.stderr
    assert not (tmp_path / "leak").exists()
    result = run("missing", first, "2")
    assert result.exit_code == 2
    assert "has no finished fold2 to go on from" in result.stderr
    (first / "fold1" / SEEN_NAME).unlink()
    assert f"{SEEN_NAME}`: missing" in run("unknown", first, "1").stderr


def test_a_source_is_tested_by_a_network_of_another(tmp_path: Path, discs: Path) -> None:
    for part in ("images", "labels"):
        (tmp_path / "other" / part).mkdir(parents=True)
    for i in range(10):  # mirrored: the same image twice would be refused
        image = Image.open(discs / "images" / f"{i}.png")
        ImageOps.mirror(image).save(tmp_path / "other" / "images" / f"{i}.png")
        labels = tifffile.imread(discs / "labels" / f"{i}.tif")
        tifffile.imwrite(tmp_path / "other" / "labels" / f"{i}.tif", labels[:, ::-1])
    options = ["--base", "none", "--tune", "full", "--crop", "32", "--batch", "2", "--steps", "1", "--workers", "0"]
    command = [str(discs), "--extra", str(tmp_path / "other"), "--out", str(tmp_path / "out"), *options]
    command += ["--folds", "source"]
    assert "`--fold` must be 0 to 1" in CliRunner().invoke(main, [*command, "--fold", "2"]).stderr
    result = CliRunner().invoke(main, [*command, "--fold", "1"])
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "out" / "fold1" / "metrics.json").read_text())
    assert sorted(metrics["per_image"]) == [f"other/images/{i}.png" for i in range(10)]
    assert (tmp_path / "out" / "fold1" / SEEN_NAME).read_text().count("\n") == 10
    assert "other/images/" in (tmp_path / "out" / "report.html").read_text()


def test_two_processes_train_one_fold(tmp_path: Path, discs: Path) -> None:
    """With BatchNorm at rest (LoRA), two halves of each batch make the steps that one process makes."""
    base = tmp_path / "base"
    common = ["--fold", "0", "--crop", "32", "--batch", "4", "--workers", "0", "--precision", "fp32", "--steps", "50"]
    made = CliRunner().invoke(main, [str(discs), "--out", str(base), "--base", "none", "--tune", "full", *common])
    assert made.exit_code == 0, made.output
    more = [str(discs), "--base", str(base / "fold0"), *common, "--threads", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    losses = []
    for name, start in (("one", [sys.executable]), ("two", torchrun)):
        subprocess.run([*start, "-m", "nsam.train.cli", *more, "--out", str(tmp_path / name)], env=env, check=True)
        with (tmp_path / name / "fold0" / "history.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        losses.append([[float(row[name]) for name in ("bce", "dice", "distance")] for row in rows])
    assert len(losses[0]) == 1
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-4)


def test_folds_side_by_side_make_one_run(tmp_path: Path, discs: Path) -> None:
    out = tmp_path / "run"
    options = ["--base", "none", "--tune", "full", "--crop", "32", "--batch", "2", "--steps", "2", "--threads", "1"]
    command = [sys.executable, "-m", "nsam.train.cli", str(discs), "--out", str(out), *options, "--resume", "--fold"]
    processes = [subprocess.Popen([*command, fold]) for fold in ("0", "1")]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert "Finished folds: fold0, fold1." in (out / "summary.md").read_text()
    assert not list(out.rglob("*.part"))


def test_a_loss_that_is_lost_ends_the_run(tmp_path: Path, fold: Fold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsam.train.fit.LOG_EVERY", 2)
    settings = replace(TINY, lr=1e30, warmup=0.0)
    out = config(tmp_path, settings)
    with pytest.raises(ModelError, match=r"not finite at step 2; begin anew.*smaller --lr"):
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
    out = config(tmp_path, TINY)
    fit(TINY, fold, out, device=CPU, deadline=0)
    with pytest.raises(ModelError, match="another base"):  # weights of another seed
        fit(replace(TINY, seed=1), fold, out, device=CPU, resume=True)
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:1000])
    with pytest.raises(ModelError, match="delete it to begin this fold anew"):
        fit(TINY, fold, out, device=CPU, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fold", "7"], "`--fold` must be 0 to 4, all or final, is 7"),
        (["--device", "cuda:99"], "cannot be had"),
        (["--base", "/nowhere.pt"], "no such base"),
        (["--crop", "100"], "multiple of 16"),
        (["--extra-mpp", "0.5"], "one for each of 0 --extra is wanted, 1 came"),
    ],
)
def test_wrong_use_is_one_line(tmp_path: Path, discs: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, [str(discs), "--out", str(tmp_path / "r"), "--base", "none", *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_disk_that_refuses_is_one_line(tmp_path: Path, discs: Path) -> None:
    (tmp_path / "fold0" / "last.pt").mkdir(parents=True)
    (tmp_path / "fold0" / "last.pt.1234.part").touch()  # what a kill left
    options = ["--base", "none", "--tune", "full", "--fold", "0", "--crop", "32", "--batch", "2", "--steps", "1"]
    result = CliRunner().invoke(main, [str(discs), "--out", str(tmp_path), *options, "--workers", "0"])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: `{tmp_path / 'fold0' / 'last.pt'}`: cannot be written (")
    assert not list(tmp_path.rglob("*.part"))


def test_too_little_memory_is_one_line(tmp_path: Path, discs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("nsam.train.crossval.fit", refuse)
    command = [str(discs), "--out", str(tmp_path), "--base", "none", "--fold", "0"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["Error: out of memory; give a smaller --batch, and another --out"]
    told = CliRunner().invoke(main, [*command, "--resume", "-v"])
    assert told.exit_code == 2
    assert "torch.OutOfMemoryError: CUDA out of memory" in told.stderr
    assert told.stderr.endswith(result.stderr)


def test_a_run_is_not_overwritten_or_mixed(tmp_path: Path, discs: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"settings": {**TINY.__dict__, "channels": ["nucleus"]}, "data": {"sha256": ""}})
    )
    for more, message in (([], "holds a run already"), (["--resume"], "give the same options")):
        result = CliRunner().invoke(main, [str(discs), "--out", str(tmp_path), "--base", "none", *more])
        assert result.exit_code == 2
        assert message in result.stderr
