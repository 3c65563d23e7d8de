"""What verify finds, and the groups a split keeps together."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune101.data import duplicates
from finetune101.data.duplicates import duplicate_groups, near_groups, near_labels, standardised, thumbnails
from finetune101.data.images import find_data, index_images
from finetune101.data.verify import verify


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data set, to be spoilt."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def spoil(data: Path) -> None:
    """One file of every kind that verify reports."""
    whole = (data / "ball/image_0001.jpg").read_bytes()
    (data / "ball/image_0002.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "ball/image_0003.jpg").write_text("no image at all")
    (data / "ball/image_0004.png").write_bytes(b"")
    (data / "ball/notes.txt").write_text("stray")
    (data / "box/same.jpg").write_bytes(whole)
    with Image.open(data / "box/image_0001.jpg") as image:
        image.load()
        image.resize((50, 50)).save(data / "stripes/near.png")
        image.rotate(90).convert("L").save(data / "stripes/gray.png")


def test_a_sound_data_set_has_nothing_to_report(tiny_data: Path) -> None:
    report = verify(tiny_data)
    assert report.class_sizes == {"ball": 12, "box": 12, "stripes": 12}
    assert report.images == 36
    findings = (report.bad, report.left_out, report.grayscale, report.identical, report.near, report.twins)
    assert not any(findings)
    assert "3 classes, 36 images, 12 per class" in report.text()
    assert "Caltech-101" not in report.text()
    assert report.text().endswith("every image can be read")


def test_everything_wrong_is_found_and_nothing_is_edited(data: Path) -> None:
    spoil(data)
    before = snapshot(data)
    report = verify(data)
    assert snapshot(data) == before
    assert list(report.truncated) == ["ball/image_0002.jpg"]
    assert report.not_images == ("ball/image_0003.jpg", "ball/image_0004.png")
    assert list(report.left_out.values()) == [("ball/notes.txt",)]
    assert report.bad == ("ball/image_0002.jpg", "ball/image_0003.jpg", "ball/image_0004.png")
    assert report.grayscale == ("stripes/gray.png",)
    assert report.identical == (("ball/image_0001.jpg", "box/same.jpg"),)
    assert report.near == (("box/image_0001.jpg", "stripes/near.png"),)
    text = report.text()
    assert "ball/image_0001.jpg = box/same.jpg" in text
    assert "3 file(s) to repair or remove" in text


def test_a_broken_png_is_unreadable_or_truncated(data: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(data / "box/x.png")
    content = bytearray((data / "box/x.png").read_bytes())
    content[60:90] = bytes(30)
    (data / "box/x.png").write_bytes(bytes(content))
    assert verify(data).bad == ("box/x.png",)


def test_a_caltech101_of_other_counts_is_said(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "101_ObjectCategories")
    (tmp_path / "101_ObjectCategories/box/image_0001.jpg").unlink()
    text = verify(tmp_path / "101_ObjectCategories").text()
    assert "3 classes, 35 images, 11 (box) to 12 (ball) per class" in text
    assert "NOT as the official Caltech-101: 101 classes, 8,677 images without BACKGROUND_Google" in text


def test_long_lists_are_cut(data: Path) -> None:
    for i in range(1, 9):
        (data / f"ball/image_{i:04d}.jpg").write_text(f"broken {i}")
    assert "... and 5 more" in verify(data).text(most=3)


def test_an_unusual_image_is_read_without_a_warning(data: Path) -> None:
    palette = Image.new("P", (40, 40))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(1, (5, 5, 30, 20))
    palette.save(data / "box/palette.png", transparency=bytes([0, 128]))
    Image.new("CMYK", (30, 30), (1, 200, 3, 40)).save(data / "box/cmyk.jpg")
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)).save(data / "box/deep.png")
    assert not verify(data).bad


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
    spoil(data)
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


def test_train_and_test_folders_are_verified_too(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "train")
    shutil.copytree(tiny_data, tmp_path / "test")
    report = verify(tmp_path)
    assert report.class_sizes == {"ball": 24, "box": 24, "stripes": 24}
    assert len(report.identical) == 36


@pytest.mark.caltech101
def test_known_duplicates_of_caltech101(caltech101: Path, tmp_path: Path) -> None:
    index = index_images(find_data(str(caltech101)))
    few = [path for path in index.paths if path.startswith("Motorbikes/image_07")]
    groups = near_groups(few, thumbnails(index.root, few))
    pair = {"Motorbikes/image_0719.jpg", "Motorbikes/image_0720.jpg"}
    assert any(pair <= set(group) for group in groups)
