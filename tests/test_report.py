"""The report: all that lies in the folder, whatever its state, and nothing that a name could break."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsam.runtime.report import report_at_end, write_report
from nsam.runtime.settings import DONE_NAME, THUMBNAIL_NAME

NASTY = "a <b>'\"& $x {y} µ"


class Page(HTMLParser):
    """Text, elements and attributes; fails on elements that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def add_slide(out: Path, name: str, **changes: Any) -> None:
    done = {
        "path": f"/slides/{name}.svs",
        "size_wh_px": [40000, 30000],
        "mpp": 0.25,
        "mpp_source": "its metadata",
        "nuclei": 150_000,
        "peak_per_mm2": 9100.0,
        "area_um2": {"median": 31.4, "bin": 5, "histogram": [0, 10, 5] + [0] * 47},
        "region_mm2": 75.0,
        "nuclei_per_mm2": 2000.0,
        "tiles": 90,
        "tiles_skipped": 0,
        "seconds": 50.0,
        "device": "cuda (ONNX Runtime)",
        "made_with": {"model": "nsam-he 0.2.0", "tta": 2, "mask": "0123"},
        **changes,
    }
    (out / name).mkdir(parents=True)
    (out / name / DONE_NAME).write_text(json.dumps(done), encoding="utf-8")
    (out / name / THUMBNAIL_NAME).write_bytes(b"\xff\xd8jpeg")


def read(out: Path) -> Page:
    write_report(out)
    return Page((out / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    run = {
        "settings": {"inputs": [f"{i}.svs" for i in range(30)], "mpp": None, "tta": 2},
        "model": {"name": "nsam-he", "version": "0.2.0"},
        "device": "cuda (ONNX Runtime)",
        "started": "2026-01-01T00:00:00+00:00",
        "made_with": {"model": "nsam-he 0.2.0", "tta": 2},
    }
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    add_slide(tmp_path, "s1")
    add_slide(
        tmp_path,
        "s2",
        nuclei=50_000,
        tiles=400,
        tiles_skipped=120,
        device="cpu fp32",
        made_with={"model": "nsam-he 0.1.0", "tta": 1},
    )
    return tmp_path


def test_slides_and_totals(out: Path) -> None:
    (out / "s1" / "nuclei.csv").touch()
    page = read(out)
    for words in (
        "nsam-he 0.2.0 on cuda (ONNX Runtime); started 2026-01-01",
        "2 slides done 0 failed 200,000 nuclei 150 mm² 1,333 nuclei per mm² 1.5 mm² per second",
        "s1 150,000 2,000 31.4 75 50.0 1.5",
        "Size 40,000 x 30,000 px Worked on 75 mm²",
        "0.25 µm/px (its metadata)",
        "violet 0, yellow 9,100",
        "Device cpu fp32 Skipped 120 of 400 tiles, outside the blue line",
        "inputs 0.svs, 1.svs",
        "… (30 in all)",
    ):
        assert words in page.text
    note = "made with other settings than those below: model nsam-he 0.1.0, now nsam-he 0.2.0, tta 1, now 2"
    assert note in page.text
    assert page.text.count("made with other settings") == 1
    assert "Failed" not in page.text
    assert [image["src"] for image in page.all("img")] == ["data:image/jpeg;base64,/9hqcGVn"] * 2
    assert [a["href"] for a in page.all("a")] == ["#s0", "#s1", "s1/nuclei.csv"]
    heights = [float(bar["height"] or 0) for bar in page.all("rect")][:10]
    assert heights == [0, 105, 52.5] + [0] * 7


def test_the_page_needs_no_other_file(out: Path) -> None:
    page = read(out)
    assert not page.all("script")
    assert not page.all("link")
    assert all((image["src"] or "").startswith("data:") for image in page.all("img"))
    assert "url(" not in (out / "report.html").read_text(encoding="utf-8")


def test_names_are_escaped(out: Path) -> None:
    add_slide(out, NASTY, mpp_source=NASTY)
    (out / NASTY / "overlay.jpg").touch()
    with (out / "failed.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(
            [("slide", "stage", "reason"), (f"{NASTY}.png", "open", "<script>alert(1)</script>")]
        )
    page = read(out)
    assert f"/slides/{NASTY}.svs" in page.text
    assert f"{NASTY}.png open <script>alert(1)</script>" in page.text
    assert not page.all("script")
    assert page.all("a")[-1]["href"] == "a%20%3Cb%3E%27%22%26%20%24x%20%7By%7D%20%C2%B5/overlay.jpg"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '"a"', '{"area_um2": 3}', "\x00", '{"area_um2": {"median": "x"}}'],
)
def test_a_broken_slide_costs_itself_only(out: Path, content: str) -> None:
    (out / "broken").mkdir()
    (out / "broken" / DONE_NAME).write_text(content)
    page = read(out)
    assert "2 slides done 1 failed" in page.text
    assert "broken report its slide.json cannot be read" in page.text


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": None},
        {"region_mm2": -1},
        {"nuclei": float("nan")},
        {"size_wh_px": [1]},
        {"area_um2": {"median": None}},
    ],
)
def test_wrong_fields_are_told(out: Path, change: dict[str, Any]) -> None:
    add_slide(out, "wrong", **change)
    assert "wrong report its slide.json cannot be read" in read(out).text


def test_bytes_that_are_no_text(out: Path) -> None:
    (out / "s2" / DONE_NAME).write_bytes(b"\xff\xfe\xfa")
    (out / "failed.csv").write_bytes(b"slide,stage\n\xff,\n")
    (out / "run.json").write_bytes(b"\xff")
    page = read(out)
    assert "1 slides done 2 failed" in page.text
    assert "unknown model" in page.text


def test_no_nuclei_no_thumbnail_nothing_done(out: Path, tmp_path: Path) -> None:
    add_slide(out, "none", nuclei=0, seconds=0, area_um2={"median": None, "bin": 5, "histogram": [0] * 50})
    (out / "none" / THUMBNAIL_NAME).unlink()
    text = read(out).text
    assert "no nuclei" in text
    assert "no thumbnail" in text
    (tmp_path / "empty").mkdir()
    assert "0 slides done" in read(tmp_path / "empty").text


def test_written_however_a_run_ends(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt), report_at_end(out):
        raise KeyboardInterrupt
    assert "2 slides done" in read(out).text


def test_a_report_that_cannot_be_written_is_a_line(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "report.html" / "in the way").mkdir(parents=True)
    with report_at_end(out):
        pass
    assert "cannot be written" in capsys.readouterr().err
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize("bins", [[1], [5] * 50, list(np.eye(1, 50, 49, dtype=int)[0])])
def test_histograms_of_all_lengths(out: Path, bins: list[int]) -> None:
    add_slide(out, "z", area_um2={"median": 1.0, "bin": 5, "histogram": [int(n) for n in bins]})
    page = read(out)
    bars = page.all("rect")[20:]
    assert all(float(bar["x"] or 0) + float(bar["width"] or 0) <= 376 for bar in bars)
    assert max(float(bar["height"] or 0) for bar in bars) == 105
    assert ("larger ones" in page.text) == (len(bins) == 50 or len(bins) < 10)
