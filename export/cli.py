"""nsam-export: a trained fold becomes a model directory."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from nsam.runtime.errors import NsamError

log = logging.getLogger("nsam")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="nsam")
@click.argument("fold_dir", metavar="RUN/foldK", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Model directory to make.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    help="The run's data, and its --extra in their order, for the proof. [default: where the run found them]",
)
@click.option("--data-mpp", type=float, help="Scale of those images, µm/px, if the run was given it.")
@click.option("--name", default="nsam", help="Name in the card.")
@click.option("--model-version", default="0.1.0", help="Version in the card.")
@click.option("--licence", default="Apache-2.0", help="Licence in the card.")
@click.option("--attribution", default="", help="Training data and their licence, for the card.")
@click.option("--limits", default="", help="What the model is not for, for the card.")
@click.option("--store", type=click.Choice(["fp32", "fp16"]), default="fp32", help="fp16 halves the file.")
@click.option("--tiles", type=click.IntRange(1), default=8, help="Real tiles on which maps are compared.")
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def main(verbose: bool, **options: Any) -> None:
    """Merge LoRA, write ONNX and the card, and prove each step on real tissue.

    \b
    nsam-export runs/nsam/fold0 --out models/nsam
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for noisy in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from nsam.export.build import Settings, build

    try:
        log.info("made %s", build(Settings(**options), log.info))
    except NsamError as error:
        if verbose:
            raise
        click.echo(f"nsam-export: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
