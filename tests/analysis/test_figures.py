"""Pictures drawn for real and read back with Pillow."""

import numpy as np
import pytest
from PIL import Image

from finetune101.analysis import figures

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


def arm(name, epochs, runs=(70.2,), sd=0.0):
    """What the picture of a comparison needs of one arm."""
    curve = [{"step": 9 * e, "seconds": 50.0 * e, "mean": 95 - 40 / e, "sd": sd} for e in range(1, epochs + 1)]
    return {"name": name, "curve": curve, "top1": 70.2, "interval": [68.1, 72.3], "runs": list(runs)}


@pytest.mark.parametrize("arms", [2, 3])
def test_comparison_shows_every_arm(tmp_path, arms):
    shown = [arm("tuned", 20), arm("scratch", 30, (69.0, 70.2, 71.4), 2.0), arm("probe", 1)][:arms]
    picture = pixels(figures.comparison(shown, tmp_path / "both.png"))
    assert shows(picture, "training")
    assert shows(picture, "validation")


def test_comparison_without_validation(tmp_path):
    pixels(figures.comparison([arm("a", 0), arm("b", 0)], tmp_path / "both.png"))


@pytest.mark.parametrize("classes", [2, 60])
def test_gains(tmp_path, classes):
    rows = [{"name": f"class {k}", "n": 9, "a": 90.0, "b": 90.0 - k} for k in range(classes, 0, -1)]
    picture = pixels(figures.gains(rows, ("tuned", "scratch"), tmp_path / "gains.png"))
    assert shows(picture, "training") and shows(picture, "validation")
    assert picture.shape[0] < 1200


@pytest.mark.parametrize("classes", [2, 101])
def test_confusion_frames_its_blocks(tmp_path, classes):
    counts = np.eye(classes, dtype=int) * 5
    blocks = [2] + [1] * (classes - 2)
    picture = pixels(figures.confusion([f"class {k}" for k in range(classes)], counts, blocks, tmp_path / "c.png"))
    assert shows(picture, "training")  # the frame


def test_reliability(tmp_path):
    bins = [{"n": 0, "confidence": None, "top1": None}, {"n": 5, "confidence": 80.0, "top1": 60.0}]
    pixels(figures.reliability({"before": bins, "after": bins}, tmp_path / "r.png"))


def test_efficiency(tmp_path):
    cells = [{"size": size, "top1": 9.0 * size, "top1_sd": sd, "n": 3} for size, sd in ((1, None), (5, 2.0), (10, 1.0))]
    picture = pixels(figures.efficiency({"finetune": cells, "scratch": cells[:2]}, tmp_path / "e.png", "a network"))
    assert shows(picture, "training") and shows(picture, "validation")


@pytest.mark.parametrize("name", ["_hidden", "a$b$c", r"\frac{", "x" * 200, "微调"])
def test_any_name_can_be_drawn(tmp_path, name):
    pixels(figures.curves(records(2), tmp_path / "curves.png", name))
    pixels(figures.comparison([arm(name, 2), arm(name, 1)], tmp_path / "both.png"))


def test_nothing_to_draw_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="no finished epoch"):
        figures.curves([], tmp_path / "curves.png", "a run")
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
