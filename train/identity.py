"""Which image is which: by its bytes, and by what it shows where it was saved in another format."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from nsam.runtime.errors import InputError
from nsam.runtime.slides import open_slide, read_overview
from nsam.train.data import Sample

_SIDE = 16  # cells of a fingerprint along either side
_OVERVIEW_PX = 256
#: Bits that differ between fingerprints of one image, at most, of all that are set in either. Of 278 images of
#: NuInsSeg, TNBC and DSB 2018 saved as JPEG of quality 60, 99 % differ from what they were by .15 or less; no two of
#: all 834 by less than .30.
_SAME_SHARE = 0.2
#: An image of which fewer rise from cell to cell is blank: it looks like any other.
_LEAST_BITS = 16
_BLANK = "-"


def identify(image: Path) -> str:
    """The line by which an image is known: 64 bits of its file's SHA-256 and 256 bits of what it shows, both hex.

    The second says of each cell of a 16 x 16 grid whether the one to its right is lighter (dHash); `-` for blank ones.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        status = image.stat()
    except OSError as error:
        raise _unreadable(image, error) from error
    return _identify(image, status.st_mtime_ns, status.st_size)


@cache
def _identify(image: Path, _changed: int, _size: int) -> str:
    with open_slide(image) as slide:
        overview = read_overview(slide, _OVERVIEW_PX)
    grey = cv2.resize(overview, (_SIDE + 1, _SIDE), interpolation=cv2.INTER_AREA).sum(axis=2, dtype=np.int32)
    bits = grey[:, 1:] > grey[:, :-1]
    shown = np.packbits(bits).tobytes().hex() if bits.sum() >= _LEAST_BITS else _BLANK
    return f"{hashlib.sha256(_bytes(image)).hexdigest()[:16]} {shown}"


def file_of(line: str) -> str:
    """Of a line by `identify` the part that stands for the file: the same under any name, another in another format.

    Raises:
        ValueError: it is no such line.
    """
    file, _ = line.split()
    return file


def recognised(images: Sequence[str], known: Iterable[str]) -> list[bool]:
    """Of each of `images` whether it is among `known`, both as `identify` gives them."""
    return [bool(twins) for twins in _twins(images, list(known))]


def _twins(images: Sequence[str], known: Sequence[str]) -> Iterator[list[int]]:
    """Of each of `images` those of `known`, by their numbers, that are the same image."""
    files = np.array([file_of(line) for line in known])
    bits, shows = _bits(known)
    for line, own, shown in zip(images, *_bits(images), strict=True):
        same = files == file_of(line)
        if shown:
            same |= shows & ((bits != own).sum(axis=1) <= _SAME_SHARE * (bits.sum(axis=1) + own.sum()))
        yield np.flatnonzero(same).tolist()


def _bits(lines: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(N, 256) fingerprints, and (N,) whether there is one."""
    texts = [line.split()[1] for line in lines]
    shows = np.array([text != _BLANK for text in texts], bool)
    whole = b"".join(bytes.fromhex(text) if text != _BLANK else bytes(_SIDE**2 // 8) for text in texts)
    return np.unpackbits(np.frombuffer(whole, np.uint8)).reshape(len(lines), _SIDE**2).astype(bool), shows


def check_distinct(samples: Sequence[Sample]) -> None:
    """Refuse images that are there twice, by their name or by what they show: one might train and the other test.

    Raises:
        InputError: naming both, or one that cannot be read.
    """
    names: dict[str, Sample] = {}
    for sample in samples:
        twin = names.setdefault(sample.name, sample)
        if twin is not sample:
            raise InputError(
                f"`{sample.image}`: is called `{sample.name}`, as `{twin.image}` is; rename one of the folders"
            )
    lines = [identify(sample.image) for sample in samples]
    for i, twins in enumerate(_twins(lines, lines)):
        if twins[0] != i:
            raise InputError(f"`{samples[i].image}`: is the same image as `{samples[twins[0]].image}`; give each once")


def hash_samples(samples: Sequence[Sample]) -> str:
    """SHA-256 over names, scales and the bytes of images and labels: says whether two runs saw the same data.

    Raises:
        InputError: a file cannot be read.
    """
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(f"{sample.name} {sample.mpp:g} ".encode())
        for path in (sample.image, sample.labels):
            whole.update(_bytes(path))
    return whole.hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"`{path}`: cannot be read ({error.strerror})")
