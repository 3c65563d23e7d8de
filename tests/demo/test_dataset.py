"""The drawn data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune101.data.verify import verify
from finetune101.demo import dataset
from finetune101.demo.dataset import PICTOGRAMS, draw, picture


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}


def test_same_arguments_same_bytes_another_seed_other_pictures(tmp_path: Path) -> None:
    first = contents(draw(tmp_path / "1", classes=3, images_per_class=2))
    assert first == contents(draw(tmp_path / "2", classes=3, images_per_class=2))
    # a picture depends on its class and number only, not on how many are drawn
    assert first.items() <= contents(draw(tmp_path / "3", classes=4, images_per_class=3)).items()
    other = contents(draw(tmp_path / "4", classes=3, images_per_class=2, seed=1))
    assert other.keys() == first.keys()
    assert not set(other.values()) & set(first.values())


def test_is_a_sound_data_set(tmp_path: Path) -> None:
    report = verify(draw(tmp_path / "data", images_per_class=4))
    assert report.class_sizes == dict.fromkeys(sorted(PICTOGRAMS), 4)
    assert len(report.class_sizes) >= 12
    assert not (report.bad or report.not_images or report.identical or report.near)


@pytest.mark.parametrize("name", PICTOGRAMS)
def test_each_picture_shows_its_object(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer_of = dataset._object

    def empty_layer(*arguments: Any) -> Image.Image:
        """Draws the same random numbers, and nothing."""
        return Image.new("RGBA", layer_of(*arguments).size)

    for seed in range(3):
        drawn = picture(name, np.random.default_rng(seed))
        with monkeypatch.context() as patched:
            patched.setattr(dataset, "_object", empty_layer)
            background = picture(name, np.random.default_rng(seed))
        assert drawn.mode == "RGB" and drawn.size == background.size
        assert all(160 <= side <= 240 for side in drawn.size)
        difference = np.abs(np.asarray(drawn, np.int16) - np.asarray(background, np.int16)).max(axis=2)
        assert 0.015 < (difference > 20).mean() < 0.8  # an object, before a background


def test_the_font_has_every_pictogram_and_no_two_classes_share_one() -> None:
    texts = "".join(PICTOGRAMS.values())
    missing = dataset._font(64).getmask("\uffff")  # what a font without the character draws
    masks = [dataset._font(64).getmask(text) for text in texts]
    assert len(set(texts)) == len(texts) and len({bytes(mask) for mask in (*masks, missing)}) == len(texts) + 1


def test_files_are_jpegs_that_vary_in_size(tmp_path: Path) -> None:
    sizes = set()
    for path in draw(tmp_path, classes=2, images_per_class=4).rglob("*.jpg"):
        with Image.open(path) as image:
            assert image.format == "JPEG"
            sizes.add(image.size)
    assert len(sizes) > 4


@pytest.mark.parametrize("wrong", [{"classes": 1}, {"classes": 99}, {"images_per_class": 0}, {"seed": -1}])
def test_counts_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="cannot be drawn; give 2 to"):
        draw(tmp_path / "data", **wrong)
    assert not (tmp_path / "data").exists()
