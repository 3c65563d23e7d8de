"""Folders of photos as people have them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def six_images(tiny_data: Path, tmp_path: Path) -> Path:
    """Six images in two folders, a text file, and what train ignores without a word."""
    for name in ("ball", "box"):
        (tmp_path / name).mkdir()
        for i in (1, 2, 3):
            shutil.copy(tiny_data / name / f"image_{i:04d}.jpg", tmp_path / name)
    (tmp_path / "box" / "notes.txt").write_text("left alone")
    for junk in (".hidden", "@eaDir"):
        (tmp_path / junk).mkdir()
        shutil.copy(tiny_data / "box" / "image_0004.jpg", tmp_path / junk / "x.jpg")
    return tmp_path
