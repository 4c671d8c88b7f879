"""nsam-train: fine-tune and cross-validate."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from nsam.runtime.errors import NsamError
from nsam.runtime.options import SCALE, Command, NumberRange, brought_by

log = logging.getLogger("nsam")


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="nsam")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--extra",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A folder of another source, whose images help to train every fold; only --folds source tests it. Repeatable.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option(
    "--recipe",
    type=click.Choice(["nsam", "seed"]),
    default="nsam",
    help="`seed` is that of the study which nsam grew from, made right, for comparison.",
)
@click.option(
    "--fold",
    metavar="K|all|final",
    default="all",
    help="One fold's number, all, or final: a model of all images, none tested.",
)
@click.option(
    "--folds",
    type=click.Choice(["official", "organ", "source"]),
    default="official",
    help="NuInsSeg's own split, one that keeps each organ's images together, or each source (DATA is 0, the first "
    "--extra 1, ...) tested by a network of the others.",
)
@click.option(
    "--base",
    metavar="NAME|PATH",
    default="mobile_sam",
    help="mobile_sam (40 MB, downloaded once), a .pt file of it, a folder of its ONNX exports, default (nsam's own), "
    "a run (each fold goes on from that run's own), a run's fold, an exported model, or none.",
)
@click.option(
    "--tune",
    type=click.Choice(["lora", "decoder", "full"]),
    default="lora",
    help="What is trained: LoRA in the encoder and the decoder, the decoder alone, or all weights, which --base none "
    "needs.",
)
@click.option("--rank", type=click.IntRange(1), help="LoRA's rank. [recipe: 4]")
@click.option("--alpha", type=NumberRange(0, min_open=True), help="LoRA's scale times its rank. [recipe: 4]")
@click.option(
    "--epochs", type=NumberRange(0, min_open=True), help="Passes over the training images. [recipe: 80; seed: 10]"
)
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps, instead of --epochs.")
@click.option("--batch", type=click.IntRange(1), help="Crops a step. [recipe: 8; seed: 2]")
@click.option("--lr", type=NumberRange(0, min_open=True), help="Learning rate. [recipe: 1e-3; seed: 1e-4]")
@click.option("--crop", type=click.IntRange(32), help="Side of a crop, px at the network's scale. [recipe: 224]")
@click.option("--mpp", type=SCALE, help="Scale at which the network sees tissue, µm/px. [recipe: .25; seed: .085]")
@click.option(
    "--data-mpp",
    type=SCALE,
    help="Scale of the images, µm/px. [default: .17 for NuInsSeg, else what each image says, or .25]",
)
@click.option(
    "--extra-mpp",
    type=SCALE,
    multiple=True,
    help="The same for --extra, once for each and in their order.",
)
@click.option("--seed", type=click.IntRange(0), help="Seed of weights, views and crops. [recipe: 0]")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
    default="auto",
    help="Arithmetic. `auto`: fp16 with loss scaling on CUDA, bf16 on CPUs that have it, else fp32.",
)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of the network. [default: all cores]")
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Processes that prepare crops. [default: 1; on a GPU one for each core but one, up to 8]",
)
@click.option("--max-minutes", type=NumberRange(0, min_open=True), help="Stop with a checkpoint after so long.")
@click.option("--eval-only", is_flag=True, help="Score the test parts of --out's finished folds again; trains nothing.")
@click.option(
    "--resume", is_flag=True, help="Go on with the run in --out, also after a kill; give the same options as before."
)
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def main(data: Path, out: Path, verbose: bool, **options: Any) -> None:
    """Train on DATA: NuInsSeg's folder, or one with `images` and `labels` (label maps as TIFF, PNG or
    NPY, or outlines as GeoJSON from QuPath).

    \b
    nsam-train NuInsSeg --out runs/nsam --fold 0
    nsam-train NuInsSeg --out runs/scratch --base none --tune full
    nsam-train mine --out runs/mine --base default --tune full --fold final --steps 60 --lr 3e-4

    Exit codes: 0 done; 2 refused or failed, with one line that says why; 130 interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    try:
        train(data, out, options)
    except ValueError as error:
        raise NsamError(str(error)) from error
    except RuntimeError as error:
        if "DataLoader worker (pid" in str(error):  # not what a living one raised
            raise NsamError(
                "a process that prepares crops was killed, by too little memory mostly; pass --workers 0 and --resume"
            ) from error
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        raise NsamError("out of memory; give a smaller --batch, and another --out") from error
    except KeyboardInterrupt:
        click.echo("nsam-train: interrupted; --resume goes on from the last checkpoint", err=True)
        sys.exit(130)


def train(data: Path, out: Path, options: dict[str, Any]) -> None:
    """Run the command; heavy imports are here, so that --help is quick."""
    from collections import Counter
    from dataclasses import fields, replace

    with brought_by("train"):
        import torch

        from nsam.train.checkpoint import build_model
        from nsam.train.crossval import cross_validate, goes_on, repeat_tests
        from nsam.train.data import find_extra, find_samples
        from nsam.train.folds import FOLDS
        from nsam.train.identity import check_distinct
        from nsam.train.lineage import of_fold
        from nsam.train.model import parameter_table
        from nsam.train.parallel import join
        from nsam.train.settings import NAMED_BASES, RECIPES, Settings, read_settings

    known = {field.name for field in fields(Settings)}
    chosen = {name: value for name, value in options.items() if name in known and value is not None}
    if chosen["base"] not in NAMED_BASES and Path(chosen["base"]).exists():
        chosen["base"] = str(Path(chosen["base"]).resolve())  # the run may be resumed and exported from elsewhere
    settings = (
        read_settings(out / "config.json") if options["eval_only"] else replace(RECIPES[options["recipe"]], **chosen)
    )
    which = parse_folds(options["fold"], 1 + len(options["extra"]) if settings.folds == "source" else FOLDS)
    device = pick_device(options["device"])
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    group = join(device)
    if not group.leads:
        log.setLevel(logging.WARNING)
    samples = find_samples(data, options["data_mpp"])
    scales = options["extra_mpp"] or [None] * len(options["extra"])
    if len(scales) != len(options["extra"]):
        raise NsamError(f"`--extra-mpp`: one for each of {len(options['extra'])} --extra is wanted, {len(scales)} came")
    extra = [
        sample for folder, scale in zip(options["extra"], scales, strict=True) for sample in find_extra(folder, scale)
    ]
    check_distinct([*samples, *extra])
    log.info("%d images in %d groups, device %s", len(samples), len({s.group for s in samples}), device)
    if extra:
        log.info("%d images of other sources", len(extra))
    for mpp, count in sorted(Counter(sample.mpp for sample in (*samples, *extra)).items()):
        log.info("%d images are taken to be of %.4g µm/px", count, mpp)
    if options["eval_only"]:
        finished = [name for name in which if (out / name / "metrics.json").is_file()]
        repeat_tests(samples, extra, out, finished or which, device=device, say=log.info)
        return
    if settings.batch % group.size:
        raise ValueError(f"`--batch` must be a multiple of the {group.size} processes, is {settings.batch}")
    goes_on(out, settings, options["resume"])  # now, and not after its base was downloaded
    for part, count, trainable in parameter_table(build_model(of_fold(settings, which[0]))[0]):
        log.info("%-26s %12s parameters %12s trainable", part, f"{count:,}", f"{trainable:,}")
    cross_validate(
        settings,
        samples,
        extra,
        [data, *options["extra"]],
        out,
        which,
        device=device,
        group=group,
        workers=count_workers(device) if options["workers"] is None else options["workers"],
        max_minutes=options["max_minutes"],
        resume=options["resume"],
        say=log.info,
    )


def parse_folds(text: str, count: int) -> list[str]:
    """`all`, `final` or the number of one of `count` folds -> names of folds.

    Raises:
        NsamError: anything else.
    """
    from nsam.train.folds import FINAL

    names = {str(k): f"fold{k}" for k in range(count)}
    if text == "all":
        return list(names.values())
    if text == FINAL or text in names:
        return [names.get(text, text)]
    raise NsamError(f"`--fold` must be 0 to {count - 1}, all or final, is {text}")


def pick_device(name: str) -> Any:
    """The torch device; auto takes CUDA where it is.

    Raises:
        DeviceError: it cannot be had.
    """
    import torch

    from nsam.runtime.errors import DeviceError

    local = os.environ.get("LOCAL_RANK")  # torchrun numbers the processes of a machine; each takes its own GPU
    wanted = "cpu" if name == "auto" and not torch.cuda.is_available() else name
    if wanted in ("auto", "cuda"):
        wanted = f"cuda:{local or 0}"
    elif local and wanted.startswith("cuda"):
        raise DeviceError(
            f"`--device {name}`: all processes would be on it; pass --device cuda, which gives each its own"
        )
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"`{wanted}`: cannot be had ({reason}); pass --device cpu") from error
    return device


def count_workers(device: Any) -> int:
    """Processes that prepare crops, for each process that trains: a GPU learns from more crops than a core makes."""
    from nsam.runtime.engines import available_cores

    if device.type != "cuda":
        return 1
    return max(1, min(available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1, 8))


if __name__ == "__main__":
    main()
