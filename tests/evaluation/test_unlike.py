"""Images unlike the training images: the score, its threshold, its file, and what prediction says of it."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune101 import api
from finetune101.cli.main import main
from finetune101.config import TrainConfig
from finetune101.demo.dataset import clutter_picture, draw
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import open_network
from finetune101.evaluation.metrics import auroc, false_positive_rate
from finetune101.evaluation.unlike import (
    FEWEST,
    PROBABILITY,
    UNLIKE,
    Unlike,
    fit_unlike,
    no_unlike_reason,
    parsed_unlike,
    read_unlike,
    unlike_bytes,
    write_unlike,
)
from finetune101.run import Run

RNG = np.random.default_rng(0)


def slow_score(means: np.ndarray, features: np.ndarray, logits: np.ndarray) -> list[float]:
    """The definition of the score, a number at a time."""
    result = []
    for row, outputs in zip(features, logits, strict=True):
        length = math.sqrt(sum(x * x for x in row))
        best = max(sum(a * b for a, b in zip(mean, row, strict=True)) / length for mean in means)
        powers = [math.exp(value - max(outputs)) for value in outputs]
        result.append(1 - best + PROBABILITY * (1 - max(powers) / sum(powers)))
    return result


@pytest.fixture(scope="module")
def fitted() -> tuple[Unlike, np.ndarray, np.ndarray, np.ndarray]:
    """A score of 3 classes of 8 features; its validation features and logits, and the training features."""
    centres, labels = RNG.normal(0, 1, (3, 8)), np.arange(60) % 3
    train, val = (centres[labels] + RNG.normal(0, 0.3, (60, 8)) for _ in range(2))
    logits = val @ centres.T
    return fit_unlike(train, labels, val, logits), val, logits, train


def test_the_score_is_its_definition(fitted: tuple[Unlike, np.ndarray, np.ndarray, np.ndarray]) -> None:
    unlike, val, logits, train = fitted
    expected = slow_score(unlike.means.astype(float), val, logits)
    np.testing.assert_allclose(unlike.score(val, logits), expected, atol=1e-12)
    for one in range(3):
        rows = [row / math.sqrt(sum(row**2)) for row in train[one::3]]
        mean = sum(rows) / len(rows)
        np.testing.assert_allclose(unlike.means[one], mean / np.linalg.norm(mean), atol=1e-3)
    calibrated = np.exp(logits / 1.7) / np.exp(logits / 1.7).sum(1, keepdims=True)
    np.testing.assert_allclose(unlike.score(3 * val, 1.7 * np.log(calibrated)), expected, atol=1e-9)


def test_the_threshold_keeps_95_percent_of_the_validation_images(
    fitted: tuple[Unlike, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    unlike, val, logits, _ = fitted
    scores = unlike.score(val, logits)
    assert unlike.images == 60 and (~unlike.is_unlike(scores)).sum() == math.ceil(0.95 * 60)
    assert unlike.threshold in scores
    with pytest.raises(ValueError, match="no validation images"):
        fit_unlike(val, np.arange(60) % 3, val[:0], logits[:0])


def test_bounds_and_features_of_another_network(fitted: tuple[Unlike, np.ndarray, np.ndarray, np.ndarray]) -> None:
    unlike = fitted[0]
    odd = np.stack([np.zeros(8), np.full(8, 1e30), -unlike.means[0].astype(float), unlike.means[1].astype(float)])
    logits = np.array([[0, 0, 0], [1e30, 0, 0], [0, 0, 0], [-1e30, 50, 0]])
    scores = unlike.score(odd, logits)
    assert np.isfinite(scores).all() and (scores > -0.01).all() and (scores < 2.01 + PROBABILITY).all()
    assert scores[0] == pytest.approx(1 + PROBABILITY * 2 / 3) and scores[3] == pytest.approx(0, abs=0.01)
    with pytest.raises(ValueError, match="shape"):
        unlike.score(np.zeros((1, 9)), np.zeros((1, 3)))


def test_what_is_written_is_read_and_damage_is_one_sentence(
    fitted: tuple[Unlike, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    unlike = fitted[0]
    whole = unlike_bytes(unlike, "ab" * 32)
    again, weights = parsed_unlike(whole, "x")
    assert weights == "ab" * 32 and (again.threshold, again.images) == (unlike.threshold, unlike.images)
    assert np.array_equal(again.means, unlike.means)
    bad = [whole[:100], whole[:-1], b"", b"\xff" * 300, unlike_bytes(replace(unlike, threshold=9.0), "a")]
    bad += [unlike_bytes(replace(unlike, means=unlike.means.astype(np.float32)), "a")]  # type: ignore[arg-type]
    bad += [unlike_bytes(replace(unlike, means=unlike.means * np.float16("nan")), "a")]
    bad += [unlike_bytes(replace(unlike, threshold=math.nan), "a")]
    for content in bad:
        with pytest.raises(Refused, match="is damaged") as refused:
            parsed_unlike(content, "unlike.safetensors")
        assert "\n" not in str(refused.value)


def test_a_class_without_training_images_has_no_mean(
    fitted: tuple[Unlike, np.ndarray, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    _, val, logits, train = fitted
    labels = np.arange(60) % 3
    unlike = fit_unlike(train[labels != 1], labels[labels != 1], val, logits)
    write_unlike(tmp_path / UNLIKE, unlike, "a")
    again, reason = read_unlike(tmp_path / UNLIKE, "a", width=8, classes=3)
    assert again and not reason and again.means.shape == (2, 8)
    assert again.score(val, logits)[labels == 1].mean() > again.score(val, logits)[labels != 1].mean() + 0.1
    for width, classes in ((7, 3), (8, 1)):
        with pytest.raises(Refused, match="does not fit its network"):
            read_unlike(tmp_path / UNLIKE, "a", width, classes)


def test_the_area_and_the_rate_are_their_definitions() -> None:
    high, low = RNG.integers(0, 12, 40), RNG.integers(0, 9, 30)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in high for b in low]
    assert auroc(high, low) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc([2, 3], [0, 1]) == 1 and auroc([0], [1]) == 0 and auroc([1], [1]) == 0.5
    limit = sorted(low)[math.ceil(0.95 * 30) - 1]
    assert false_positive_rate(high, low) == pytest.approx(sum(a <= limit for a in high) / 40)


def test_every_reason_for_no_score() -> None:
    assert not no_unlike_reason(FEWEST, "train")
    assert "too few" in no_unlike_reason(FEWEST - 1, "train")
    assert "no validation images" in no_unlike_reason(0, "train")
    assert "trained on its validation images too" in no_unlike_reason(500, "train+val")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on drawn balls of two colours that has a score, and pictures beside it."""
    folder = tmp_path_factory.mktemp("balls")
    rng = np.random.default_rng(1)
    for name, colour in {"red": (220, 30, 30), "blue": (30, 30, 220)}.items():
        (folder / "data" / name).mkdir(parents=True)
        for i in range(110):
            noise = rng.integers(-25, 25, (40, 40, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{i:03}.png")
    clutter_picture((40, 40), rng).save(folder / "clutter.png")
    words = ["--exp", "balls", "--runs", str(folder / "runs"), "--data", str(folder / "data"), "--threads", "1"]
    words += ["--no-pretrain", "--model", "squeezenet1_1", "--size", "32", "--batch-size", "16", "--epochs", "1"]
    assert main(["train", *words]) == 0
    return Run(folder / "runs" / "balls")


def predicted(run: Run, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """What ``predict`` prints of all pictures beside the data: standard output and error."""
    capsys.readouterr()
    assert main(["predict", str(run.path), str(run.path.parent.parent / "clutter.png"), *words]) == 0
    streams = capsys.readouterr()
    return streams.out, streams.err


def marking(run: Run, threshold: float) -> None:
    """Puts another threshold into the score of ``run``."""
    network = open_network(run)
    assert network.unlike
    (run.path / UNLIKE).write_bytes(unlike_bytes(replace(network.unlike, threshold=threshold), network.checkpoint_hash))


def test_train_then_predict_marks_what_is_unlike(drawn: Run, capsys: pytest.CaptureFixture[str]) -> None:
    unlike = open_network(drawn).unlike
    assert unlike and unlike.images == 22 and unlike.means.shape == (2, 512)
    data = drawn.path.parent.parent / "data"
    split = drawn.read_json("split.json")["subsets"]["val"]
    labels = api.predict(drawn, [data / path for path in split])
    assert isinstance(labels, list) and sum(not one.unlike for one in labels) >= math.ceil(0.95 * 22) - 1
    marking(drawn, 0.0)
    text, errors = predicted(drawn, capsys)
    assert "unlike the training pictures\n" in text and "%" in text and "not marked" not in errors
    assert "%" not in predicted(drawn, capsys, "--reject")[0]
    row = next(csv.DictReader(io.StringIO(predicted(drawn, capsys, "--csv")[0])))
    assert row["unlike"] == "true" and float(row["unlike_score"]) > 0 and row["class_1"]
    row = json.loads(predicted(drawn, capsys, "--json", "--reject")[0])["predictions"][0]
    assert row["unlike"] is True and row["unlike_score"] > 0 and row["classes"] == []
    marking(drawn, 2.5)
    text, _ = predicted(drawn, capsys, "--reject")
    assert "unlike the" not in text and "%" in text


def test_rejected_images_get_a_folder_of_their_own(
    drawn: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marking(drawn, 0.0)
    text, _ = predicted(drawn, capsys, "--reject", "--into", str(tmp_path / "sorted"))
    assert (tmp_path / "sorted" / "unlike" / "clutter.png").is_file() and "1 into unlike" in text


def test_an_exported_file_has_the_same_score(drawn: Run, tmp_path: Path) -> None:
    marking(drawn, 0.4)
    network, picture = api.load(drawn), drawn.path.parent.parent / "clutter.png"
    network.export(out=tmp_path / "balls.onnx", format="onnx")
    ours = network.predict(picture)
    theirs = pytest.importorskip("finetune101.deploy.onnx_network").OnnxNetwork(tmp_path / "balls.onnx")
    exported = theirs.predict(picture)
    assert exported.unlike == ours.unlike  # type: ignore[union-attr]
    assert exported.unlike_score == pytest.approx(ours.unlike_score, abs=0.01)  # type: ignore[union-attr]


def test_evaluate_gives_an_older_run_its_score(drawn: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (drawn.path / UNLIKE).unlink()
    text, errors = predicted(drawn, capsys)
    assert "unlike the" not in text and "evaluate the run first" in errors
    assert main(["predict", str(drawn.path), str(drawn.path), "--reject"]) == 2
    assert "evaluate the run first" in capsys.readouterr().err
    assert main(["evaluate", str(drawn.path)]) == 0
    assert open_network(drawn).unlike
    (drawn.path / UNLIKE).write_bytes(b"damaged")
    assert main(["predict", str(drawn.path), str(drawn.path.parent.parent / "clutter.png")]) == 2
    assert "is damaged" in capsys.readouterr().err
    (drawn.path / UNLIKE).write_bytes(unlike_bytes(Unlike(np.ones((2, 512), np.float16), 0.1), "other"))
    assert "other weights; evaluate the run again" in predicted(drawn, capsys)[1]


def test_a_run_that_was_trained_on_its_validation_images_says_so(small: TrainConfig) -> None:
    run = api.run_training(replace(small, data=replace(small.data, fit_on="train+val")))
    network = open_network(run)
    assert network.unlike is None and "validation images too" in network.unlike_reason and not run.has(UNLIKE)


@pytest.mark.caltech101
def test_the_released_network_marks_noise_and_drawings(caltech101: Path, tmp_path: Path) -> None:
    network = api.load("released_finetune")
    assert network.trained.unlike
    draw(tmp_path, 3, 4, 9)
    drawings = [network.predict(file) for file in sorted(tmp_path.rglob("*.jpg"))]
    noise = network.predict(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    photos = [network.predict(caltech101 / name / "image_0001.jpg") for name in ("airplanes", "watch", "panda")]
    assert noise.unlike and sum(bool(one.unlike) for one in drawings) >= 8  # type: ignore[union-attr]
    assert not any(one.unlike for one in photos)  # type: ignore[union-attr]
