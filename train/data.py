"""Labelled images on disk -> samples. NuInsSeg's layout, and folder pairs `images/` + `labels/`."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import label

from nsam.runtime.errors import InputError
from nsam.runtime.images import image_mpp
from nsam.runtime.scales import NO_MPP
from nsam.runtime.slides import IMAGE_EXTENSIONS, TIFF_EXTENSIONS, open_slide
from nsam.train.annotations import read_annotations

IMAGE_SUFFIXES = (*IMAGE_EXTENSIONS, *TIFF_EXTENSIONS)
LABEL_SUFFIXES = (".tif", ".tiff", ".png", ".npy", ".geojson")
#: NuInsSeg gives no scale ("40x"). By the size of its nuclei against those of TCGA slides at .25 it is near .17.
NUINSSEG_MPP = 0.17
#: Of images that do not say: a 40x scan's.
DEFAULT_MPP = 0.25
#: Pieces of one value, from which on it is a mask's or a class's and not a nucleus's: 5 at most in NuInsSeg, TNBC and
#: DSB 2018, and none in their images of a single value.
_MASK_PIECES, _LONE_PIECES = 10, 3
#: Pieces a value has in the mean, from which on values were used again, as by 8 bits beyond 255 nuclei: 1.2 at most
#: there.
_REUSED_PIECES, _MANY_VALUES = 1.7, 20
#: Share of the image, from which on a value is the background's, and the same of one that meets all sides: the largest
#: nucleus there has .08.
_BACKGROUND_SHARE, _AROUND_SHARE = 0.5, 0.2


@dataclass(frozen=True)
class Sample:
    """One labelled image."""

    image: Path
    labels: Path
    name: str  # POSIX path below the data folder: the order of the official folds
    group: str  # organ, or the folder's name
    mpp: float
    source: Path  # the folder that all of its source are below


def find_samples(root: Path, mpp: float | None = None) -> list[Sample]:
    """All labelled images below `root`, sorted by POSIX path.

    Two layouts are known. NuInsSeg's: `<organ>/tissue images/*` beside `<organ>/label masks modify/*`. A pair:
    `images/*` beside `labels/*` with the same stems.

    Args:
        root: the data folder.
        mpp: µm per px of all images; None: .17 for NuInsSeg, and for a pair what each image says, or .25.

    Raises:
        InputError: no images, images and labels that do not match one to one, or a scale that is stated wrongly.
    """
    if not root.is_dir():
        raise InputError(f"`{root}`: no such folder; name NuInsSeg's, or one with `images` and `labels`")
    pairs = [(folder, folder.parent / "label masks modify") for folder in sorted(root.glob("*/tissue images"))]
    nuinsseg = bool(pairs)
    if not nuinsseg:
        pairs = [(root / "images", root / "labels")]
        if not pairs[0][0].is_dir():
            raise InputError(
                f"`{root}`: neither NuInsSeg's layout (`<organ>/tissue images`) nor a pair of folders "
                "`images` and `labels`"
            )

    def scale(image: Path) -> float:
        if mpp is not None:
            return mpp
        return NUINSSEG_MPP if nuinsseg else _own_mpp(image)

    samples = [
        Sample(image, labels, image.relative_to(root).as_posix(), image.parent.parent.name, scale(image), root)
        for images_dir, labels_dir in pairs
        for image, labels in _match(images_dir, labels_dir)
    ]
    if not samples:
        raise InputError(f"`{root}`: no images in it ({', '.join(IMAGE_SUFFIXES)} are read)")
    return sorted(samples, key=lambda sample: sample.name)


def find_extra(root: Path, mpp: float | None = None) -> list[Sample]:
    """`find_samples` of another source; its folder's name goes before its images', so that sources do not mix."""
    return [replace(sample, name=f"{root.name}/{sample.name}") for sample in find_samples(root, mpp)]


def _own_mpp(image: Path) -> float:
    try:
        if image.suffix.lower() in IMAGE_EXTENSIONS:
            mpp, said_by = image_mpp(image)  # without decoding it
        else:
            with open_slide(image) as slide:
                mpp, said_by = slide.mpp, slide.mpp_source
    except InputError:
        return DEFAULT_MPP  # what is wrong with it is told when it is read
    if mpp is None and said_by != NO_MPP[1]:
        raise InputError(f"`{image}`: {said_by}; pass its scale, by --data-mpp or --extra-mpp")
    return mpp or DEFAULT_MPP


def _match(images_dir: Path, labels_dir: Path) -> list[tuple[Path, Path]]:
    images = _by_stem(images_dir, IMAGE_SUFFIXES)
    labels = _by_stem(labels_dir, LABEL_SUFFIXES)
    for stem in images.keys() - labels.keys():
        raise InputError(f"`{images[stem]}`: no labels `{stem}` ({', '.join(LABEL_SUFFIXES)}) in `{labels_dir}`")
    for stem in labels.keys() - images.keys():
        raise InputError(f"`{labels[stem]}`: no image `{stem}` in `{images_dir}`")
    return [(images[stem], labels[stem]) for stem in images]


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            stem = unicodedata.normalize("NFC", path.stem)  # macOS writes an umlaut as two characters
            if stem in found:
                raise InputError(f"`{path}`: `{found[stem].name}` has the same stem; keep one of them")
            found[stem] = path
    return found


def read_sample(sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Image (H, W, 3) uint8 RGB and labels (H, W) int32.

    Raises:
        InputError: unreadable files, labels that are no label map or have no background, or sizes that differ.
    """
    with open_slide(sample.image) as slide:
        image = slide.read_region(0, 0, 0, *slide.size_wh)
    outlined = sample.labels.suffix.lower() == ".geojson"
    labels = read_annotations(sample.labels, slide.size_wh) if outlined else read_labels(sample.labels)
    if outlined and _lacks_background(labels):
        raise InputError(f"`{sample.labels}`: one nucleus would be most of the image; delete the outline of the region")
    if labels.shape != image.shape[:2]:
        raise InputError(
            f"`{sample.labels}`: has {labels.shape[1]} x {labels.shape[0]} px, "
            f"its image {image.shape[1]} x {image.shape[0]}; labels must be at the image's own resolution"
        )
    return image, labels


def read_labels(path: Path) -> NDArray[np.int32]:
    """A label map (H, W) int32, 0 = background, from TIFF, PNG or NPY; for GeoJSON see `read_annotations`.

    Raises:
        InputError: unreadable, not two-dimensional, not of integers, or a mask, or map of classes, that does not tell
            nuclei apart.
    """
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
        elif path.suffix.lower() == ".png":
            with Image.open(path) as picture:
                array = np.asarray(picture)
        else:
            array = tifffile.imread(path)
    except Exception as error:  # the decoders raise whatever they like on a broken file
        raise InputError(f"`{path}`: labels cannot be read ({error}); write the file again") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"`{path}`: labels must be one plane of integers, one value a nucleus; has shape {array.shape}, "
            f"{array.dtype}"
        )
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= np.iinfo(np.int32).max:
        raise InputError(f"`{path}`: labels must be 0 to 2,147,483,647, are {array.min()} to {array.max()}")
    labels = array.astype(np.int32)
    if _lacks_background(labels):
        raise InputError(f"`{path}`: most of it is not 0, which is the background's value; is it inverted?")
    pieces: NDArray[np.int64] = label(labels, connectivity=2)  # type: ignore[no-untyped-call]
    _, first = np.unique(pieces, return_index=True)
    values, counts = np.unique(labels.ravel()[first][1:], return_counts=True)
    if counts.max(initial=0) >= (_MASK_PIECES if len(values) > 1 else _LONE_PIECES):
        worst = int(counts.argmax())
        raise InputError(
            f"`{path}`: a mask or a map of classes, {counts[worst]} pieces have the value {values[worst]}; give each "
            "nucleus its own"
        )
    if len(values) >= _MANY_VALUES and counts.mean() > _REUSED_PIECES:
        raise InputError(
            f"`{path}`: {counts.sum()} pieces have {len(values)} values, so nuclei share them; 8 bits hold 255, save 16"
        )
    return labels


def _lacks_background(labels: NDArray[np.int32]) -> bool:
    """Whether what is around nuclei has a nucleus's value: by its share, or because it meets all four sides."""
    if labels.size and labels.min() > 0:
        return True
    values, sizes = np.unique(labels[labels > 0], return_counts=True)
    if not values.size:
        return False
    largest = values[sizes.argmax()]
    all_sides = all((side == largest).any() for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]))
    return bool(sizes.max() >= (_AROUND_SHARE if all_sides else _BACKGROUND_SHARE) * labels.size)
