"""Splits: the published counts, no image twice, no dependence on the order of files."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from finetune101.config import DataConfig
from finetune101.data import splits
from finetune101.data.duplicates import duplicate_groups
from finetune101.data.images import Index, class_of, content_hash, find_data, index_images
from finetune101.errors import Refused

# what scikit-learn's train_test_split(random_state=42) makes of the 31 images of inline_skate
INLINE_SKATE = {
    "train": [8, 26, 2, 22, 13, 29, 6, 1, 4, 19, 5, 17, 20, 21, 15, 7, 12, 3, 27, 11, 14],
    "val": [23, 31, 25],
    "test": [28, 16, 24, 18, 9, 10, 30],
}
REFERENCE_HASH = "sha256:3c3d840a1a36a63bbceb2c8830c099f8f7255c8c8e2d27aad8c8cf80b77f67d8"


def index_of(**sizes: int) -> Index:
    """An index of classes with that many images, as ``index_images`` would make it."""
    paths = tuple(sorted(f"{name}/image_{i:04d}.jpg" for name, n in sizes.items() for i in range(1, n + 1)))
    return Index(root=Path("data"), classes=tuple(sorted(sizes)), paths=paths, digests={p: p.upper() for p in paths})


def shuffled(index: Index, seed: int) -> Index:
    paths = list(index.paths)
    random.Random(seed).shuffle(paths)
    return dataclasses.replace(index, paths=tuple(paths), digests={path: index.digests[path] for path in paths})


def standard(n: int, **options: object) -> DataConfig:
    return DataConfig(protocol="standard", train_per_class=n, **options)  # type: ignore[arg-type]


def per_class(manifest: splits.Manifest, subset: str) -> dict[str, int]:
    return dict(Counter(class_of(path) for path in manifest.subsets[subset]))


def assert_partition(manifest: splits.Manifest, index: Index) -> None:
    """Every image of ``index`` is in exactly one subset."""
    used = [path for paths in manifest.subsets.values() for path in paths]
    assert sorted(used) == sorted(index.paths)


# reference


def test_reference_is_the_split_of_the_original() -> None:
    index = index_of(inline_skate=31, other=40)
    manifest = splits.make_split(index, DataConfig())
    for subset, numbers in INLINE_SKATE.items():
        ours = [path for path in manifest.subsets[subset] if class_of(path) == "inline_skate"]
        assert ours == [f"inline_skate/image_{number:04d}.jpg" for number in numbers]
    assert_partition(manifest, index)


@pytest.mark.parametrize(("n", "counts"), [(31, (21, 3, 7)), (40, (28, 4, 8)), (12, (7, 2, 3)), (3, (1, 1, 1))])
def test_reference_shares(n: int, counts: tuple[int, int, int]) -> None:
    manifest = splits.make_split(index_of(a=n, b=n), DataConfig())
    assert tuple(per_class(manifest, subset)["a"] for subset in splits.SUBSETS) == counts


def test_reference_of_another_seed_differs_in_images_only() -> None:
    one, two = (splits.make_split(index_of(a=20, b=20), DataConfig(split_seed=seed)) for seed in (42, 43))
    assert one.subsets != two.subsets and one.hash() != two.hash()
    assert [len(paths) for paths in one.subsets.values()] == [len(paths) for paths in two.subsets.values()]


def test_reference_refuses_a_class_too_small_to_split() -> None:
    with pytest.raises(
        ValueError, match=r"to split: class tiny has 1 \(add at least 2\); add images, or remove its folder"
    ):
        splits.make_split(index_of(big=20, tiny=1), DataConfig())
    many = index_of(big=20, a=2, b=1, c=1, d=2)
    with pytest.raises(
        ValueError, match=r"class b has 1 .*, class c has 1 .*, class a has 2 \(add at least 1\) and 1 m"
    ):
        splits.make_split(many, DataConfig())
    assert splits.make_split(index_of(big=20, three=3), DataConfig()).subsets["train"]


@pytest.mark.parametrize(
    "config", [DataConfig(), standard(5), standard(6, max_test_per_class=3)], ids=["reference", "standard", "capped"]
)
def test_the_order_of_files_does_not_matter(config: DataConfig) -> None:
    index = index_of(Zebra=13, ant=17, cat=20)
    expected = splits.make_split(index, config)
    for seed in range(3):
        assert splits.make_split(shuffled(index, seed), config) == expected


@pytest.fixture(scope="module")
def real(caltech101: Path) -> Index:
    return index_images(find_data(str(caltech101)))


@pytest.mark.caltech101
def test_reference_of_caltech101(real: Index) -> None:
    manifest = splits.make_split(shuffled(real, 0), DataConfig())
    assert manifest.hash() == REFERENCE_HASH
    assert [len(manifest.subsets[subset]) for subset in splits.SUBSETS] == [6003, 904, 1770]


@pytest.mark.caltech101
def test_reference_equals_the_list_beside_the_data(real: Index) -> None:
    file = Path(os.environ["FINETUNE101_DATA"]).resolve().parents[1] / "splits" / "reference_70_10_20_seed42.json"
    if not file.is_file():
        pytest.skip(f"no list of the reference split at {file}")
    wanted = json.loads(file.read_text(encoding="utf-8"))
    manifest = splits.make_split(real, DataConfig())
    for subset in splits.SUBSETS:
        assert list(manifest.subsets[subset]) == wanted[subset]


@pytest.mark.caltech101
def test_standard_split_of_caltech101(real: Index) -> None:
    manifest = splits.make_split(real, standard(30, group_duplicates=False))
    assert set(per_class(manifest, "train").values()) == {25} and set(per_class(manifest, "val").values()) == {5}
    assert_partition(manifest, real)


# standard


@pytest.mark.parametrize(("n", "val"), [(30, 5), (15, 3), (21, 4), (10, 2), (5, 1), (4, 1), (3, 1), (2, 0), (1, 0)])
def test_standard_counts(n: int, val: int) -> None:
    """n / 6 of the n images validate, rounded with halves up; none when that is 0."""
    manifest = splits.make_split(index_of(a=40, b=35), standard(n))
    assert per_class(manifest, "train") == {"a": n - val, "b": n - val}
    assert per_class(manifest, "val") == ({"a": val, "b": val} if val else {})
    assert per_class(manifest, "test") == {"a": 40 - n, "b": 35 - n}
    assert_partition(manifest, index_of(a=40, b=35))


def test_standard_caps_the_test_images() -> None:
    free, capped = (splits.make_split(index_of(a=80, b=33), standard(30, max_test_per_class=cap)) for cap in (None, 10))
    assert per_class(capped, "test") == {"a": 10, "b": 3}
    assert set(capped.subsets["test"]) < set(free.subsets["test"])
    assert capped.subsets["train"] == free.subsets["train"] and capped.subsets["val"] == free.subsets["val"]


def test_standard_needs_images_left_to_test() -> None:
    with pytest.raises(
        ValueError, match=r"--train-per-class 30 and a test: class b has 30 \(add at least 1\); .* a smaller --train"
    ):
        splits.make_split(index_of(a=31, b=30), standard(30))


@pytest.mark.parametrize("seed", range(5))
def test_standard_keeps_groups_on_one_side(seed: int) -> None:
    index = index_of(Faces=30, Faces_easy=30, other=30)
    groups = {f"{name}/image_{i:04d}.jpg": f"twin {i}" for name in ("Faces", "Faces_easy") for i in range(1, 31)}
    groups |= {f"other/image_{i:04d}.jpg": f"near {i // 3}" for i in range(1, 13)}
    manifest = splits.make_split(index, standard(12, split_seed=seed), groups)
    side = {path: name for name, paths in manifest.subsets.items() for path in paths}
    sides: dict[str, set[str]] = {}
    for path, group in groups.items():
        sides.setdefault(group, set()).add("test" if side[path] == "test" else "pool")
    assert all(len(where) == 1 for where in sides.values())
    pool = Counter(class_of(path) for subset in ("train", "val") for path in manifest.subsets[subset])
    assert pool == {"Faces": 12, "Faces_easy": 12, "other": 12}
    assert_partition(manifest, index)


@pytest.mark.parametrize("n", [8, 12, 15])
def test_bursts_of_similar_photos_leave_images_to_validate(n: int) -> None:
    """Whole groups of four fit no sixth of twelve: every class validates on its smallest group instead."""
    index = index_of(a=40, b=41)
    groups = {path: f"{class_of(path)} {int(path[-8:-4]) // 4}" for path in index.paths}
    manifest = splits.make_split(index, standard(n), groups)
    counts = per_class(manifest, "train"), per_class(manifest, "val")
    assert all(set(held) == {"a", "b"} for held in counts)
    assert Counter(counts[0]) + Counter(counts[1]) == {"a": n, "b": n}
    side = {path: name for name, paths in manifest.subsets.items() for path in paths}
    assert all(len({side[path] for path in groups if groups[path] == group}) == 1 for group in groups.values())
    assert splits.split_remarks(manifest) == []


def test_one_group_of_two_classes_validates_for_both() -> None:
    """Groups of three fit no sixth of twelve; one of the twins of a and c, and one of b, are enough."""
    index = index_of(a=24, b=24, c=24)
    groups = {
        path: f"{'b' if class_of(path) == 'b' else 'twins'} {(int(path[-8:-4]) - 1) // 3}" for path in index.paths
    }
    for seed in range(3):
        manifest = splits.make_split(index, standard(12, split_seed=seed), groups)
        assert per_class(manifest, "val") == {"a": 3, "b": 3, "c": 3}
        assert per_class(manifest, "train") == {"a": 9, "b": 9, "c": 9}


def test_a_class_that_cannot_validate_is_said() -> None:
    index = index_of(a=30, b=30)
    groups = {path: "one burst" for path in index.paths if path < "a/image_0013"}
    several = [splits.make_split(index, standard(12, split_seed=seed), groups) for seed in range(40)]
    burst = next(manifest for manifest in several if "a/image_0001.jpg" in manifest.subsets["train"])
    assert per_class(burst, "val") == {"b": 2}
    assert splits.split_remarks(burst) == ["No validation images of 1 of 2 classes (a)."]


def test_no_validation_images_are_said() -> None:
    for config in (standard(2), DataConfig(val_size=0)):
        manifest = splits.make_split(index_of(a=12, b=12), config)
        assert not manifest.subsets["val"]
        assert splits.split_remarks(manifest)[0].startswith("No validation images: ")
        assert splits.split_remarks(manifest, "train+val") == []


def test_missing_test_images_are_said() -> None:
    manifest = splits.make_split(index_of(a=12, b=12, c=12, d=12, e=12), DataConfig())

    def remarks(*classes: str) -> list[str]:
        """What is said where only ``classes`` have test images."""
        test = tuple(path for path in manifest.subsets["test"] if class_of(path) in classes)
        return splits.split_remarks(dataclasses.replace(manifest, subsets={**manifest.subsets, "test": test}))

    assert remarks(*"abcde") == []
    assert remarks(*"ac") == ["No test images of 3 of 5 classes (b, d, e)."]
    assert remarks("c") == ["No test images of 4 of 5 classes (a, b, d, …)."]
    assert remarks() == ["No test images: evaluate will use the validation images."]


def test_a_manifest_says_how_it_was_made() -> None:
    index = index_of(a=12, b=12)
    manifest = splits.make_split(index, DataConfig(split_seed=7))
    assert (manifest.protocol, manifest.seed, manifest.classes) == ("reference", 7, ("a", "b"))
    assert manifest.options == {"test_size": 0.2, "val_size": 0.1} and manifest.skipped == ()
    other = splits.make_split(
        index, standard(5, split_seed=7, max_test_per_class=2), {path: path for path in index.paths}
    )
    assert other.options == {"train_per_class": 5, "max_test_per_class": 2, "group_duplicates": True}
    skipped = dataclasses.replace(manifest, options={"skipped": ["a/1.jpg", "a/2.jpg"]})
    assert skipped.skipped == ("a/1.jpg", "a/2.jpg")
    assert dataclasses.replace(manifest, options={"skipped": "a/1.jpg"}).skipped == ()
    turned = dict(reversed(manifest.subsets.items()))
    assert dataclasses.replace(manifest, subsets=turned).hash() == manifest.hash()
    values = manifest.to_json()
    assert values["hash"] == manifest.hash() and values["hash"].startswith("sha256:") and values["seed"] == 7
    assert values["content_hash"] == content_hash(index.digests, index.paths)


def test_folders_that_do_not_suit_the_protocol_are_refused() -> None:
    subsets = {"train": "train", "test": "test"}
    paths = ("train/a/1.jpg", "train/a/2.jpg", "test/a/3.jpg")
    index = Index(
        root=Path("data"), classes=("a",), paths=paths, digests={path: path for path in paths}, subsets=subsets
    )
    with pytest.raises(Refused, match=r"^data is split into train/ and test/, and --protocol standard would mix them"):
        splits.make_split(index, standard(1))
    with pytest.raises(Refused, match=r"^data has no train/ with val/ or test/ of class folders; leave --protocol out"):
        splits.make_split(index_of(a=3), DataConfig(protocol="folders"))
    assert splits.make_split(index, DataConfig()).subsets == {"train": paths[:2], "val": (), "test": paths[2:]}
    untrained = dataclasses.replace(index, paths=paths[2:])
    with pytest.raises(Refused, match="class a has no image that can be read"):
        splits.make_split(untrained, DataConfig())


def test_the_first_image_of_each_group_decides_for_the_others() -> None:
    index = index_of(a=10, b=10)
    groups = {path: path for path in index.paths} | {"a/image_0002.jpg": "a/image_0001.jpg"}
    firsts = index_of(a=10, b=10)
    firsts = dataclasses.replace(firsts, paths=tuple(path for path in index.paths if path != "a/image_0002.jpg"))
    alone = splits.make_split(firsts, DataConfig())
    manifest = splits.make_split(index, DataConfig(), groups)
    for subset in splits.SUBSETS:
        assert set(alone.subsets[subset]) == set(manifest.subsets[subset]) - {"a/image_0002.jpg"}
    twins = {path: "a/image_0001.jpg" if path < "b" else path for path in index.paths} | {
        "a/image_0001.jpg": "b/image_0001.jpg"
    }
    with pytest.raises(Refused, match="a class has no image that is not a near-duplicate of another class's"):
        splits.make_split(index, DataConfig(), {path: twins[path] for path in index.paths})


def test_large_sets_are_split_in_time_that_grows_with_them() -> None:
    """60,000 images of 1,000 classes: each of these took minutes where it went over all images for each image."""
    index = index_of(**{f"c{i}": 60 for i in range(1000)})
    start = time.process_time()
    manifest = splits.make_split(index, standard(30), {path: path for path in index.paths})
    splits.check_split(splits.from_json(manifest.to_json()), index)
    assert manifest.labels("val")[:6] == [0] * 5 + [1]
    assert time.process_time() - start < 10


def test_a_class_without_a_good_image_is_refused() -> None:
    """As --skip-bad-images may leave it."""
    index = index_of(a=12, b=12, c=12)
    rest = dataclasses.replace(index, paths=tuple(path for path in index.paths if class_of(path) != "b"))
    for config in (DataConfig(), standard(5)):
        with pytest.raises(Refused, match="class b has no image that can be read"):
            splits.make_split(rest, config)


def test_standard_says_when_groups_are_too_large() -> None:
    groups = {f"a/image_{i:04d}.jpg": "all one" for i in range(1, 11)}
    with pytest.raises(ValueError, match=r"class a lacks 3 image.* use --no-group-duplicates or a smaller"):
        splits.make_split(index_of(a=10, b=10), standard(3), groups)


def test_duplicates_of_a_real_folder_stay_together(tiny_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(tiny_data, root)
    for i in range(1, 5):
        shutil.copy(root / "ball" / f"image_{i:04d}.jpg", root / "ball" / f"copy_{i:04d}.jpg")
    index = index_images(root)
    groups = duplicate_groups(index)
    for seed in range(5):
        manifest = splits.make_split(index, standard(6, split_seed=seed), groups)
        test = set(manifest.subsets["test"])
        for i in range(1, 5):
            assert (f"ball/copy_{i:04d}.jpg" in test) == (f"ball/image_{i:04d}.jpg" in test)


# folders


def test_folders_are_taken_as_they_are(tiny_data: Path, tmp_path: Path) -> None:
    for subset, numbers in {"train": range(1, 7), "val": range(7, 9), "test": range(9, 13)}.items():
        for name in ("ball", "box"):
            (tmp_path / subset / name).mkdir(parents=True)
            for i in numbers:
                shutil.copy(tiny_data / name / f"image_{i:04d}.jpg", tmp_path / subset / name)
    index = index_images(find_data(str(tmp_path)), "folders")
    manifest = splits.make_split(index, DataConfig(protocol="folders"))
    fewer = dataclasses.replace(manifest, subsets=manifest.subsets | {"val": ()})
    assert splits.is_by_folders(manifest, index) and not splits.is_by_folders(fewer, index)
    assert not splits.is_by_folders(manifest, index_of(ball=12, box=12))
    assert (manifest.protocol, manifest.seed, manifest.options) == ("folders", 42, {})
    assert manifest.classes == ("ball", "box")
    for subset, n in {"train": 6, "val": 2, "test": 4}.items():
        assert per_class(manifest, subset) == {"ball": n, "box": n}
        assert all(path.startswith(subset + "/") for path in manifest.subsets[subset])
    assert manifest.labels("val") == [0, 0, 1, 1]
    shutil.rmtree(tmp_path / "val")
    assert splits.make_split(index_images(tmp_path, "folders"), DataConfig(protocol="folders")).subsets["val"] == ()


# manifests as files


@pytest.fixture
def manifest() -> splits.Manifest:
    return splits.make_split(index_of(a=12, b=12), DataConfig())


def test_a_manifest_survives_json(manifest: splits.Manifest) -> None:
    again = splits.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest and again.hash() == manifest.hash()


def test_labels_follow_the_class_names(manifest: splits.Manifest) -> None:
    for path, label in zip(manifest.subsets["train"], manifest.labels("train"), strict=True):
        assert manifest.classes[label] == class_of(path)


def broken(values: dict, how: str) -> object:  # type: ignore[type-arg]
    if how == "twice":
        values["subsets"]["test"] = [*values["subsets"]["test"], values["subsets"]["train"][0]]
    elif how == "same subset":
        values["subsets"]["test"] = [*values["subsets"]["test"], values["subsets"]["test"][0]]
    elif how == "unlisted class":
        values["classes"] = ["a"]
    elif how == "key":
        del values["content_hash"]
    elif how == "subset":
        del values["subsets"]["val"]
    else:
        return [1, 2]
    return values


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("twice", "in train and in test; make it anew"),
        ("same subset", "in test and in test; make it anew"),
        ("unlisted class", "of a class that it does not list"),
        ("key", "lacks content_hash"),
        ("subset", "lacks subsets.val"),
        ("list", "--split"),
    ],
)
def test_broken_manifests_are_refused(manifest: splits.Manifest, tmp_path: Path, how: str, message: str) -> None:
    file = tmp_path / "split.json"
    file.write_text(json.dumps(broken(json.loads(json.dumps(manifest.to_json())), how)), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        splits.read_split(file)


@pytest.mark.parametrize(
    "path",
    ["/a/1.jpg", "a/../../1.jpg", "../a/1.jpg", "a/..", "C:\\a\\1.jpg", "c:/a/1.jpg", "\\\\host\\a\\1.jpg",
     "a/..\\..\\1.jpg", "a//1.jpg", "./a/1.jpg", "a/\0.jpg"],
)  # fmt: skip
def test_paths_that_leave_the_data_folder_are_refused(manifest: splits.Manifest, path: str) -> None:
    values = manifest.to_json()
    values["classes"] = [*values["classes"], path.split("/")[0]]
    values["subsets"]["test"] = [*values["subsets"]["test"], path]
    with pytest.raises(Refused, match="leads out of the data folder"):
        splits.from_json(values)


def test_odd_names_are_no_way_out(manifest: splits.Manifest) -> None:
    values = manifest.to_json()
    values["subsets"]["test"] = [*values["subsets"]["test"], "a/x..jpg", "a/b/c:d.jpg", "a/back\\slash.jpg", "a/...jpg"]
    assert len(splits.from_json(values).subsets["test"]) == len(manifest.subsets["test"]) + 4


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'"text"'])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "split.json").write_bytes(content)
    with pytest.raises(ValueError, match="split"):
        splits.read_split(tmp_path / "split.json")


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*none.json.*check --split"):
        splits.read_split(tmp_path / "none.json")


def test_check_wants_the_same_images(manifest: splits.Manifest) -> None:
    splits.check_split(manifest, index_of(a=12, b=12))
    splits.check_split(manifest, index_of(a=13, b=12, c=5))  # more images beside those of the split do no harm
    with pytest.raises(ValueError, match=r"1 images of the split are not in data \(first: b/image_0012.jpg\)"):
        splits.check_split(manifest, index_of(a=12, b=11))
    changed = index_of(a=12, b=12)
    changed.digests["a/image_0001.jpg"] = "other bytes"
    with pytest.raises(ValueError, match="changed after the split was made"):
        splits.check_split(manifest, changed)
