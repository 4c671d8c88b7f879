"""Inputs: every slide is found once, nothing is missed in silence, results have places of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nsam.runtime.errors import InputError
from nsam.runtime.inputs import find_slides, folder_names


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path, *inputs: str) -> list[str]:
    return [source.path.relative_to(folder).as_posix() for source in find_slides([str(folder / i) for i in inputs])]


def test_folder_in_natural_order_whatever_the_case(tmp_path: Path) -> None:
    touch(tmp_path, "s10.svs", "s2.SVS", "sub/a.NDPI", "sub/deep/b.Tif", "notes.txt", "s2.svs.part")
    assert found(tmp_path, ".") == ["s2.SVS", "s10.svs", "sub/a.NDPI", "sub/deep/b.Tif"]


def test_hidden_files_and_results_are_no_slides(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a.png",
        "._a.png",
        ".cache/b.png",
        "out/a/slide.json",
        "out/a/overlay.jpg",
        "out/a/labels.tif",
        "out/killed/bands.part/000000-0.npz",  # between its results and their `slide.json`
        "out/killed/overlay.jpg",
    )
    assert found(tmp_path, ".") == ["a.png"]


def test_a_slide_json_of_somebody_else_hides_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "case/a.png", "case/sub/overlay.jpg", "ours/overlay.jpg")
    (tmp_path / "case" / "slide.json").write_text('{"barcode": "S12-345"}')
    (tmp_path / "ours" / "slide.json").write_text('{"run_hash": "0", "path": "/a.png"}')
    assert found(tmp_path, ".") == ["case/a.png", "case/sub/overlay.jpg"]
    assert found(tmp_path, "case/**/*.jpg", "case/*") == ["case/a.png", "case/sub/overlay.jpg"]


def test_what_belongs_to_a_slide_is_no_slide(tmp_path: Path) -> None:
    """Thumbnails of a QuPath project, and the parts of Hamamatsu's slides of JPEG."""
    touch(tmp_path, "a.svs", "study/project.qpproj", "study/data/1/thumbnail.jpg", "study/b.svs", "study/more/c.svs")
    touch(tmp_path, "v/case 1.jpg", "v/case 1(0,1).jpg", "v/case 1_map2.jpg", "v/case 1_macro.jpg", "v/case 12.jpg")
    touch(tmp_path, "v/case 1.vms", "d/data/e.png")
    slides = ["a.svs", "d/data/e.png", "study/b.svs", "study/more/c.svs", "v/case 1.vms", "v/case 12.jpg"]
    assert found(tmp_path, ".") == slides
    assert found(tmp_path, "v/case 1_macro.jpg") == ["v/case 1_macro.jpg"]  # where it is named


def test_dicom_is_named_not_found(tmp_path: Path) -> None:
    touch(tmp_path, "d/1.dcm", "d/2.dcm")
    assert found(tmp_path, "d/1.dcm") == ["d/1.dcm"]
    with pytest.raises(InputError, match="no slide or image"):
        found(tmp_path, "d")


def test_each_slide_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    os.symlink(tmp_path / "a.png", tmp_path / "link.png")
    assert found(tmp_path, "b.png", "a.png", ".", "*.png") == ["a.png", "b.png"]


def test_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.png", "x/a.txt", "y/b.png", "y/sub/c.svs")
    assert found(tmp_path, "x/*") == ["x/a.png"]
    assert found(tmp_path, "**/*.svs") == ["y/sub/c.svs"]
    assert found(tmp_path, "*") == ["x/a.png", "y/b.png", "y/sub/c.svs"]


@pytest.mark.parametrize("text", ["empty", "missing", "missing/*.svs", "empty/*"])
def test_nothing_found_is_an_error_though_others_have_slides(tmp_path: Path, text: str) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=text.split("/")[0]):
        found(tmp_path, "a.png", text)


def test_message_names_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.svs, \.ndpi.*\.png"):
        find_slides([str(tmp_path)])


def test_folder_names(tmp_path: Path) -> None:
    paths = [tmp_path / p for p in ("a/x.svs", "b/x.svs", "b/y.svs", "c/z.png", "c/z.jpg", "d/X.svs", "d/a_x.svs")]
    names = folder_names(paths, tmp_path / "out")
    assert [names[p] for p in paths] == ["a_x.svs", "b_x", "y", "c_z.png", "c_z.jpg", "d_X", "d_a_x"]


def test_folder_names_of_equal_parents_differ(tmp_path: Path) -> None:
    paths = [tmp_path / "1" / "a" / "x.svs", tmp_path / "2" / "a" / "x.svs"]
    names = folder_names(paths, tmp_path / "out")
    assert len(set(names.values())) == 2
    assert folder_names(paths[::-1], tmp_path / "out") == names


def test_folder_names_that_no_file_system_has_or_the_run_takes(tmp_path: Path) -> None:
    long = "ü" * 120
    paths = [tmp_path / ("b" * 100) / f"{long}.png", tmp_path / "c" / f"{long}.png", tmp_path / "d" / "failed.csv.png"]
    names = folder_names(paths, tmp_path / "out")
    assert [names[path] for path in paths[1:]] == [f"c_{long}", "d_failed.csv"]
    assert len(set(names.values())) == 3
    for name in names.values():
        (tmp_path / "out" / name).mkdir(parents=True)


def test_no_results_go_where_a_slide_lies(tmp_path: Path) -> None:
    """They would hide it from the next run, or replace it."""
    slide = tmp_path / "case" / "case.png"
    assert folder_names([slide], tmp_path)[slide] == "case_case"


def test_a_table_s_word_holds_however_it_is_written(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "m.png")
    table = tmp_path / "t.csv"
    table.write_text("Path , MPP, Mask \n\na.png, 0.5 , m.png\n")
    for inputs in ((str(tmp_path), str(table)), (str(table), str(tmp_path))):
        sources = {source.path.name: source for source in find_slides(inputs)}
        assert (sources["a.png"].mpp, sources["a.png"].mask) == (0.5, tmp_path / "m.png")
        assert sources["b.png"].mpp is None
    table.write_text("path;mpp;mask\na.png;0,5;m.png\nb.png;.25;\n")  # of a spreadsheet whose decimal sign is the comma
    a, b = find_slides([str(table)])
    assert (a.mpp, a.mask, b.mpp, b.mask) == (0.5, tmp_path / "m.png", 0.25, None)
    for text, message in (
        ("path,mpp\n\n\na.png,0,5\n", "line 4: more fields than columns"),
        ("path,mpp\na.png,.5\na.png,.25\n", "in the table twice"),
        ("path\na\0.png\n", "no `path`"),
        ("path\nKäfer.png\n", "its text is not UTF-8; save it as `CSV UTF-8`"),
    ):
        table.write_text(text, encoding="cp1252")
        with pytest.raises(InputError, match=message):
            find_slides([str(table)])


def test_a_mask_of_two_slides_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.svs", "y/a.svs", "masks/b.png")
    slides = [str(tmp_path / "x"), str(tmp_path / "y")]
    assert len(find_slides(slides, tmp_path / "masks")) == 2  # none has one: each is told in its turn
    touch(tmp_path, "masks/a.png")
    with pytest.raises(InputError, match=r"x/a.svs` and as `.*y/a.svs`; give both masks in a table"):
        find_slides(slides, tmp_path / "masks")


def test_masks_of_slides_are_no_slides(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "b.svs", "a.png", "own.png")
    sources = find_slides([str(tmp_path)], tmp_path)
    assert [source.path.name for source in sources] == ["a.svs", "b.svs", "own.png"]


def test_links_are_followed_once_and_what_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "real/a.png", "in/b.png")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "loop.png").symlink_to(tmp_path / "in" / "loop.png")
    assert found(tmp_path, "in") == ["in/b.png", "in/linked/a.png", "in/loop.png"]

    def forbidden(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "real"))

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(InputError, match="real`: cannot be read"):
        found(tmp_path, "in")


def test_a_pattern_takes_no_results(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "out/a/slide.json", "out/a/overlay.jpg", "out/a/other.jpg")
    touch(tmp_path, "out/killed/bands.part/000000-0.npz", "out/killed/overlay.jpg")
    assert found(tmp_path, "**/*.jpg") == ["a.jpg", "out/a/other.jpg"]
