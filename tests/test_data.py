"""Reading labelled images, and who lands in which fold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from nsam.runtime.errors import InputError
from nsam.train.data import Sample, find_extra, find_samples, read_labels, read_sample
from nsam.train.folds import final_fold, make_folds
from nsam.train.identity import check_distinct, identify, recognised


def make_pair(root: Path, stem: str = "a", size: int = 16) -> None:
    for name in ("images", "labels"):
        (root / name).mkdir(exist_ok=True)
    Image.new("RGB", (size, size)).save(root / "images" / f"{stem}.png")
    tifffile.imwrite(root / "labels" / f"{stem}.tif", np.eye(16, dtype=np.uint16) * 300)


def test_nuinsseg_is_all_there(data_dir: Path) -> None:
    samples = find_samples(data_dir / "nuinsseg")
    assert (len(samples), len({s.group for s in samples})) == (665, 31)
    assert samples[0].name.startswith("human bladder/tissue images/")
    assert [s.name for s in samples] == sorted(s.name for s in samples)
    image, labels = read_sample(samples[0])
    assert image.shape == (512, 512, 3)
    assert labels.dtype == np.int32


def test_pairs_of_folders_and_label_formats(tmp_path: Path) -> None:
    make_pair(tmp_path, "a")
    make_pair(tmp_path, "b")
    np.save(tmp_path / "labels" / "b.npy", np.eye(16, dtype=np.int64) * 70_000)
    (tmp_path / "labels" / "b.tif").unlink()
    a, b = find_samples(tmp_path)
    assert read_sample(a)[1].max() == 300
    assert read_sample(b)[1].max() == 70_000
    assert a.mpp == 0.25
    assert find_samples(tmp_path, mpp=0.5)[0].mpp == 0.5


def test_what_does_not_match_is_named(tmp_path: Path) -> None:
    make_pair(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "lonely.png")
    with pytest.raises(InputError, match=r"lonely\.png.*no labels `lonely`"):
        find_samples(tmp_path)
    (tmp_path / "images" / "lonely.png").rename(tmp_path / "images" / "a.jpg")
    with pytest.raises(InputError, match="same stem"):
        find_samples(tmp_path)
    (tmp_path / "images" / "a.jpg").unlink()
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.tif.*no image `a`"):
        find_samples(tmp_path)


def test_bad_labels_are_named(tmp_path: Path) -> None:
    make_pair(tmp_path, size=20)
    with pytest.raises(InputError, match="16 x 16 px, its image 20 x 20"):
        read_sample(find_samples(tmp_path)[0])
    for name, content in (("rgb.png", np.zeros((4, 4, 3), np.uint8)), ("float.npy", np.zeros((4, 4)))):
        path = tmp_path / name
        np.save(path, content) if name.endswith("npy") else Image.fromarray(content).save(path)
        with pytest.raises(InputError, match="one plane of integers"):
            read_labels(path)
    (tmp_path / "cut.tif").write_bytes(b"II*\0")
    with pytest.raises(InputError, match="cannot be read"):
        read_labels(tmp_path / "cut.tif")
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        read_labels(tmp_path / "pickle.npy")


def test_labels_that_would_teach_nonsense_are_named(tmp_path: Path) -> None:
    blobs = np.zeros((40, 40), np.int64)
    blobs[::4, ::4] = 255  # a hundred pieces
    classes = blobs // 255
    classes[::8] *= 2
    few = blobs.copy()
    few[1:] = few[:, 9:] = 0
    for array, message in (
        (blobs, "a mask or a map of classes, 100 pieces have the value 255"),
        (classes, "50 pieces have the value 1"),
        (few, "3 pieces have the value 255"),
        (blobs + 1, "most of it is not 0"),
        (np.where(np.pad(np.ones((32, 32), bool), 4), 0, 255), "most of it is not 0"),  # nuclei that touch fill .64
        (255 - blobs, "most of it is not 0.*is it inverted"),
        (blobs - 1, "-1"),
        (blobs << 24, "labels must"),
    ):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(InputError, match=message):
            read_labels(tmp_path / "a.npy")
    blobs[::4, ::4] = np.arange(200, 300).reshape(10, 10)  # ids, one of which is 255
    blobs[1, 2:40:8] = 200  # a nucleus may come in pieces: an outline as a MultiPolygon, one cut by another
    np.save(tmp_path / "a.npy", blobs)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.npy"), blobs)


def test_an_image_that_says_its_scale_is_believed(tmp_path: Path) -> None:
    make_pair(tmp_path)
    (tmp_path / "images" / "a.png").unlink()

    def write(*dots_per_cm: int) -> None:
        tifffile.imwrite(
            tmp_path / "images" / "a.tif",
            np.zeros((16, 16, 3), np.uint8),
            photometric="rgb",
            resolution=dots_per_cm,
            resolutionunit="CENTIMETER",
        )

    write(20_000, 20_000)
    assert find_samples(tmp_path)[0].mpp == pytest.approx(0.5)
    assert find_samples(tmp_path, 0.3)[0].mpp == 0.3
    write(20_000, 22_000)
    with pytest.raises(InputError, match=r"a\.tif`: its mpp differs between x .* pass its scale"):
        find_samples(tmp_path)
    assert find_samples(tmp_path, 0.3)[0].mpp == 0.3


def test_an_image_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    make_pair(tmp_path)
    own = find_samples(tmp_path)
    check_distinct(own)
    with pytest.raises(InputError, match="the same image"):
        check_distinct([*own, *find_extra(tmp_path)])
    make_pair(tmp_path, "copy")
    with pytest.raises(InputError, match=r"copy\.png`: is the same image as .*a\.png"):
        check_distinct(find_samples(tmp_path))
    (tmp_path / "a" / "he").mkdir(parents=True)
    (tmp_path / "b" / "he").mkdir(parents=True)
    for site in "ab":
        make_pair(tmp_path / site / "he")
    with pytest.raises(InputError, match="rename one of the folders"):
        check_distinct([sample for site in "ab" for sample in find_extra(tmp_path / site / "he")])


def test_an_image_is_known_in_any_format(example: np.ndarray, tmp_path: Path) -> None:
    other = np.ascontiguousarray(example[::-1])
    sparse = [np.full((256, 256, 3), 255, np.uint8) for _ in range(2)]  # little tissue on clean glass is not much alike
    for image, x in zip(sparse, (40, 150), strict=True):
        image[60:160, x : x + 60] = example[:100, :60]
    images = {"a.png": example, "other.png": other, "white.png": np.full_like(example, 255)}
    images |= {"white2.png": np.full_like(example[:300], 255), "left.png": sparse[0], "right.png": sparse[1]}
    for name, pixels in images.items():
        Image.fromarray(pixels).save(tmp_path / name)
    Image.fromarray(example).save(tmp_path / "a.jpg", quality=80)
    tifffile.imwrite(tmp_path / "a.tif", example, photometric="rgb", tile=(128, 128))
    known = [identify(tmp_path / name) for name in images]
    for i, line in enumerate(known):
        assert recognised(known, [line]) == [j == i for j in range(len(known))]
    assert recognised([identify(tmp_path / name) for name in ("a.jpg", "a.tif")], known[:1]) == [True, True]
    assert recognised(known, []) == [False] * len(known)
    with pytest.raises(InputError, match="cannot be read"):
        identify(tmp_path / "none.png")


def test_an_umlaut_is_the_same_in_both_ways_of_writing_it(tmp_path: Path) -> None:
    make_pair(tmp_path, "Pr\u00e4parat")
    (tmp_path / "labels" / "Pr\u00e4parat.tif").rename(tmp_path / "labels" / "Pra\u0308parat.tif")
    assert len(find_samples(tmp_path)) == 1


def test_values_that_were_cut_to_8_bits_are_refused(tmp_path: Path) -> None:
    labels = np.zeros((320, 320), np.int32)
    labels[5::10, 5::10] = np.arange(1, 1025).reshape(32, 32)
    np.save(tmp_path / "whole.npy", labels)
    np.save(tmp_path / "cut.npy", labels % 256)
    assert len(np.unique(read_labels(tmp_path / "whole.npy"))) == 1025
    with pytest.raises(InputError, match=r"cut\.npy`: 1020 pieces have 255 values, .* 8 bits hold 255, save 16"):
        read_labels(tmp_path / "cut.npy")


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        find_samples(tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither"):
        find_samples(tmp_path)


def samples(count: int = 50) -> list[Sample]:
    return [Sample(Path(), Path(), f"{i:03}", f"organ{i % 7}", 0.17, Path("own")) for i in range(count)]


@pytest.mark.parametrize("kind", ["official", "organ"])
def test_folds_are_disjoint_and_each_image_is_tested_once(kind: str) -> None:
    folds = make_folds(samples(), kind)
    assert sorted(s.name for fold in folds for s in fold.test) == [s.name for s in samples()]
    for fold in folds:
        parts = [{s.name for s in part} for part in (fold.train, fold.validation, fold.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 50
        assert all(parts)
        if kind == "organ":
            assert not {s.group for s in fold.test} & {s.group for s in fold.train + fold.validation}


def test_other_sources_help_and_are_never_tested() -> None:
    extra = [Sample(Path(), Path(), f"other/{i}", "other", 0.25, Path("other")) for i in range(20)]
    plain, mixed = make_folds(samples()), make_folds(samples(), extra=extra)
    for a, b in zip(plain, mixed, strict=True):
        assert a.test == b.test
        for part, count in (("train", 18), ("validation", 2)):
            own, more = getattr(a, part), getattr(b, part)
            assert more[: len(own)] == own
            assert len(set(more[len(own) :]) & set(extra)) == count
    final = final_fold(samples(), extra=extra)
    assert (len(final.train), len(final.validation), len(final.test)) == (63, 7, 0)
    assert set(final.train) | set(final.validation) == {*samples(), *extra}
    few = final_fold(samples(3))
    assert (len(few.train), len(few.validation)) == (2, 1), "a tenth of three is none, and one chooses the thresholds"


def test_each_source_is_tested_by_the_others() -> None:
    other, third = (
        [Sample(Path(), Path(), f"{name}/{i}", name, 0.25, Path(name)) for i in range(20)] for name in ("b", "c")
    )
    folds = make_folds(samples(), "source", extra=[*other, *third])
    assert [fold.test for fold in folds] == [samples(), other, third]
    for fold, (train, validation) in zip(folds, ((36, 4), (63, 7), (63, 7)), strict=True):
        assert (len(fold.train), len(fold.validation)) == (train, validation)
        assert set(fold.train) | set(fold.validation) == {*samples(), *other, *third} - set(fold.test)
        assert not set(fold.train) & set(fold.validation)
    with pytest.raises(InputError, match="name others by --extra"):
        make_folds(samples(), "source")


@pytest.mark.parametrize(("kind", "count"), [("official", 4), ("organ", 40)])
def test_too_few_images_or_organs_for_folds(kind: str, count: int) -> None:
    few = [replace(sample, group="one") for sample in samples(count)]
    with pytest.raises(InputError, match=f"and {count - 1} more: too few for five {kind} folds"):
        make_folds(few, kind)


def test_names_of_two_sources_do_not_mix(tmp_path: Path) -> None:
    for source in ("one", "two"):
        for part, name in (("images", "a.png"), ("labels", "a.npy")):
            (tmp_path / source / part).mkdir(parents=True)
            (tmp_path / source / part / name).touch()
    assert [s.name for source in ("one", "two") for s in find_extra(tmp_path / source)] == [
        "one/images/a.png",
        "two/images/a.png",
    ]
    assert [s.mpp for s in find_extra(tmp_path / "one", 0.5)] == [0.5]


def test_official_folds_are_the_paper_s() -> None:
    from sklearn.model_selection import KFold

    wanted = [test.tolist() for _, test in KFold(5, shuffle=True, random_state=19).split(range(665))]
    assert [[int(s.name) for s in fold.test] for fold in make_folds(samples(665))] == wanted
