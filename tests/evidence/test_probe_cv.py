"""evidence/probe_cv.py: what is chosen is what helps held-out images, and the test images are looked at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import probe_cv
import pytest
import torch
from torch import Tensor

from finetune101.evaluation.predictions import read_rows
from finetune101.run import Run

SIZES = {"efficientnet_lite0": (32, 48)}


class Drawn:
    """Features of 60 images of 3 classes: the last stage is nothing but noise, the last layer at 48 px tells."""

    def __init__(self) -> None:
        self.y = torch.arange(60) % 3
        generator = torch.Generator().manual_seed(0)
        self.noise = {key: torch.randn(60, 4, generator=generator) for key in (32, 48, "stage")}

    def of(self, block: probe_cv.Block, mirror: bool) -> Tensor:
        x = self.noise["stage" if block.layer == "stage" else block.size].clone()
        x[:, :3] += torch.eye(3)[self.y] * {32: 1.0, 48: 4.0}[block.size] * (block.layer == "last")
        return x


@pytest.fixture(autouse=True)
def three_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_cv, "FOLDS", 3)


def test_the_size_that_helps_held_out_images_is_chosen() -> None:
    drawn: Any = Drawn()
    result = probe_cv.choose(drawn, drawn.y, 3, SIZES)
    start, *others = result["tried"]
    assert result["top1"] >= 95 > start["top1"]
    assert (48, "last") in {(block["size"], block["layer"]) for block in result["choice"]["blocks"]}
    assert {row["kept"] for row in others} == {True, False}


def test_no_image_is_scored_by_a_layer_that_it_has_trained() -> None:
    """Features that say nothing of the class, more of them than images: who trains on an image knows it by heart."""
    drawn: Any = Drawn()
    drawn.of = lambda block, mirror: torch.randn(60, 200, generator=torch.Generator().manual_seed(1))
    choice = probe_cv.Choice((probe_cv.Block("x", 32, "last"),), l2=0.001)
    output = probe_cv.held_out(drawn, drawn.y, 3, choice)
    assert float((output.argmax(1) == drawn.y).float().mean()) < 0.6
    for train, held in probe_cv.folds_of(drawn.y):
        assert not set(train.tolist()) & set(held.tolist()) and len(train) + len(held) == 60


def test_from_images_to_one_look_at_the_test(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_cv, "SIZES", SIZES)
    monkeypatch.setattr(probe_cv, "PENALTIES", (0.01,))
    out = ["--out", str(tmp_path / "out")]
    probe_cv.main(["choose", str(tiny_data), *out])
    assert not (tmp_path / "out" / "test.json").exists()
    probe_cv.main(["test", str(tiny_data), *out])
    result = Run(tmp_path / "out").read_json("test.json")
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    assert len(rows) == result["n"] and sum(row["label"] == row["prediction"] for row in rows) == result["correct"]
    with pytest.raises(ValueError, match="was tested before"):
        probe_cv.main(["test", str(tiny_data), *out])
