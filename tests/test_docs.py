"""What README and docstrings show runs as it stands there."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nsam.runtime

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture
def image(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A real region, in the current folder as a.svs, which the examples name."""
    monkeypatch.chdir(tmp_path)
    region = Image.open(data_dir / "slides" / "hgsc_nest.jpg").crop((0, 0, 450, 450))
    region.save("a.png")
    Path("a.png").rename("a.svs")
    return np.asarray(region)


def test_python_examples(
    image: np.ndarray, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    documented = re.findall(r"\n\n((?:    .*\n|\n)+)", nsam.runtime.__doc__ or "")
    assert len(documented) == 2
    written = re.findall(r"```python\n(import nsam.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(written) == 1
    # A region of a jpg under a scanner's name would be refused, rightly.
    monkeypatch.setattr("nsam.runtime.slides.VENDOR_EXTENSIONS", ())
    monkeypatch.setattr("nsam.runtime.slides.IMAGE_EXTENSIONS", (".svs",))
    for code in (*map(textwrap.dedent, documented), *written):
        names = {"image": image}
        exec(compile(code, "example", "exec"), names)
        if "labels" in names:
            assert names["labels"].max() > 20
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20
    assert lines[0].startswith("1 (")
