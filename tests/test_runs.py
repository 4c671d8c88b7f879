"""`nsam-train`: a kill costs nothing, no base has seen what tests it, processes share the work, errors are one line."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageOps

from nsam.runtime.errors import DeviceError
from nsam.train.checkpoint import build_model, load_fold
from nsam.train.cli import count_workers, main, pick_device
from nsam.train.lineage import SEEN_NAME
from nsam.train.settings import NSAM


def test_a_killed_run_resumes_to_the_same_history(tmp_path: Path, disc_pairs: Path) -> None:
    """SIGKILL after the first checkpoint, then --resume: history and weights equal an undisturbed run's."""
    options = ["--base", "none", "--tune", "full", "--fold", "0", "--crop", "32", "--batch", "2", "--workers", "0"]
    options += ["--steps", "150", "--precision", "fp32", "--threads", "1"]

    def command(out: Path, *more: str) -> list[str]:
        return [sys.executable, "-m", "nsam.train.cli", str(disc_pairs), "--out", str(out), *options, *more]

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
    assert [int(row["step"]) for row in rows] == [50, 100, 150]
    losses = [float(row["bce"]) + float(row["dice"]) + float(row["distance"]) for row in rows]
    assert losses[-1] < 0.8 * losses[0], "it does not learn to find dark discs"


def test_eval_only_repeats_the_figures_and_notices_other_weights(tmp_path: Path, disc_pairs: Path) -> None:
    options = ["--base", "none", "--tune", "full", "--fold", "0", "--crop", "32", "--batch", "2", "--workers", "0"]
    command = [str(disc_pairs), "--out", str(tmp_path), *options, "--steps", "60", "--precision", "fp32"]
    assert CliRunner().invoke(main, command).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 6, "two test images, in each of three rows"
    assert "http" not in page, "the page must need nothing else"
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    result = CliRunner().invoke(main, [str(disc_pairs), "--out", str(tmp_path), "--fold", "0", "--eval-only"])
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == files, "it writes"
    metrics = json.loads((tmp_path / "fold0" / "metrics.json").read_text())
    metrics["mean"]["dice"] += 0.01
    (tmp_path / "fold0" / "metrics.json").write_text(json.dumps(metrics))
    result = CliRunner().invoke(main, [str(disc_pairs), "--out", str(tmp_path), "--fold", "0", "--eval-only"])
    assert result.exit_code == 2
    assert "dice of its test part does not repeat" in result.stderr
    result = CliRunner().invoke(main, [str(disc_pairs), "--out", str(tmp_path), "--fold", "1", "--eval-only"])
    assert "not finished" in result.stderr
    more = ["--fold", "0", "--eval-only", "--data-mpp", "0.5"]
    assert "saw other data" in CliRunner().invoke(main, [str(disc_pairs), "--out", str(tmp_path), *more]).stderr


def test_a_bad_label_of_any_part_is_named_before_the_run_begins(tmp_path: Path, disc_pairs: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(disc_pairs, data)
    tifffile.imwrite(data / "labels" / "7.tif", np.zeros((5, 5), np.uint8))
    for fold in range(5):
        result = CliRunner().invoke(
            main, [str(data), "--out", str(tmp_path / "out"), "--base", "none", "--tune", "full", "--fold", str(fold)]
        )
        assert result.exit_code == 2
        assert "7.tif`: has 5 x 5 px" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("images", [1, 2])
def test_few_images_train_a_final_model(tmp_path: Path, disc_pairs: Path, images: int) -> None:
    for part, kind in (("images", "png"), ("labels", "tif")):
        (tmp_path / "data" / part).mkdir(parents=True)
        for i in range(images):
            shutil.copy(disc_pairs / part / f"{i}.{kind}", tmp_path / "data" / part)
    options = ["--base", "none", "--tune", "full", "--crop", "32", "--batch", "1", "--steps", "1", "--workers", "0"]
    command = [str(tmp_path / "data"), "--out", str(tmp_path / "out"), *options]
    assert "--fold final trains on all" in CliRunner().invoke(main, command).stderr
    result = CliRunner().invoke(main, [*command, "--fold", "final"])
    if images == 1:
        assert "give two or more" in result.stderr
    else:
        assert result.exit_code == 0, result.output
        assert (tmp_path / "out" / "final" / "metrics.json").is_file()


def test_a_final_model_is_of_all_images(tmp_path: Path, disc_pairs: Path) -> None:
    options = ["--base", "none", "--tune", "full", "--fold", "final", "--crop", "32", "--batch", "2", "--steps", "2"]
    result = CliRunner().invoke(main, [str(disc_pairs), "--out", str(tmp_path), *options, "--workers", "0"])
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "final" / "metrics.json").read_text())
    assert metrics["images"] == 0
    assert metrics["mean"] == {}
    assert load_fold(tmp_path / "final")[1].steps == 2
    again = CliRunner().invoke(main, [str(disc_pairs), "--out", str(tmp_path), "--fold", "final", "--eval-only"])
    assert "has no test part" in again.stderr


def test_no_base_has_seen_the_images_that_test_it(tmp_path: Path, disc_pairs: Path) -> None:
    """A fold goes on from the same fold of a run, and from no other; what a base of its base saw counts, too."""
    options = ["--tune", "full", "--crop", "32", "--batch", "2", "--steps", "2", "--workers", "0", "--resume"]

    def run(out: str, base: Path | str, fold: str) -> Result:
        command = [str(disc_pairs), "--out", str(tmp_path / out), "--base", str(base), "--fold", fold]
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


def test_a_source_is_tested_by_a_network_of_another(tmp_path: Path, disc_pairs: Path) -> None:
    for part in ("images", "labels"):
        (tmp_path / "other" / part).mkdir(parents=True)
    for i in range(10):  # mirrored: the same image twice would be refused
        image = Image.open(disc_pairs / "images" / f"{i}.png")
        ImageOps.mirror(image).save(tmp_path / "other" / "images" / f"{i}.png")
        labels = tifffile.imread(disc_pairs / "labels" / f"{i}.tif")
        tifffile.imwrite(tmp_path / "other" / "labels" / f"{i}.tif", labels[:, ::-1])
    options = ["--base", "none", "--tune", "full", "--crop", "32", "--batch", "2", "--steps", "1", "--workers", "0"]
    command = [str(disc_pairs), "--extra", str(tmp_path / "other"), "--out", str(tmp_path / "out"), *options]
    command += ["--folds", "source"]
    assert "`--fold` must be 0 to 1" in CliRunner().invoke(main, [*command, "--fold", "2"]).stderr
    result = CliRunner().invoke(main, [*command, "--fold", "1"])
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "out" / "fold1" / "metrics.json").read_text())
    assert sorted(metrics["per_image"]) == [f"other/images/{i}.png" for i in range(10)]
    assert (tmp_path / "out" / "fold1" / SEEN_NAME).read_text().count("\n") == 10
    assert "other/images/" in (tmp_path / "out" / "report.html").read_text()
    # Which folds there are the run says; of all, those that are finished.
    again = [str(disc_pairs), "--extra", str(tmp_path / "other"), "--out", str(tmp_path / "out"), "--eval-only"]
    result = CliRunner().invoke(main, again)
    assert result.exit_code == 0, result.output
    for part in ("images", "labels"):
        for path in (tmp_path / "other" / part).iterdir():
            if path.stem != "0":
                path.unlink()
    few = [*command, "--out", str(tmp_path / "few"), "--fold"]
    refused = CliRunner().invoke(main, [*few, "0"])
    assert "`fold0`: has nothing to train on; a source's only image is set aside" in refused.stderr
    assert not (tmp_path / "few").exists()
    result = CliRunner().invoke(main, [*few, "1"])
    assert result.exit_code == 0, result.output


def test_two_processes_train_one_fold(tmp_path: Path, disc_pairs: Path) -> None:
    """With BatchNorm at rest (LoRA), two halves of each batch make the steps that one process makes."""
    base = tmp_path / "base"
    common = ["--fold", "0", "--crop", "32", "--batch", "4", "--workers", "0", "--precision", "fp32", "--steps", "20"]
    made = CliRunner().invoke(main, [str(disc_pairs), "--out", str(base), "--base", "none", "--tune", "full", *common])
    assert made.exit_code == 0, made.output
    more = [str(disc_pairs), "--base", str(base / "fold0"), *common, "--threads", "1"]
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


def test_folds_side_by_side_make_one_run(tmp_path: Path, disc_pairs: Path) -> None:
    out = tmp_path / "run"
    options = ["--base", "none", "--tune", "full", "--crop", "32", "--batch", "2", "--steps", "2", "--threads", "1"]
    command = [
        sys.executable,
        "-m",
        "nsam.train.cli",
        str(disc_pairs),
        "--out",
        str(out),
        *options,
        "--resume",
        "--fold",
    ]
    processes = [subprocess.Popen([*command, fold]) for fold in ("0", "1")]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert "Finished folds: fold0, fold1." in (out / "summary.md").read_text()
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fold", "7"], "`--fold` must be 0 to 4, all or final, is 7"),
        (["--device", "cuda:99"], "cannot be had"),
        (["--base", "/nowhere.pt"], "no such base"),
        (["--tune", "lora"], "nothing has trained what `--tune lora` leaves as it is; pass --tune full"),
        (["--seed", "-1"], "-1 is not in the range x>=0"),
        (["--epochs", "inf"], "must be a finite number"),
        (["--lr", "nan"], "must be a finite number"),
        (["--crop", "100"], "multiple of 16"),
        (["--extra-mpp", "0.5"], "one for each of 0 --extra is wanted, 1 came"),
    ],
)
def test_wrong_use_is_one_line(tmp_path: Path, disc_pairs: Path, options: list[str], message: str) -> None:
    base = ["--base", "none", "--tune", "full"]
    result = CliRunner().invoke(main, [str(disc_pairs), "--out", str(tmp_path / "r"), *base, *options])
    assert result.exit_code == 2
    assert message in result.stderr
    usage = 3 * result.stderr.startswith("Usage: ")  # click's own: how to call, where help is, an empty line
    assert len(result.stderr.strip().splitlines()) == 1 + usage
    assert not (tmp_path / "r").exists()


def test_processes_of_torchrun_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(DeviceError, match="all processes would be on it; pass --device cuda"):
        pick_device("cuda:0")
    with pytest.raises(DeviceError, match="`cuda:99`: cannot be had"):
        pick_device("cuda")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("device", "cores", "processes", "workers"),
    [("cpu", 16, 1, 1), ("cuda", 4, 1, 3), ("cuda", 1, 1, 1), ("cuda", 64, 1, 8), ("cuda", 16, 4, 3)],
)
def test_a_gpu_is_given_crops_by_all_cores_but_one(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr("nsam.runtime.engines.available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert count_workers(torch.device(device)) == workers


def test_a_disk_that_refuses_is_one_line(tmp_path: Path, disc_pairs: Path) -> None:
    (tmp_path / "fold0" / "last.pt").mkdir(parents=True)
    (tmp_path / "fold0" / "last.pt.1234.part").touch()  # what a kill left
    options = ["--base", "none", "--tune", "full", "--fold", "0", "--crop", "32", "--batch", "2", "--steps", "1"]
    result = CliRunner().invoke(main, [str(disc_pairs), "--out", str(tmp_path), *options, "--workers", "0"])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: `{tmp_path / 'fold0' / 'last.pt'}`: cannot be written (")
    assert not list(tmp_path.rglob("*.part"))


def test_too_little_memory_is_one_line(tmp_path: Path, disc_pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("nsam.train.crossval.fit", refuse)
    command = [str(disc_pairs), "--out", str(tmp_path), "--base", "none", "--tune", "full", "--fold", "0"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["Error: out of memory; give a smaller --batch, and another --out"]
    told = CliRunner().invoke(main, [*command, "--resume", "-v"])
    assert told.exit_code == 2
    assert "torch.OutOfMemoryError: CUDA out of memory" in told.stderr
    assert told.stderr.endswith(result.stderr)


def test_a_process_that_was_killed_is_one_line(tmp_path: Path, disc_pairs: Path) -> None:
    """By the system that is out of memory, for instance."""
    code = """
import os, signal, sys
from nsam.train import views
from nsam.train.cli import main
views.Views.__getitem__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""
    options = ["--out", str(tmp_path), "--base", "none", "--tune", "full", "--fold", "0", "--crop", "32"]
    options += ["--workers", "1"]
    command = [sys.executable, "-c", code, str(disc_pairs), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    told = "a process that prepares crops was killed, by too little memory mostly; pass --workers 0 and --resume"
    assert done.stderr.splitlines()[-1] == f"Error: {told}"
    assert "Traceback" not in done.stderr


def test_a_run_is_not_overwritten_or_mixed(tmp_path: Path, disc_pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before its base is looked for: the default one would be downloaded."""

    def download() -> None:
        raise AssertionError

    monkeypatch.setattr("nsam.train.checkpoint.download_mobile_sam", download)
    (tmp_path / "config.json").write_text(
        json.dumps({"settings": {**NSAM.__dict__, "channels": ["nucleus"]}, "data": {"sha256": ""}})
    )
    for more, message in (([], "holds a run already"), (["--resume"], "give the same options")):
        result = CliRunner().invoke(main, [str(disc_pairs), "--out", str(tmp_path), *more])
        assert result.exit_code == 2
        assert message in result.stderr
