"""`report.html`: one self-contained page of a run, made from what lies in its folder."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import click

from nsam.runtime.errors import OutputError
from nsam.runtime.files import write_text
from nsam.runtime.lock import Turns
from nsam.runtime.results import (
    FAILED_NAME,
    REPORT_NAME,
    RUN_NAME,
    UNREADABLE,
    SlideResult,
    as_dict,
    differences,
    read_failures,
    read_json,
)
from nsam.runtime.settings import DONE_NAME, OUTPUTS, THUMBNAIL_NAME

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nsam: $title</title>
<style>
:root { --ink: #1d2433; --soft: #667085; --line: #e3e6ec; --bar: #5b6fb5; --bad: #b42318 }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1080px; margin: 0 auto; padding: 24px 16px }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 18px; margin: 36px 0 10px }
h3 { font-size: 16px; margin: 0 0 10px; overflow-wrap: anywhere }
p { margin: 4px 0 } .soft, th, dt, small { color: var(--soft) } a { color: inherit }
.totals { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px; margin: 20px 0 }
.totals div { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px }
.totals b { display: block; font-size: 22px; line-height: 1.3 }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { font-weight: 500; text-align: left; font-size: 13px; vertical-align: bottom }
td, th { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line) } .n { text-align: right }
td:first-child, td:last-child { overflow-wrap: anywhere } td:first-child { min-width: 110px }
.n { overflow-wrap: normal !important } .bad { color: var(--bad) }
article { border-top: 1px solid var(--line); padding: 20px 0; break-inside: avoid }
.slide { display: grid; grid-template-columns: 3fr 2fr; gap: 24px; align-items: start }
figure { margin: 0 } figcaption { font-size: 13px; margin-top: 6px; color: var(--soft) }
img { max-width: 100%; display: block }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0 0 14px }
dd { margin: 0; overflow-wrap: anywhere } svg { width: 100%; height: auto; max-width: 380px }
@media (max-width: 700px) { .slide { grid-template-columns: 1fr } }
@media print { body { max-width: none; padding: 0 } }
</style>
</head>
<body>
<h1>$title</h1>
<p class="soft">$subtitle</p>
$body
</body>
</html>
""")


@contextmanager
def report_at_end(out: Path) -> Iterator[None]:
    """However a run ends, by failures or an interrupt too, its page shows what is there."""
    try:
        yield
    finally:
        try:
            with Turns(out / REPORT_NAME).next():  # else an older page might come last
                write_report(out)
        except OutputError as error:  # the results themselves are there
            click.echo(str(error), err=True)


def write_report(out: Path) -> None:
    """Write `report.html` from `run.json`, `failed.csv` and the slides' folders in `out`.

    So it shows the slides of earlier runs into the same folder, too. A `slide.json` that cannot be read is told, and
    costs that slide only.

    Raises:
        OutputError: it cannot be written.
    """
    run = read_json(out / RUN_NAME)
    slides, broken = [], []
    for path in sorted(out.glob(f"*/{DONE_NAME}")):
        try:
            slides.append(SlideResult.read(path.parent))
        except (OSError, ValueError) as error:
            broken.append(
                (path.parent.name, UNREADABLE, f"its {DONE_NAME} cannot be read ({error}); delete it and run again")
            )
    failures = [*read_failures(out / FAILED_NAME), *broken]
    model = as_dict(run.get("model"))
    subtitle = f"{model.get('name', 'unknown model')} {model.get('version', '')} on {run.get('device', 'unknown')}"
    body = [_totals(slides, len(failures))]
    if failures:
        body.append('<h2 class="bad">Failed</h2>' + _table(("slide", "stage", "reason"), failures))
    body += [_overview(slides), *(_article(i, slide, run) for i, slide in enumerate(slides)), _run(run)]
    page = _PAGE.substitute(
        title=escape(out.resolve().name),
        subtitle=escape(f"{subtitle}; started {run.get('started', 'at an unknown time')}"),
        body="\n".join(body),
    )
    write_text(out / REPORT_NAME, page)


def _totals(slides: list[SlideResult], failed: int) -> str:
    nuclei, area, seconds = (sum(getattr(s, name) for s in slides) for name in ("nuclei", "region_mm2", "seconds"))
    figures = [
        (f"{len(slides):,}", "slides done"),
        (f"{failed:,}", "failed"),
        (f"{nuclei:,}", "nuclei"),
        (_number(area), "mm²"),
        (_number(nuclei / area) if area else "-", "nuclei per mm²"),
        (_number(area / seconds) if seconds else "-", "mm² per second"),
    ]
    return '<div class="totals">' + "".join(f"<div><b>{n}</b>{label}</div>" for n, label in figures) + "</div>"


def _overview(slides: list[SlideResult]) -> str:
    head = ("nuclei", "nuclei / mm²", "median area µm²", "mm²", "seconds", "mm² / s")
    rows = []
    for i, s in enumerate(slides):
        texts = (f"{s.nuclei:,}", _density(s), _median(s), _number(s.region_mm2), f"{s.seconds:,.1f}", _rate(s))
        cells = "".join(f'<td class="n">{text}</td>' for text in texts)
        rows.append(f'<tr><td><a href="#s{i}">{escape(s.folder.name)}</a></td>{cells}</tr>')
    titles = "".join(f'<th class="n">{title}</th>' for title in head)
    return (
        "<h2>Slides</h2><p><small>Areas and densities are of the tissue, the mask or the rectangle.</small></p>"
        f'<div class="scroll"><table><tr><th>slide</th>{titles}</tr>{"".join(rows)}</table></div>'
    )


def _article(index: int, s: SlideResult, run: dict[str, Any]) -> str:
    facts = {
        "Nuclei": f"{s.nuclei:,}",
        "Per mm²": _density(s),
        "Median area": f"{_median(s)} µm²",
        "Size": f"{s.size_wh[0]:,} x {s.size_wh[1]:,} px",
        "Worked on": f"{_number(s.region_mm2)} mm²",
        "Scale": f"{s.mpp:.4g} µm/px ({s.mpp_source})",
        "Time": f"{s.seconds:,.1f} s, {_rate(s)} mm²/s",
        "Source": s.path,
    }
    if s.device != run.get("device"):  # of a worker, or of another run of these settings
        facts["Device"] = s.device
    if s.tiles_skipped:
        facts["Skipped"] = f"{s.tiles_skipped:,} of {s.tiles:,} tiles, outside the blue line"
    now = as_dict(run.get("made_with"))
    own = {"mask", "mpp"} if s.mpp_source.startswith("the table") else {"mask"}  # of this slide alone
    others = differences(*({n: v for n, v in parts.items() if n not in own} for parts in (s.made_with, now)))
    if not s.made_with:
        facts["Note"] = "made by an earlier version of nsam"
    elif others:
        facts["Note"] = f"made with other settings than those below: {', '.join(others)}"
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    files = (name for name in OUTPUTS.values() if (s.folder / name).is_file())
    links = " · ".join(f'<a href="{quote(s.folder.name)}/{name}">{name}</a>' for name in files)
    return (
        f'<article id="s{index}"><h3>{escape(s.folder.name)}</h3><div class="slide"><figure>{_thumbnail(s)}'
        f"<figcaption>The slide, and its nuclei per mm²: violet 0, yellow {_number(s.peak_per_mm2)}. "
        f"{links}</figcaption></figure>"
        f"<div><dl>{listed}</dl>{_histogram(s)}</div></div></article>"
    )


def _thumbnail(s: SlideResult) -> str:
    try:
        code = base64.b64encode((s.folder / THUMBNAIL_NAME).read_bytes()).decode()
    except OSError:
        return "<p>no thumbnail</p>"
    return f'<img alt="{escape(s.folder.name)}" src="data:image/jpeg;base64,{code}">'


def _histogram(s: SlideResult) -> str:
    """Bars of the areas as SVG, 380 x 150."""
    if s.nuclei == 0:
        return "<p>no nuclei</p>"
    used = max(i for i, count in enumerate(s.histogram) if count or i == 0) + 1
    shown = min(len(s.histogram), max(10, used))
    step, top = 370 / shown, max(*s.histogram, 1)
    bars = "".join(
        f'<rect x="{5 + i * step:.1f}" y="{110 - 105 * n / top:.1f}" width="{max(step - 1, 1):.1f}" '
        f'height="{105 * n / top:.1f}"/>'
        for i, n in enumerate(s.histogram[:shown])
    )
    every = next(n for n in (2, 4, 5, 10, 20, 50, shown) if shown / n <= 7)
    labels = "".join(
        f'<text x="{5 + i * step:.1f}" y="126" text-anchor="middle">{i * s.bin_um2:g}</text>'
        for i in range(every, shown, every)
    )
    beyond = ", the last bar with all larger ones" if shown == len(s.histogram) else ""
    return (
        f'<svg viewBox="0 0 380 150" role="img" font-size="11" fill="var(--soft)"><title>Areas of the nuclei</title>'
        f'<g fill="var(--bar)">{bars}</g><path d="M5 110.5H375" stroke="var(--soft)"/>{labels}'
        f'<text x="190" y="145" text-anchor="middle">area, µm²{beyond}</text></svg>'
    )


def _run(run: dict[str, Any]) -> str:
    settings = {name: _plain(value) for name, value in as_dict(run.get("settings")).items()}
    model = {f"model {name}": str(value) for name, value in as_dict(run.get("model")).items()}
    rows = {**settings, **model, "device": str(run.get("device")), "nsam": str(run.get("nsam"))}
    return "<h2>Run</h2>" + _table(("setting", "value"), rows.items())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["".join(f"<th>{escape(title)}</th>" for title in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{body}</table></div>'


def _plain(value: object) -> str:
    """A setting as a reader wants it; of long lists the beginning."""
    if isinstance(value, list):
        return ", ".join(map(str, value[:10])) + (f", … ({len(value)} in all)" if len(value) > 10 else "")
    return "-" if value is None else str(value)


def _median(s: SlideResult) -> str:
    return "-" if s.median_um2 is None else f"{s.median_um2:.1f}"


def _density(s: SlideResult) -> str:
    return _number(s.nuclei / s.region_mm2) if s.region_mm2 else "-"


def _rate(s: SlideResult) -> str:
    return _number(s.region_mm2 / s.seconds) if s.seconds else "-"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
