"""Comparisons of run directories written to disk, against numbers worked out by hand."""

import csv
import json
import shutil

import pytest

from finetune101.analysis import compare
from finetune101.config import ModelConfig, TrainConfig, to_dict
from finetune101.data.splits import Manifest
from finetune101.evaluation import metrics
from finetune101.runs import Run

CLASSES = ("ant", "bee")


def write_run(path, wrong, *, test=200, seed=42, name="efficientnet_lite0", source="random (seed 0)"):
    """An evaluated run whose test images with a number in ``wrong`` are taken for the other class."""
    subsets = {
        "train": tuple(f"{c}/train_{i}.jpg" for c in CLASSES for i in range(3)),
        "val": (),
        "test": tuple(f"{CLASSES[i % 4 == 0]}/{i:04d}.jpg" for i in range(test)),
    }
    manifest = Manifest(
        protocol="reference", seed=seed, options={}, classes=CLASSES, content_hash=f"sha256:{seed}", subsets=subsets
    )
    run = Run(path)
    path.mkdir(parents=True)
    run.write_json("config.json", to_dict(TrainConfig(exp=path.name, model=ModelConfig(name=name))))
    run.write_json("split.json", manifest.to_json())
    run.write_json("env.json", {"model": {"init_source": source, "init_hash": "sha256:0123456789abcdef"}})
    correct = test - len(wrong)
    run.write_json("test.json", {"n": test, "correct": correct, "manifest_hash": manifest.hash(), "epoch": 7})
    with open(path / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "prediction", "confidence"])
        for i, image in enumerate(subsets["test"]):
            label = image.split("/")[0]
            writer.writerow([image, label, CLASSES[1 - CLASSES.index(label)] if i in wrong else label, "0.9"])
    return run


@pytest.fixture
def arms(tmp_path):
    good = write_run(tmp_path / "fine tuned", {1, 2, 3}, source="package weights 0.1.0 sha256:aa")
    poor = write_run(tmp_path / "scratch", set(range(2, 42)))
    return good, poor


def test_numbers_by_hand(arms):
    c = compare.compare(*arms)
    assert (c.n, c.a.correct, c.b.correct) == (200, 197, 160)
    assert (c.a.top1, c.b.top1) == (98.5, 80.0)
    # Images 2 and 3 are wrong in both runs, image 1 in the first only, 4 to 41 in the second only.
    assert (c.only_a, c.only_b) == (38, 1)
    assert c.difference == pytest.approx(18.5)
    assert c.difference_interval[0] < 18.5 < c.difference_interval[1]
    assert c.mcnemar_p == pytest.approx(2 * (1 + 39) / 2**39)
    assert c.a.top1_interval == metrics.wilson(197, 200)
    # Of 50 bees the second run has 4, 8, ..., 40 wrong; of 150 ants the other 30.
    assert c.b.mean_per_class == pytest.approx((100 * 40 / 50 + 100 * 120 / 150) / 2)
    assert c.a.mean_per_class == pytest.approx((100 + 100 * 147 / 150) / 2)


def test_text_says_everything(arms):
    words = compare.text(compare.compare(*arms))
    for expected in (
        "same 200 images",
        "98.50 % (95.68 to 99.49)",
        "80.00 %",
        "+18.50 points (+",
        "Only fine tuned is right: 38 images. Only scratch is right: 1 image.",
        "p = 1.5e-10",
        "fine tuned is better",
        "package weights 0.1.0 sha256:aa",
        "random (seed 0)",
        "sha256:0123456789ab",
    ):
        assert expected in words
    assert max(map(len, words.splitlines())) <= 100
    assert "networks differ" not in words


def test_swapping_the_runs_swaps_the_sign(arms):
    there, back = compare.compare(*arms), compare.compare(*reversed(arms))
    assert back.difference == -there.difference
    assert back.mcnemar_p == there.mcnemar_p
    assert "-18.50 points (-" in compare.text(back)
    assert "fine tuned is better" in compare.text(back)


def test_a_small_difference_is_not_called_one(tmp_path):
    c = compare.compare(write_run(tmp_path / "a", {1, 2, 3}), write_run(tmp_path / "b", {3, 4}, name="resnet18"))
    assert c.mcnemar_p == 1.0
    assert "do not tell the two apart" in compare.text(c)
    assert "networks differ" in compare.text(c)


def test_a_run_equals_its_copy(arms, tmp_path):
    copy = shutil.copytree(arms[0].path, tmp_path / "copy")
    with pytest.raises(ValueError, match="with itself"):
        compare.compare(arms[0], arms[0])
    c = compare.compare(arms[0], Run(copy))
    assert (c.difference, c.difference_interval, c.mcnemar_p) == (0.0, (0.0, 0.0), 1.0)


def test_to_json_is_plain(arms):
    values = compare.to_json(compare.compare(*arms))
    assert json.loads(json.dumps(values)) == values
    assert values["a"]["top1"] == 98.5
    assert values["difference_interval"][0] < 18.5


def test_runs_of_one_name_are_told_apart(tmp_path):
    c = compare.compare(write_run(tmp_path / "x" / "same", {1}), write_run(tmp_path / "y" / "same", {2}))
    assert c.a.name.endswith("x/same")
    assert c.b.name.endswith("y/same")


def test_other_splits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="split differently; train one of them again with --split"):
        compare.compare(write_run(tmp_path / "a", {1}), write_run(tmp_path / "b", {1}, seed=1))


def test_a_run_without_a_test_is_refused(arms):
    (arms[1].path / "predictions.csv").unlink()
    with pytest.raises(ValueError, match="finetune101 evaluate"):
        compare.compare(*arms)


@pytest.mark.parametrize("damage", ["path,label\n", "", "path,label,prediction\nant/1.jpg,ant\n", 'path,label,"\n'])
def test_broken_predictions_are_refused(arms, damage):
    (arms[1].path / "predictions.csv").write_text(damage)
    with pytest.raises(ValueError, match="finetune101 evaluate"):
        compare.compare(*arms)


def test_predictions_that_are_not_those_of_test_json_are_refused(arms):
    file = arms[1].path / "predictions.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], *(line.replace(",ant,ant,", ",ant,bee,") for line in lines[1:])]) + "\n")
    with pytest.raises(ValueError, match="does not belong to its predictions"):
        compare.compare(*arms)


def test_other_test_images_are_refused(arms):
    file = arms[1].path / "predictions.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(ValueError, match="different images"):
        compare.compare(*arms)
