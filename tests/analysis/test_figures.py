"""Pictures drawn for real and read back with Pillow."""

import numpy as np
import pytest
from PIL import Image

from finetune101.analysis import figures

TESTS = ({"top1": 96.2, "top1_interval": [95.2, 97.0]}, {"top1": 70.2, "top1_interval": [68.1, 72.3]})
COLOURS = {"validation": (0x00, 0x72, 0xB2), "training": (0xD5, 0x5E, 0x00)}


def records(epochs, *, validation=True, floor=0.2):
    """A run that converges: as metrics.jsonl holds it."""
    return [
        {
            "epoch": e,
            "train_loss": 3 / e,
            "train_top1": 100 - 60 / e,
            "val_loss": 2 / e + floor if validation else None,
            "val_top1": 95 - 40 / e if validation else None,
            "best": True,
        }
        for e in range(1, epochs + 1)
    ]


def pixels(path):
    """The picture as uint8 (H, W, 3), checked to be a small PNG."""
    assert path.stat().st_size < 300_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def shows(picture, colour):
    return bool((picture == COLOURS[colour]).all(axis=2).any())


@pytest.mark.parametrize("epochs", [1, 2, 30, 300])
def test_curves_show_training_and_validation(tmp_path, epochs):
    picture = pixels(figures.curves(records(epochs), tmp_path / "curves.png", "a run"))
    assert picture.shape[1] >= 1000
    assert shows(picture, "training")
    assert shows(picture, "validation")


def test_curves_without_validation(tmp_path):
    picture = pixels(figures.curves(records(5, validation=False), tmp_path / "curves.png", "a run"))
    assert shows(picture, "training")
    assert not shows(picture, "validation")


def test_best_epoch_is_the_last_that_was_best_so_far(tmp_path):
    early, late = records(10), records(10)
    for record in early[4:]:
        record["best"] = False
    one = pixels(figures.curves(early, tmp_path / "early.png", "a run"))
    other = pixels(figures.curves(late, tmp_path / "late.png", "a run"))
    assert not np.array_equal(one, other)


def test_equal_runs_give_equal_files(tmp_path):
    one = figures.curves(records(5), tmp_path / "one.png", "a run").read_bytes()
    assert figures.curves(records(5), tmp_path / "two.png", "a run").read_bytes() == one


def test_comparison_shows_both_runs(tmp_path):
    out = figures.comparison(records(20), records(30, floor=1.5), ("tuned", "scratch"), TESTS, tmp_path / "both.png")
    picture = pixels(out)
    assert shows(picture, "training")
    assert shows(picture, "validation")


@pytest.mark.parametrize("name", ["_hidden", "a$b$c", r"\frac{", "x" * 200, "微调"])
def test_any_name_can_be_drawn(tmp_path, name):
    pixels(figures.curves(records(2), tmp_path / "curves.png", name))
    out = figures.comparison(records(2), records(1, validation=False), (name, name), TESTS, tmp_path / "both.png")
    pixels(out)


def test_nothing_to_draw_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="no finished epoch"):
        figures.curves([], tmp_path / "curves.png", "a run")
    with pytest.raises(ValueError, match="b has no finished epoch"):
        figures.comparison(records(1), [], ("a", "b"), TESTS, tmp_path / "both.png")
    assert not list(tmp_path.iterdir())


def test_a_failed_picture_leaves_the_old_one(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(ValueError, match="cannot write"):
        figures.curves(records(1), target, "a run")
    assert list(tmp_path.iterdir()) == [target]


def test_own_plots_keep_their_style(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.curves(records(1), tmp_path / "curves.png", "a run")
    assert dict(matplotlib.rcParams) == before
