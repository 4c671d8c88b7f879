"""Whatever a file holds becomes RGB of 8 bits: every mode, layout, depth and order of images."""

from __future__ import annotations

import uuid
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from nsam.runtime.errors import InputError
from nsam.runtime.pixels import to_rgb8
from nsam.runtime.readers import TiffSlide
from nsam.runtime.slides import open_slide

Pixels = NDArray[np.uint8]


def whole(path: Path) -> Pixels:
    with open_slide(path) as slide:
        return slide.read_region(0, 0, 0, *slide.size_wh).copy()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[7, 255]], np.uint16), [7, 255]),  # 8 bits
        (np.array([[0, 1023]], np.uint16), [0, 255]),  # 10 bits
        (np.array([[0, 4095]], np.uint16), [0, 255]),  # 12 bits
        (np.array([[8192, 16383]], np.uint16), [128, 255]),  # 14 bits
        (np.array([[4080, 65535]], np.uint16), [15, 255]),  # 16 bits
        (np.array([[False, True]]), [0, 255]),
        (np.array([[[10, 255], [10, 0]]], np.uint8), [10, 255]),  # grey + alpha, on white
        (np.array([[[2048, 65535], [2048, 0]]], np.uint16), [128, 255]),  # grey of 12 bits, alpha of 16
    ],
)
def test_values_become_8_bits(values: NDArray[np.generic], expected: list[int]) -> None:
    rgb = to_rgb8(values, "x")
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(rgb, np.repeat(np.array([expected])[..., None], 3, axis=2))


def test_half_transparent_is_half_white() -> None:
    rgba = np.array([[[200, 100, 0, 128]]], np.uint8)
    np.testing.assert_array_equal(to_rgb8(rgba, "x")[0, 0], [227, 177, 127])


def test_floats_are_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match="float32; save it as 8 bit RGB"):
        to_rgb8(np.zeros((2, 2), np.float32), "x")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "I;16", "CMYK"])
def test_images_of_every_mode(tmp_path: Path, noise: Pixels, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) << 8)
        expected = np.repeat(noise[..., :1], 3, axis=2)
    else:
        image = Image.fromarray(noise).convert(mode)
        expected = np.asarray(image.convert("RGB"))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    np.testing.assert_array_equal(whole(path), expected)


def test_transparent_png_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 3), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert (whole(tmp_path / "a.png") == 255).all()


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    with open_slide(tmp_path / "a.jpg") as slide:
        assert slide.size_wh == (20, 40)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"tile": (64, 64)},
        {"tile": (64, 64), "compression": "lzw", "predictor": True},
        {"planarconfig": "separate"},
    ],
    ids=str,
)
def test_tiff_layouts(tmp_path: Path, noise: Pixels, options: dict[str, object]) -> None:
    data = np.moveaxis(noise, -1, 0) if "planarconfig" in options else noise
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", **options)
    np.testing.assert_array_equal(whole(tmp_path / "a.tif"), noise)


def test_tiff_of_16_bits_and_of_grey(tmp_path: Path, noise: Pixels) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise.astype(np.uint16) << 8, photometric="rgb", tile=(64, 64))
    np.testing.assert_array_equal(whole(tmp_path / "a.tif"), noise)
    tifffile.imwrite(tmp_path / "b.tif", noise[..., 0])
    np.testing.assert_array_equal(whole(tmp_path / "b.tif"), np.repeat(noise[..., :1], 3, axis=2))


@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
@pytest.mark.parametrize("extra", ["unassalpha", "unspecified"])
def test_tiff_with_a_fourth_sample(tmp_path: Path, noise: Pixels, planarconfig: str, extra: str) -> None:
    """Alpha is composed on white, whatever the layout; any other sample is left out."""
    fourth = np.zeros(noise.shape[:2], np.uint8)
    fourth[:, :90] = 255
    four = np.dstack([noise, fourth])
    data = np.moveaxis(four, -1, 0) if planarconfig == "separate" else four
    options = {"photometric": "rgb", "planarconfig": planarconfig, "extrasamples": [extra]}
    expected = np.where(fourth[..., None] == 0, 255, noise) if extra == "unassalpha" else noise
    for name, layout in (("a.tif", {}), ("b.tif", {"tile": (64, 64), "compression": "zlib"})):
        tifffile.imwrite(tmp_path / name, data, **options, **layout)
        np.testing.assert_array_equal(whole(tmp_path / name), expected)


def test_tiles_of_8_bits_are_read_piecewise(tmp_path: Path, noise: Pixels) -> None:
    """With alpha and of grey, too: a whole slide in memory would be too much."""
    for name, samples in (("rgb", noise), ("rgba", np.dstack([noise, noise[..., :1]])), ("grey", noise[..., 0])):
        path = tmp_path / f"{name}.tif"
        photometric = "minisblack" if name == "grey" else "rgb"
        tifffile.imwrite(path, samples, photometric=photometric, tile=(64, 64), compression="zlib")
        with open_slide(path) as slide:
            assert isinstance(slide, TiffSlide)
        np.testing.assert_array_equal(whole(path), to_rgb8(samples, name))


def test_too_little_memory_is_no_damage(tmp_path: Path, noise: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError("Unable to allocate 13.4 GiB")

    tifffile.imwrite(tmp_path / "a.tif", noise, photometric="rgb")
    monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    with pytest.raises(InputError, match="too little memory for it; tiled 8 bit RGB, in tiles of 512 px"):
        open_slide(tmp_path / "a.tif")


def test_tiff_where_zero_is_white(tmp_path: Path, noise: Pixels) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise[..., 0], photometric="miniswhite")
    np.testing.assert_array_equal(whole(tmp_path / "a.tif"), np.repeat(255 - noise[..., :1], 3, axis=2))
    tifffile.imwrite(tmp_path / "b.tif", noise[..., 0] > 99, photometric="miniswhite")
    np.testing.assert_array_equal(whole(tmp_path / "b.tif")[..., 0], np.where(noise[..., 0] > 99, 0, 255))


def test_16_bits_are_not_cut_to_their_lower_half(tmp_path: Path, noise: Pixels) -> None:
    """Of a camera of 12 bits as PNG, of white as zero, and beside a fourth sample that is no alpha."""
    cv2.imwrite(str(tmp_path / "a.png"), noise[..., ::-1].astype(np.uint16) << 4)
    np.testing.assert_array_equal(whole(tmp_path / "a.png"), noise)
    tifffile.imwrite(tmp_path / "b.tif", 65535 - noise[..., 0].astype(np.uint16) * 257, photometric="miniswhite")
    np.testing.assert_array_equal(whole(tmp_path / "b.tif"), np.repeat(noise[..., :1], 3, axis=2))
    four = np.dstack([noise, np.zeros(noise.shape[:2], np.uint8)])
    tifffile.imwrite(tmp_path / "c.tif", four, photometric="rgb", extrasamples=["unspecified"])
    np.testing.assert_array_equal(whole(tmp_path / "c.tif"), noise)


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_tiff_of_4_bits(tmp_path: Path, noise: Pixels, tile: tuple[int, int] | None) -> None:
    """tifffile gives their values as they are, 15 for white; it writes none, so the tag is changed."""
    packed = noise[..., 0] >> 4 << 4 | noise[..., 1] >> 4
    tifffile.imwrite(tmp_path / "a.tif", packed, photometric="minisblack", tile=tile)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tif:
        tags = tif.pages.first.tags
        tags["BitsPerSample"].overwrite(4)
        tags["ImageWidth"].overwrite(2 * packed.shape[1])
        if tile:
            tags["TileWidth"].overwrite(2 * tile[0])
    expected = np.stack([noise[..., 0] >> 4, noise[..., 1] >> 4], axis=2).reshape(len(noise), -1) * 17
    np.testing.assert_array_equal(whole(tmp_path / "a.tif")[..., 0], expected)


def test_bits_that_the_file_tells_are_not_guessed() -> None:
    np.testing.assert_array_equal(to_rgb8(np.array([[0, 1023]], np.uint16), "dark", bits=12)[0, :, 0], [0, 63])


# Several images in a file, and several files of one image


def test_of_several_images_the_largest(tmp_path: Path, noise: Pixels) -> None:
    """Scanners put a macro image and the label before the scan, or behind it. The scale is that of the scan."""
    for name, order in (("first", (0, 1)), ("last", (1, 0))):
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as tif:
            for i in order:
                pixels, dots = ((noise[::4, ::4], 1250), (noise, 40000))[i]
                tif.write(pixels, photometric="rgb", resolution=(dots, dots), resolutionunit="CENTIMETER")
        with tifffile.TiffWriter(tmp_path / f"{name}.ome.tif", ome=True) as tif:
            for i in order:
                pixels, mpp = ((noise[::4, ::4], 8), (noise, 0.25))[i]
                tif.write(pixels, photometric="rgb", metadata={"PhysicalSizeX": mpp, "PhysicalSizeY": mpp})
        for path in (tmp_path / f"{name}.tif", tmp_path / f"{name}.ome.tif"):
            np.testing.assert_array_equal(whole(path), noise)
            with open_slide(path) as slide:
                assert slide.mpp == pytest.approx(0.25)


@pytest.mark.parametrize("options", [{"tile": (64, 64)}, {"rowsperstrip": 16, "compression": "lzw"}], ids=str)
def test_of_several_files_that_one_which_was_named(tmp_path: Path, noise: Pixels, options: dict[str, object]) -> None:
    """A set of OME-TIFF, one image a file, all images in the metadata of each: also where the other file is missing."""
    images = {"a": (noise, 0.25), "b": (noise[:96, :128], 0.5)}
    uuids = {name: f"urn:uuid:{uuid.UUID(int=i)}" for i, name in enumerate(images)}
    described = "".join(
        f'<Image ID="Image:{i}"><Pixels ID="Pixels:{i}" DimensionOrder="XYCZT" Type="uint8" SizeX="{pixels.shape[1]}" '
        f'SizeY="{pixels.shape[0]}" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="{mpp}" PhysicalSizeY="{mpp}">'
        f'<Channel ID="Channel:{i}:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1">'
        f'<UUID FileName="{name}.ome.tif">{uuids[name]}</UUID></TiffData></Pixels></Image>'
        for i, (name, (pixels, mpp)) in enumerate(images.items())
    )
    for name, (pixels, _) in images.items():
        ome = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuids[name]}">{described}</OME>'
        path = tmp_path / f"{name}.ome.tif"
        tifffile.imwrite(path, pixels, photometric="rgb", description=ome, metadata=None, **options)
    for name, (pixels, mpp) in images.items():  # the second when the first is gone
        np.testing.assert_array_equal(whole(tmp_path / f"{name}.ome.tif"), pixels)
        with open_slide(tmp_path / f"{name}.ome.tif") as slide:
            assert slide.mpp == mpp
        if name == "a":
            np.testing.assert_array_equal(whole(tmp_path / "b.ome.tif"), images["b"][0])
            (tmp_path / "a.ome.tif").unlink()


@pytest.mark.parametrize("photometric", ["palette", "rgb"])
def test_tiff_stays_as_it_is_stored(tmp_path: Path, photometric: str) -> None:
    """As in QuPath; Pillow would turn a palette's, and mix up its pixels where they are not compressed."""
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    colours = np.repeat(np.arange(256, dtype=np.uint16)[None] * 257, 3, axis=0)
    options = {"colormap": colours, "photometric": "palette"} if photometric == "palette" else {"photometric": "rgb"}
    pixels = stored if photometric == "palette" else np.dstack([stored] * 3)
    tifffile.imwrite(tmp_path / "a.tif", pixels, extratags=[(274, 3, 1, 6, True)], **options)
    np.testing.assert_array_equal(whole(tmp_path / "a.tif")[..., 0], stored)


def test_a_preview_is_not_taken_for_the_scan_that_only_pillow_reads(tmp_path: Path, noise: Pixels) -> None:
    """Pillow opens a file's first image."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(noise[::4, ::4], photometric="rgb")
        tif.write(np.dstack([noise, noise[..., :1]]), photometric="separated")
    with pytest.raises(InputError, match="SEPARATED by NONE, is not known in such a file; save it as 8 bit RGB"):
        open_slide(tmp_path / "a.tif")


def test_a_coding_that_nobody_knows_is_named(tmp_path: Path, noise: Pixels) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise, photometric="rgb", compression="jpeg2000", tile=(64, 64))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tif:
        tif.pages.first.tags["PhotometricInterpretation"].overwrite(6)
    with pytest.raises(InputError, match="or its coding, YCBCR by JPEG2000, is not known: save it as 8 bit RGB"):
        open_slide(tmp_path / "a.tif")
