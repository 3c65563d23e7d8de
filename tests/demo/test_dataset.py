"""The drawn data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune101.data.verify import verify
from finetune101.demo.dataset import draw, picture
from finetune101.demo.drawings import DRAWINGS, Pen


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
    assert report.class_sizes == dict.fromkeys(sorted(DRAWINGS), 4)
    assert len(report.class_sizes) >= 12
    assert not (report.bad or report.not_images or report.identical or report.near)


@pytest.mark.parametrize("name", DRAWINGS)
def test_each_picture_shows_its_object(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stroke = DRAWINGS[name]

    def wiped(pen: Pen) -> None:
        """The same random numbers, and nothing on the layer."""
        stroke(pen)
        pen.layer.paste((0, 0, 0, 0), (0, 0, *pen.layer.size))

    for seed in range(3):
        drawn = picture(name, np.random.default_rng(seed))
        with monkeypatch.context() as patched:
            patched.setitem(DRAWINGS, name, wiped)
            background = picture(name, np.random.default_rng(seed))
        assert drawn.mode == "RGB" and drawn.size == background.size
        assert all(160 <= side <= 240 for side in drawn.size)
        difference = np.abs(np.asarray(drawn, np.int16) - np.asarray(background, np.int16)).max(axis=2)
        assert 0.03 < (difference > 20).mean() < 0.8  # an object, before a background


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
