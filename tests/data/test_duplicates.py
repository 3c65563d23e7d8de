"""The groups of images that a split keeps together: copies, near-duplicates and twins."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune101.data import duplicates
from finetune101.data.duplicates import duplicate_groups, joined, near_groups, near_labels, standardised, thumbnails
from finetune101.data.images import find_data, index_images


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data set, to be changed."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def test_thumbnails_correlate(data: Path) -> None:
    Image.new("RGB", (30, 30), (9, 9, 9)).save(data / "box/flat.png")
    rows = thumbnails(data, ["ball/image_0001.jpg", "ball/image_0001.jpg", "box/image_0001.jpg", "box/flat.png"])
    assert rows.shape == (4, 1024)
    assert rows.dtype == np.uint8
    even = standardised(rows)
    assert np.allclose((even @ even.T)[:3, :3], np.corrcoef(rows[:3]), atol=1e-5)
    assert not even[3].any()
    assert near_groups("abcd", rows) == (("a", "b"),)


def test_thumbnails_name_a_bad_file(data: Path) -> None:
    (data / "ball/image_0003.jpg").write_text("no image at all")
    with pytest.raises(ValueError, match=r"ball/image_0003\.jpg"):
        thumbnails(data, ["ball/image_0001.jpg", "ball/image_0003.jpg"])


def same_groups(labels: np.ndarray, pairs: list[tuple[int, int]]) -> bool:
    """Whether ``labels`` join exactly what ``pairs`` of places join."""
    expected = np.arange(len(labels))
    for a, b in pairs:
        expected[expected == expected[b]] = expected[a]
    return (
        len(set(zip(labels.tolist(), expected.tolist(), strict=True)))
        == len(set(labels.tolist()))
        == len(set(expected.tolist()))
    )


def test_near_duplicates_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same groups as all correlations give, whatever the size of a block; noise, chains and flat images."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (60, 1024)).astype(np.int16)
    for i in range(30):  # every image near the one before it, the last far from the first
        rows[i + 1] = np.where(rng.random(1024) < 0.008, rng.integers(0, 256, 1024), rows[i])
    rows[55], rows[40], rows[58] = rows[3], 9, 9
    thumbs = rows.astype(np.uint8)
    even = standardised(thumbs).astype(np.float64)
    pairs = [(int(i), int(j)) for i, j in np.argwhere(even @ even.T > 0.99) if i < j]
    assert 10 < len(pairs) < 1000
    for block in (7, 16, 2048):
        monkeypatch.setattr(duplicates, "BLOCK", block)
        assert same_groups(near_labels(thumbs), pairs)
    assert len(near_labels(thumbs[:0])) == 0


def test_thousands_of_similar_photos_are_one_group() -> None:
    """A burst: pairs by the million, one group."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, 1024)
    thumbs = np.clip(base + rng.integers(-2, 3, (3000, 1024)), 0, 255).astype(np.uint8)
    assert len(set(near_labels(thumbs).tolist())) == 1


def test_more_images_than_can_be_compared_are_not(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST", 20)
    groups = duplicate_groups(index_images(tiny_data))
    assert len(set(groups.values())) == 36


def test_groups_join_copies_near_duplicates_and_twins(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    shutil.copytree(tiny_data / "ball", data / "Faces")
    shutil.copytree(tiny_data / "box", data / "Faces_easy")
    shutil.copy(data / "Faces/image_0003.jpg", data / "Faces/copy.jpg")
    with Image.open(data / "Faces_easy/image_0003.jpg") as image:
        image.resize((90, 70)).save(data / "Faces_easy/near.png")
    index = index_images(data)
    groups = duplicate_groups(index)
    assert set(groups) == set(index.paths)
    members = Counter(groups.values())
    assert members.pop("Faces/copy.jpg") == 4
    assert set(members.values()) == {2}
    assert groups["Faces/image_0001.jpg"] == groups["Faces_easy/image_0001.jpg"] == "Faces/image_0001.jpg"

    (cached,) = (tmp_path / "cache").iterdir()
    written = cached.stat().st_mtime_ns
    assert duplicate_groups(index) == groups
    assert cached.stat().st_mtime_ns == written
    (data / "Faces/copy.jpg").unlink()
    assert len(duplicate_groups(index_images(data))) == len(groups) - 1
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_groups_need_no_cache(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "file" / "cache"))
    assert len(set(duplicate_groups(index_images(tiny_data)).values())) == 36


def test_groups_that_share_an_image_become_one() -> None:
    groups = [("d", "c"), ("e", "f"), ("b", "d"), ("g",)]
    assert joined("gfedcba", groups) == {"g": "g", "f": "e", "e": "e", "d": "b", "c": "b", "b": "b", "a": "a"}
    assert joined([], []) == {}


@pytest.mark.caltech101
def test_known_duplicates_of_caltech101(caltech101: Path, tmp_path: Path) -> None:
    index = index_images(find_data(str(caltech101)))
    few = [path for path in index.paths if path.startswith("Motorbikes/image_07")]
    groups = near_groups(few, thumbnails(index.root, few))
    pair = {"Motorbikes/image_0719.jpg", "Motorbikes/image_0720.jpg"}
    assert any(pair <= set(group) for group in groups)
