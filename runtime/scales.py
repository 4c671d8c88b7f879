"""What a file's metadata say of its scale; what they say wrongly costs no slide whose scale the user gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from xml.etree import ElementTree

import tifffile

from nsam.runtime.slides import checked_mpp

NO_MPP = (None, "no mpp in its metadata")
#: Resolutions beyond these (µm/px) are made for printers and screens, such as 72 dpi.
_PLAUSIBLE_MPP = (0.05, 10.0)
_MPP_AT_1X = 10.0  # .25 µm/px at 40x, .5 at 20x, whatever the maker
UM_PER_INCH, _UM_PER_CM = 25400.0, 10000.0
_UM_PER_UNIT = {"nm": 1e-3, "\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "mm": 1e3, "micron": 1.0, "\\u00B5m": 1.0}


def openslide_mpp(properties: Mapping[str, str]) -> tuple[float | None, str]:
    """mpp as the scanner says it, else what its objective's power makes likely."""
    x, y, power = (properties.get(f"openslide.{name}") for name in ("mpp-x", "mpp-y", "objective-power"))
    try:
        if x and y:
            return checked_mpp((float(x), float(y)), "its metadata")
        if power and float(power) > 0:
            mpp = _MPP_AT_1X / float(power)
            return checked_mpp((mpp, mpp), f"assumed from its objective's power of {float(power):g}")
    except ValueError as error:
        return None, f"its metadata give no scale ({error})"
    return NO_MPP


def tiff_mpp(tif: tifffile.TiffFile, page: tifffile.TiffPage) -> tuple[float | None, str]:
    """mpp of an image whose largest page is given: from OME metadata, else from the resolution tags when their unit is
    inch, centimetre or one of ImageJ's.
    """
    if tif.ome_metadata:
        try:
            attributes = _ome_pixels(ElementTree.fromstring(tif.ome_metadata), page)
            sizes = [float(attributes.get(f"PhysicalSize{axis}", "nan")) for axis in "XY"]
        except (ValueError, ElementTree.ParseError) as error:
            return None, f"its OME metadata give no scale ({error})"
        units = [_UM_PER_UNIT.get(attributes.get(f"PhysicalSize{axis}Unit", "um"), math.nan) for axis in "XY"]
        x, y = (size * unit for size, unit in zip(sizes, units, strict=True))
        if math.isfinite(x) and math.isfinite(y):
            return checked_mpp((x, y), "its OME metadata")
    unit = (tif.imagej_metadata or {}).get("unit")
    if unit in _UM_PER_UNIT:  # ImageJ has no tag for these: its dots are for one of the unit that its description names
        return resolution_mpp(page.resolution, _UM_PER_UNIT[unit])
    if page.resolutionunit == tifffile.RESUNIT.CENTIMETER:
        return resolution_mpp(page.resolution, _UM_PER_CM)
    if page.resolutionunit == tifffile.RESUNIT.INCH:
        return resolution_mpp(page.resolution, UM_PER_INCH)
    return NO_MPP


def _ome_pixels(ome: ElementTree.Element, page: tifffile.TiffPage) -> dict[str, str]:
    """The attributes of the only image, or of that which has the page's size and is in this file."""
    size, own = (str(page.imagewidth), str(page.imagelength)), ome.get("UUID")
    images = ome.findall(".//{*}Pixels")
    if len(images) == 1:
        return images[0].attrib
    for pixels in images:
        files = [uuid.text for uuid in pixels.iterfind("{*}TiffData/{*}UUID")]
        elsewhere = own and files and own not in files
        if (pixels.get("SizeX"), pixels.get("SizeY")) == size and not elsewhere:
            return pixels.attrib
    return {}


def resolution_mpp(dots_xy: tuple[float, float], unit_um: float) -> tuple[float | None, str]:
    """mpp from dots per unit of `unit_um` µm."""
    x, y = (unit_um / float(dots) if dots else math.inf for dots in dots_xy)
    low, high = _PLAUSIBLE_MPP
    return checked_mpp((x, y), "its resolution tags") if low <= x <= high and low <= y <= high else NO_MPP
