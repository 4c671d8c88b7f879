"""export -> train -> runtime, never backwards; and runtime needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "runtime": ("torch", "torchvision", "timm", "segment_anything", "onnx", "nsam.train", "nsam.export"),
    "train": ("nsam.export",),
}


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its head or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute, so that their layer can be read"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_no_import_goes_upwards(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        for module in imports_of(path):
            for forbidden in FORBIDDEN[layer]:
                assert module != forbidden, f"{path} imports {module}"
                assert not module.startswith(f"{forbidden}."), f"{path} imports {module}"


@pytest.mark.parametrize(("command", "extra"), [("train", "train"), ("export", "export")])
def test_what_is_not_installed_is_one_line(command: str, extra: str, tmp_path: Path) -> None:
    """After the README's first command, which brings no torch."""
    code = f"import sys; sys.modules['torch'] = None; from nsam.{command}.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == f"Error: `torch` is not installed; pip install 'nsam[{extra}]'\n"
