"""A run on another folder of labelled images: its own files, and its own test stays as it was."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from finetune101.cli.main import main
from finetune101.config import TrainConfig
from finetune101.data.layouts import NOT_IMAGES
from finetune101.evaluation.evaluate import evaluate
from finetune101.run import Run
from finetune101.training.job import prepare
from finetune101.training.loop import fit


@pytest.fixture
def run(small: TrainConfig, tiny_data: Path, tmp_path: Path) -> Run:
    """A tested run of one epoch; its images are a copy."""
    shutil.copytree(tiny_data, tmp_path / "images")
    data = dataclasses.replace(small.data, root=str(tmp_path / "images"))
    job = prepare(dataclasses.replace(small, data=data, optim=dataclasses.replace(small.optim, epochs=1)))
    list(fit(job, quiet=True))
    evaluate(job.run)
    return job.run


def folder_of(run: Run, tmp_path: Path, name: str = "photos") -> Path:
    """One training image in another size, one new picture, an unreadable one, and one of another class."""
    trained = next(path for path in run.read_json("split.json")["subsets"]["train"] if path.startswith("ball/"))
    other = tmp_path / name
    for sub in ("ball", "box/deeper", "cat"):
        (other / sub).mkdir(parents=True)
    with Image.open(tmp_path / "images" / trained) as image:
        image.resize((80, 60)).save(other / "ball" / "again.png")
    Image.effect_noise((40, 40), 90).save(other / "box" / "deeper" / "noise.png")
    (other / "box" / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (40, 40)).save(other / "cat" / "cat.png")
    (other / "ball" / "notes.txt").write_text("no image by its name")
    (other / "stripes").mkdir()  # a class without an image
    return other


def test_another_folder_has_its_own_files(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {name: (run.path / name).read_bytes() for name in ("test.json", "predictions.csv")}
    other = folder_of(run, tmp_path)
    assert main(["evaluate", str(run.path), "--data", str(other), "--as-test"]) == 0
    out = capsys.readouterr().out
    result = json.loads((run.path / "test_photos.json").read_text())
    assert (
        result["n"] == 2
        and result["unknown_classes"] == {"cat": 1}
        and list(result["unreadable"]) == ["box/broken.png"]
    )
    assert result["classes_without_images"] == ["stripes"] and result["left_out"] == {NOT_IMAGES: 1}
    assert result["near_duplicates"] == {"n": 1} and result["without_duplicates"]["n"] == 1
    assert "cat" in out and "stripes" in out and "broken.png" in out and "1 of 2" in out
    assert f"1 {NOT_IMAGES}" in out
    with open(run.path / "predictions_photos.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["path"], row["label"]) for row in rows] == [
        ("ball/again.png", "ball"),
        ("box/deeper/noise.png", "box"),
    ]
    assert own == {name: (run.path / name).read_bytes() for name in own}


def test_two_folders_of_one_name_are_kept_apart(run: Run, tmp_path: Path) -> None:
    first, second = folder_of(run, tmp_path), folder_of(run, tmp_path, "more/photos")
    for folder in (first, second, first):
        assert main(["evaluate", str(run.path), "--data", str(folder), "--as-test"]) == 0
    written = sorted(json.loads(file.read_text())["data"] for file in run.path.glob("test_*.json"))
    assert written == sorted(map(str, (first, second)))


def test_without_the_training_images_that_is_said(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder_of(run, tmp_path)
    shutil.rmtree(tmp_path / "images")
    assert main(["evaluate", str(run.path), "--data", str(other), "--as-test"]) == 0
    assert "not known" in capsys.readouterr().out
    result = json.loads((run.path / "test_photos.json").read_text())
    assert result["near_duplicates"]["n"] is None and "without_duplicates" not in result


def test_what_cannot_be_scored_is_refused(run: Run, tmp_path: Path) -> None:
    before = sorted(run.path.iterdir())
    (tmp_path / "dogs" / "dog").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "dogs" / "dog" / "1.png")
    for words in ([], ["--data", str(tmp_path / "dogs")], ["--data", str(tmp_path / "missing")]):
        assert main(["evaluate", str(run.path), "--as-test", *words]) == 2
    assert sorted(run.path.iterdir()) == before


def test_images_behind_links_and_of_every_subset_are_scored(run: Run, tmp_path: Path) -> None:
    for subset, name in (("train", "ball"), ("test", "box")):  # a class that the training folder lacks is scored too
        (tmp_path / "split" / subset).mkdir(parents=True)
        (tmp_path / "split" / subset / name).symlink_to(tmp_path / "images" / name)
    assert main(["evaluate", str(run.path), "--data", str(tmp_path / "split"), "--as-test"]) == 0
    result = json.loads((run.path / "test_split.json").read_text())
    assert result["n"] == 24 and result["classes_without_images"] == ["stripes"] and not result["left_out"]


def test_one_class_is_enough(run: Run, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "images" / "ball", tmp_path / "balls" / "ball")
    assert main(["evaluate", str(run.path), "--data", str(tmp_path / "balls"), "--as-test"]) == 0
    assert json.loads((run.path / "test_balls.json").read_text())["n"] == 12
