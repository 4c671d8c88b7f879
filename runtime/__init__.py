"""Nuclei in slides and images, without torch.

    from nsam.runtime import segment

    labels = segment(image, mpp=0.25)  # (H, W, 3) uint8 RGB -> (H, W) int32, 0 = background

Whole slides, in memory that grows with their width only, and without any file:

    from pathlib import Path
    from nsam.runtime import Region, load, open_slide, segment_slide

    engine = load(device="auto")
    with open_slide(Path("a.svs")) as slide:
        mpp = slide.mpp or 0.25  # µm/px; None where the metadata do not say
        for strip in segment_slide(slide, engine, mpp, region=Region.of(slide, mpp)):  # region: where tissue is
            for nucleus in strip.nuclei:  # in the order of their first pixels
                print(nucleus.id, nucleus.centroid_xy, nucleus.area_um2, nucleus.mask.shape)
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nsam.runtime.engines import Engine, load
    from nsam.runtime.pipeline import segment_slide
    from nsam.runtime.region import Region
    from nsam.runtime.slides import open_slide

__all__ = ["Region", "load", "open_slide", "segment", "segment_slide"]

_HOMES = {"Region": "region", "load": "engines", "open_slide": "slides", "segment_slide": "pipeline"}


def __getattr__(name: str) -> Any:
    # Late, so that whoever needs the command's --help or the model card alone does not pay for OpenCV.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def segment(image: NDArray[np.uint8], mpp: float, model: Path | None = None) -> NDArray[np.int32]:
    """Segment the nuclei of an image in memory, on the same path as `nsam-infer --no-tissue-mask`.

    Args:
        image: (H, W, 3) uint8 RGB.
        mpp: µm per px of the image; .25 for most 40x scans, .5 for 20x.
        model: a folder made by nsam-export; None: the model that comes with nsam. It stays loaded.

    Returns:
        (H, W) int32, 0 = background, nuclei 1, 2, … in raster order of their first pixel.

    Raises:
        InputError: another shape or type, an empty image, or a scale that no slide has.
        ModelError, DeviceError: the model cannot be loaded; see `load`.
    """
    import numpy as np

    from nsam.runtime.errors import InputError
    from nsam.runtime.pipeline import segment_slide
    from nsam.runtime.slides import MPP_RANGE, ArraySlide

    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise InputError(f"`image`: must be (H, W, 3) uint8 RGB, is {image.shape} {image.dtype}")
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise InputError(f"`mpp`: must be from {MPP_RANGE[0]:g} to {MPP_RANGE[1]:g} µm/px, is {mpp:g}")
    strips = segment_slide(ArraySlide(image, Path("image"), mpp), _engine(model), mpp)
    return np.concatenate([strip.labels for strip in strips])


@lru_cache(maxsize=1)
def _engine(model: Path | None) -> Engine:
    from nsam.runtime.engines import load

    return load(model)
