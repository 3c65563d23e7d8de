"""The report of a search: one page that needs no network, with every picture."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune101.reports.search_page import write_search_report

RECORD = {
    "train_loss": 1.0, "train_top1": 50.0, "lr_head": 0.01, "lr_backbone": 0.001, "images_per_s": 10.0,
    "val_loss": 1.0, "val_seconds": 0.0, "seconds": 60.0, "best": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished search of 8 points with 4 epochs, one of them pruned, one failed, one named like HTML."""
    results: list[dict[str, Any]] = []
    space = {"lr": [0.01, 0.001], "batch_size": [64, 128], "schedule": ["step", "cosine"]}
    for i, values in enumerate(itertools.product(*space.values())):
        run, point = tmp_path / "<s>" / f"run{i}", dict(zip(space, values, strict=True))
        run.mkdir(parents=True)
        epochs = 2 if i == 3 else 4
        scores = [60 + 5 * epoch + 9 * (point["lr"] == 0.01) + i for epoch in range(1, epochs + 1)]
        records = [{**RECORD, "epoch": e, "step": 10 * e, "val_top1": score} for e, score in enumerate(scores, 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        state = "pruned" if i == 3 else "failed" if i == 7 else "complete"
        results.append({"point": point, "run": f"runs/s/run{i}", "state": state})
    (tmp_path / "<s>" / "search.json").write_text(json.dumps({"space": space, "results": results}))
    return tmp_path / "<s>"


def test_a_value_that_no_font_can_draw_is_shown_by_its_number(folder: Path) -> None:
    file = folder / "search.json"
    file.write_text(file.read_text().replace('"cosine"', r'"\ud800"'))
    page = write_search_report(folder, [("lr", "schedule")])
    assert "ud800" in page.with_suffix(".md").read_text(encoding="utf-8")


def test_the_page_says_what_of_the_grid_was_not_trained(folder: Path) -> None:
    file = folder / "search.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sampler": "grid", "points": 10}))
    page = write_search_report(folder).with_suffix(".md").read_text(encoding="utf-8")
    assert "2 points of the grid were not trained: the same command trains them." in page


def test_the_page_holds_everything_itself(folder: Path) -> None:
    page = write_search_report(folder, [("batch_size", "schedule")])
    text = page.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "<s>" not in text and "&lt;s&gt;" in text
    markdown = page.with_suffix(".md").read_text(encoding="utf-8")
    assert "heat_batch_size_schedule.png" in markdown and "| rank |" in markdown
    pictures = sorted(path.name for path in page.parent.glob("*.png"))
    assert pictures == ["curves.png", "effects.png", "heat_batch_size_schedule.png", "ranks.png", "variance.png"]
    assert text.count("data:image/png;base64,") == 2 * len(pictures)  # each also for phones
    assert "One trial was stopped early" in text and "One more trial could not be trained" in text
    for name in pictures:
        with Image.open(page.parent / name) as picture:
            assert picture.width >= 500 and picture.height >= 250


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_setting_with_the_name_of_a_word_keeps_it(folder: Path, tmp_path: Path, lang: str) -> None:
    file = folder / "search.json"
    file.write_text(file.read_text().replace('"schedule"', '"size"').replace('"step"', "96").replace('"cosine"', "128"))
    head = write_search_report(folder, out=tmp_path / "out", lang=lang).with_suffix(".md").read_text(encoding="utf-8")
    assert "| lr | batch_size | size |" in head


def test_the_page_in_chinese(folder: Path, tmp_path: Path) -> None:
    text = write_search_report(folder, out=tmp_path / "out", lang="zh").read_text(encoding="utf-8")
    assert 'lang="zh' in text and "最好的试验" in text and "Best trials" not in text


def test_learning_rate_and_batch_size_are_drawn_unasked(folder: Path) -> None:
    assert (write_search_report(folder).parent / "heat_lr_batch_size.png").is_file()


@pytest.mark.parametrize("pair", [("lr",), ("lr", "gamma"), ("lr", "lr")])
def test_a_pair_that_cannot_be_drawn(pair: tuple[str, ...], folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot be drawn; give two of lr, batch_size, schedule"):
        write_search_report(folder, [pair])


def test_no_search_no_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no folder of a search"):
        write_search_report(tmp_path)
