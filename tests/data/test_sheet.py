"""The contact sheet."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune101.config import AugmentConfig
from finetune101.data import sheet
from finetune101.data.sheet import GAP, LARGE, MARGIN, contact_sheet


@pytest.mark.parametrize(("name", "format"), [("sheet.png", "PNG"), ("sheet.JPG", "JPEG")])
def test_draws_a_picture_of_moderate_size(tiny_data: Path, tmp_path: Path, name: str, format: str) -> None:
    out = contact_sheet(tiny_data, tmp_path / "new" / name)
    assert out == tmp_path / "new" / name
    assert out.stat().st_size < 300_000
    with Image.open(out) as image:
        assert image.format == format
        assert np.asarray(image.convert("L")).std() > 20


def test_the_same_seed_draws_the_same_sheet(tiny_data: Path, tmp_path: Path) -> None:
    first, second, other = (contact_sheet(tiny_data, tmp_path / f"{i}.png", seed=i // 2) for i in range(3))
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


def test_without_augmentation_the_versions_equal_the_image(tiny_data: Path, tmp_path: Path) -> None:
    out = contact_sheet(tiny_data, tmp_path / "sheet.png", AugmentConfig(flip=False, crop_scale=1.0))
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB"))
    row = pixels[-GAP - LARGE : -GAP]
    versions = [row[:, MARGIN + k * (LARGE + GAP) :][:, :LARGE] for k in range(3)]
    assert (versions[0] == versions[1]).all()
    assert (versions[0] == versions[2]).all()


def test_many_images_of_few_and_long_named_classes(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data / "ball", tmp_path / "data" / ("very long name " * 8).strip())
    shutil.copytree(tiny_data / "box", tmp_path / "data" / "box")
    with Image.open(contact_sheet(tmp_path / "data", tmp_path / "sheet.png", per_class=20)) as image:
        assert image.width < 1500


@pytest.mark.parametrize("more", [{"erasing": 1.0}, {"policy": "trivial"}])
def test_distortions_are_drawn(tiny_data: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    pixels = []
    for augment in (AugmentConfig(flip=False), AugmentConfig(flip=False, **more)):
        with Image.open(contact_sheet(tiny_data, tmp_path / "sheet.png", augment)) as image:
            pixels.append(np.asarray(image.convert("RGB"))[-GAP - LARGE : -GAP].astype(int))
    left = MARGIN + LARGE
    image, versions = (abs(pixels[0][:, part] - pixels[1][:, part]).mean() for part in (slice(left), slice(left, None)))
    assert versions > 1.5 * image  # the image itself differs by the palette only


@pytest.mark.parametrize(
    ("config", "flag"), [(AugmentConfig(mix=0.5), "--mix"), (AugmentConfig(train_sizes=(32, 64)), "--train-sizes")]
)
def test_what_a_sheet_cannot_show_is_refused(tiny_data: Path, tmp_path: Path, config: AugmentConfig, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        contact_sheet(tiny_data, tmp_path / "sheet.png", config)
    assert not list(tmp_path.iterdir())


def test_odd_class_names_and_more_images_than_there_are(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data / "ball", tmp_path / "data" / "two\nlines \x1b[2J")
    shutil.copytree(tiny_data / "box", tmp_path / "data" / "caf\udce9")
    wide = contact_sheet(tmp_path / "data", tmp_path / "wide.png", per_class=1_000_000)
    assert wide.read_bytes() == contact_sheet(tmp_path / "data", tmp_path / "all.png", per_class=12).read_bytes()


def test_a_sheet_too_large_for_a_picture_is_refused(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheet, "MOST_PIXELS", 100_000)
    with pytest.raises(ValueError, match="smaller --per-class"):
        contact_sheet(tiny_data, tmp_path / "sheet.png", per_class=12)


def test_bad_input_is_refused_in_one_sentence(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither \.png nor \.jpg"):
        contact_sheet(tiny_data, tmp_path / "sheet.gif")
    with pytest.raises(ValueError, match="at least 1"):
        contact_sheet(tiny_data, tmp_path / "sheet.png", per_class=0)
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    for path in (data / "box").iterdir():
        path.write_text("broken")
    with pytest.raises(ValueError, match="cannot read the image"):
        contact_sheet(data, tmp_path / "sheet.png")
    assert not list(tmp_path.glob("*sheet*"))
