"""nsam-export: a trained fold becomes a model directory."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from nsam.export.settings import PRECISIONS, Settings
from nsam.runtime.options import SCALE, Command, brought_by, names_of


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="nsam")
@click.argument("fold_dir", metavar="[RUN/foldK | RUN/final]", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Model directory to make.")
@click.option(
    "--check",
    metavar="MODEL",
    type=click.Path(path_type=Path),
    help="Verify a model directory on this machine instead.",
)
@click.option(
    "--precisions",
    metavar="LIST",
    default=",".join(PRECISIONS),
    callback=names_of(PRECISIONS),
    help="What to prove and make, separated by commas. fp32 always is; int8 only if it is exact enough and faster "
    "here.",
)
@click.option("--tensorrt", is_flag=True, help="Also build TensorRT's engine for the GPU at hand.")
@click.option(
    "--force",
    is_flag=True,
    help="Keep the files when a link fails its gate; the card then says so, and nsam-infer on every run.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    help="The run's data, and its --extra in their order, for the proof. [default: where the run found them]",
)
@click.option("--name", help="Name in the card. [default: the run's folder]")
@click.option("--model-version", default="0.1.0", help="Version in the card.")
@click.option("--licence", default="Apache-2.0", help="Licence in the card: that under which you give the model away.")
@click.option(
    "--attribution",
    default="",
    help="Training data and their licence, for the card; those of an exported --base are added.",
)
@click.option(
    "--limits", default="", help="What the model is not for, for the card. [default: what an exported --base says]"
)
@click.option(
    "--mpp",
    type=SCALE,
    help="Scale at which the network sees tissue, µm/px, so that images of a common size fill its tiles, say. "
    "[default: the run's]",
)
@click.option(
    "--tile",
    type=int,
    multiple=True,
    help="Side of a tile, px; once for each size that the model shall take: one multiple of 16, or several of 112. "
    "[default: the run's]",
)
@click.option("--tile-halo", type=click.IntRange(0), help="Px thrown away at a tile's sides. [default: the run's]")
@click.option(
    "--store", type=click.Choice(["fp32", "fp16"]), default="fp32", help="Weights of model.onnx; fp16 halves the file."
)
@click.option("--tiles", type=click.IntRange(1), default=8, help="Real tiles on which maps are compared.")
@click.option(
    "--images", type=click.IntRange(1), default=40, help="Labelled images on which Dice, AJI and PQ are compared."
)
@click.option("--calibration", type=click.IntRange(1), default=32, help="Training tiles for the ranges of int8.")
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def main(fold_dir: Path | None, out: Path | None, check: Path | None, verbose: bool, **options: Any) -> None:
    """Merge LoRA, write ONNX in each precision and the card, and prove each step on real tissue.

    The model's folder then holds tissue of the run's images: a tile in reference.npz, others in parity-*.jpg.

    \b
    nsam-export runs/nsam/fold0 --out models/nsam
    nsam-export --check models/nsam
    """
    if check is None and (fold_dir is None or out is None):
        raise click.UsageError("a fold and --out are wanted, or --check MODEL")
    for noisy in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if check is not None:
        with brought_by("export"):
            from nsam.export.check import check as check_model

        check_model(check, click.echo)
    else:
        with brought_by("export"):
            from nsam.export.build import PACKAGES, build

            for package in PACKAGES:
                version(package)
        click.echo(f"made {build(Settings(fold_dir=fold_dir, out=out, **options), click.echo)}")


if __name__ == "__main__":
    main()
