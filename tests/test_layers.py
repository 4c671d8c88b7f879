"""export -> train -> runtime, never backwards; and runtime needs no torch."""

from __future__ import annotations

import ast
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
