"""What verify reports of a data set."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def test_train_and_test_folders_are_verified_too(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "train")
    shutil.copytree(tiny_data, tmp_path / "test")
    report = verify(tmp_path)
    assert report.class_sizes == {"ball": 24, "box": 24, "stripes": 24}
    assert len(report.identical) == 36
