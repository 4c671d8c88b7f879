"""Settings of `nsam-infer`: light to import, for the command's options are built from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "openvino", "cuda", "tensorrt"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]

#: What can be written for a slide, and the file's name.
OUTPUTS = {
    "geojson": "nuclei.geojson",
    "geojson.gz": "nuclei.geojson.gz",
    "annotations": "annotations.geojson",
    "csv": "nuclei.csv",
    "parquet": "nuclei.parquet",
    "labels": "labels.tif",
    "ometiff": "labels.ome.tif",
    "overlay": "overlay.jpg",
    "heatmap": "density.png",
}
#: Always written, for the report.
THUMBNAIL_NAME = "thumbnail.jpg"
#: All that may lie in a slide's folder of results, but for the next.
RESULT_NAMES = (*OUTPUTS.values(), THUMBNAIL_NAME)
#: Written last: a slide whose results are complete has it.
DONE_NAME = "slide.json"
#: What a run has done of a slide; it goes when the results are there.
BANDS_NAME = "bands.part"


@dataclass(frozen=True)
class Settings:
    """One run of `nsam-infer`."""

    inputs: tuple[str, ...]
    out: Path
    #: A folder made by nsam-export; None: the model that comes with nsam, so a first run needs no choice.
    model: Path | None = None
    #: µm per px of every slide. Authoritative: metadata are often missing or wrong, and the user knows.
    mpp: float | None = None
    #: A folder of masks that say where nuclei are wanted; a mask stands in place of the tissue mask.
    mask_dir: Path | None = None
    #: Look for tissue first: most of a slide is glass, and pen strokes have no nuclei.
    tissue_mask: bool = True
    #: x, y, width and height of the only rectangle wanted, level-0 px.
    roi: tuple[int, int, int, int] | None = None
    #: `auto` runs everywhere and says what it took; a device that is asked for is had or is an error.
    device: Device = "auto"
    #: `auto` takes the fastest that the device runs and the model brings; each passed its parity gate.
    precision: Precision = "auto"
    #: CPU threads of the network; None: the cores of the container, which a library would overlook.
    threads: int | None = None
    #: Threads that separate nuclei beside the network; None: half the cores, for the network has the others.
    workers: int | None = None
    #: Tiles a pass. Four fill a GPU fairly at little memory; on a CPU the number hardly matters.
    batch: int = 4
    #: Views of each tile whose maps are averaged; each costs a whole pass of the network.
    tta: int = 1
    #: µm per px at which the network sees tissue; None: the model's own. Time falls with its square.
    network_mpp: float | None = None
    #: Each serves another reader; what is left out says the same again, in another format.
    outputs: tuple[str, ...] = ("geojson", "csv", "labels", "overlay")
    #: A Dask scheduler whose workers take the slides: an address, a scheduler file, or `local:N`; None: this process.
    cluster: str | None = None
    #: Results that took hours are not replaced unasked.
    overwrite: bool = False
