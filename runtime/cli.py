"""`nsam-infer`: nuclei in folders of slides. Imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from nsam.runtime.options import Command, NumberRange, device_option, names_of, precision_option
from nsam.runtime.settings import OUTPUTS, Settings

_EXAMPLE = """\b
Examples:
  nsam-infer slides/ --out results/
  nsam-infer a.svs b.ndpi --out results/ --device cuda --batch 16
  nsam-infer slides.csv --out results/ --dry-run
  nsam-infer region.png --out results/ --mpp 0.25 --outputs geojson,csv

\b
Exit codes:
  0    all slides are done
  1    some slide failed: its reason is on stderr and in OUT/failed.csv
  2    nothing was begun: wrong usage, no slide found, or the model, the device
       or the output folder cannot be had
  130  interrupted; finished slides are kept, and skipped by the next run
"""


def _roi(
    context: click.Context, option: click.Parameter, box: tuple[int, int, int, int] | None
) -> tuple[int, int, int, int] | None:
    if box and (min(box[:2]) < 0 or min(box[2:]) < 1):
        raise click.BadParameter("x and y must be 0 or more, width and height 1 or more")
    return box


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXAMPLE)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option(
    "--out",
    required=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Where results go, a folder for each slide. Made if need be.",
)
@click.option(
    "--model",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="A model made by nsam-export.  [default: the one that comes with nsam]",
)
@click.option(
    "--mpp",
    type=NumberRange(0.1, 2),
    help="Micrometres per pixel of every slide, whatever its metadata say; 0.25 for most 40x scans, "
    "0.5 for 20x.  [default: from the metadata]",
)
@click.option(
    "--mask-dir",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="A mask for each slide, named as it is (a.svs: a.png, a.tif), of any resolution: nuclei are wanted where it "
    "is not black.  [default: where tissue is found]",
)
@click.option(
    "--tissue-mask/--no-tissue-mask",
    default=Settings.tissue_mask,
    show_default=True,
    help="Skip glass and pen strokes, told by their colour.",
)
@click.option(
    "--roi",
    metavar="X Y W H",
    type=int,
    nargs=4,
    callback=_roi,
    help="Only this rectangle of every slide, px of its full resolution.",
)
@device_option
@precision_option
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="CPU threads of the network.  [default: the cores of this container]",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    help="Threads that separate nuclei while the network runs on.  [default: half the cores]",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 256),
    default=Settings.batch,
    show_default=True,
    help="Tiles of 448 px that the network takes at once, of larger ones as many as have their pixels; more need more "
    "memory.",
)
@click.option(
    "--tta",
    type=click.Choice([1, 2, 4, 8]),
    default=Settings.tta,
    show_default=True,
    help="Test-time augmentation: turned and mirrored views of each tile whose maps are averaged. Slower likewise.",
)
@click.option(
    "--network-mpp",
    metavar="MPP",
    type=float,
    help="Micrometres per pixel at which the network sees tissue: time falls with its square. Coarser finds less; a "
    "little finer than the model's own finds a little more.  [default: the model's own]",
)
@click.option(
    "--outputs",
    metavar="LIST",
    callback=names_of(OUTPUTS),
    default=",".join(Settings.outputs),
    show_default=True,
    help=f"What to write, separated by commas; of {', '.join(OUTPUTS)}. `parquet` needs pip install 'nsam[parquet]'.",
)
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Let the workers of a Dask cluster do it: tcp://HOST:PORT, a scheduler file, or local:N for N processes here.",
)
@click.option("--dry-run", is_flag=True, help="Only tell each slide's scale, tiles, and likely time and disk.")
@click.option("--overwrite", is_flag=True, help="Replace finished results of other settings.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks of errors, and the log.")
@click.version_option(package_name="nsam")
def main(verbose: bool, dry_run: bool, **options: Any) -> None:
    """Segment cell nuclei in H&E slides.

    INPUT is a slide, an image (PNG, JPEG, TIFF), a folder that is searched with all its subfolders, a pattern such as
    'slides/*.svs', or a table (.csv with the column path and, as wanted, mpp and mask). A DICOM slide is named by one
    of its .dcm files.

    Each slide gets nuclei.geojson (for QuPath), nuclei.csv (sizes in µm), labels.tif (int32, full
    resolution), overlay.jpg (to look at) and slide.json; report.html shows them all. Coordinates are pixels of the
    full-resolution slide. Finished slides are skipped when the same run is started again.
    """
    logging.basicConfig(format="%(name)s: %(message)s")
    if verbose:
        logging.getLogger("nsam").setLevel(logging.DEBUG)
    else:
        # What tifffile logs of a damaged file is told by the error that follows.
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        from nsam.runtime import batch, plan

        failures = (plan.dry_run if dry_run else batch.run)(Settings(**options))
    except KeyboardInterrupt:
        click.echo("interrupted; finished slides are kept", err=True)
        sys.exit(130)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
