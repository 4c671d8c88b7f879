"""What lies in a folder of results, read back; nothing in it is trusted to be whole."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsam.runtime.settings import BANDS_NAME, DONE_NAME

#: Of all slides in the folder, not of one.
RUN_NAMES = RUN_NAME, FAILED_NAME, REPORT_NAME = "run.json", "failed.csv", "report.html"
#: Stage of the line that stands for a `failed.csv` which is broken itself.
UNREADABLE = "report"


@dataclass(frozen=True)
class SlideResult:
    """What `slide.json` says."""

    folder: Path
    path: str
    size_wh: tuple[int, int]
    mpp: float
    mpp_source: str
    nuclei: int
    region_mm2: float  # the part of the slide that was worked on
    peak_per_mm2: float
    median_um2: float | None
    bin_um2: float
    histogram: list[int]
    seconds: float
    tiles: int
    tiles_skipped: int
    device: str
    made_with: dict[str, Any]  # the settings

    @classmethod
    def read(cls, folder: Path) -> SlideResult:
        """A slide's results by its folder.

        Raises:
            OSError, ValueError: `slide.json` cannot be read, or is not as nsam writes it.
        """
        done = json.loads((folder / DONE_NAME).read_text(encoding="utf-8"))
        try:
            median = done["area_um2"]["median"]
            width, height = map(int, done["size_wh_px"])
            slide = cls(
                folder=folder,
                path=str(done["path"]),
                size_wh=(width, height),
                mpp=float(done["mpp"]),
                mpp_source=str(done["mpp_source"]),
                nuclei=int(done["nuclei"]),
                region_mm2=float(done["region_mm2"]),
                peak_per_mm2=float(done["peak_per_mm2"]),
                median_um2=None if median is None else float(median),
                bin_um2=float(done["area_um2"]["bin"]),
                histogram=[int(count) for count in done["area_um2"]["histogram"]],
                seconds=float(done["seconds"]),
                tiles=int(done["tiles"]),
                tiles_skipped=int(done["tiles_skipped"]),
                device=str(done["device"]),
                made_with=as_dict(done.get("made_with")),
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if not (slide.region_mm2 >= 0 and slide.seconds >= 0 and slide.histogram):
            raise ValueError("area, time or histogram is none")
        return slide


def read_failures(path: Path) -> list[tuple[str, str, str]]:
    """Slide, stage and reason of each line of `failed.csv`; nothing where there is none."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = [[row[name] or "" for name in ("slide", "stage", "reason")] for row in csv.DictReader(stream)]
        return [(slide, stage, reason) for slide, stage, reason in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, csv.Error) as error:
        return [(path.name, UNREADABLE, f"cannot be read ({error})")]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        return as_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def holds_results(folder: Path) -> bool:
    """Whether results of a slide are in a folder, or what a stopped run left of them; others, too, write `slide.json`.

    A broken one is taken for ours: what lies beside it must not pass for slides.
    """
    if (folder / BANDS_NAME).exists():
        return True
    done = read_json(folder / DONE_NAME)
    return "run_hash" in done if done else (folder / DONE_NAME).exists()


def slide_of(folder: Path) -> str:
    """The slide whose results are in a folder, or whose bands a stopped run left there; empty where there is none."""
    notes = map(read_json, (folder / DONE_NAME, folder / BANDS_NAME / DONE_NAME))
    return next((str(note.get("path", "")) for note in notes if "run_hash" in note), "")


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two sets of settings, for people: `mpp 0.25, now 0.3`; of all that is in `now` first."""
    found = []
    for name in dict.fromkeys((*now, *before)):
        one, other = before.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other)
        elif one != other:
            found.append(f"{name} {'unset' if one is None else one}, now {'unset' if other is None else other}")
    return found


def as_dict(value: object) -> dict[str, Any]:
    """`value` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}
