"""Scores for images unlike the training images, compared on Caltech-101: which to keep, and how good it is.

``python benchmarks/unlike.py RUN --data FOLDER`` (RUN: a tested run of the reference split, or a released network)
writes results/unlike/NAME.json (every method) and NAME.csv (the score of every test and background image by the method
that finetune101 uses). Each method is fitted on features of training images.

- To choose: validation images against drawn pictures, clutter and plain noise, all made here; and, with frozen
  ImageNet features and a new linear output layer, validation images against the images of every fifth class, which are
  left out of the fit (RUN "held_out": writes results/unlike/held_out.json).
- To test the choice: test images against BACKGROUND_Google, which nothing was fitted or chosen on.

``auroc``: share of pairs (an unlike image, a known one) in which the unlike image has the higher score. ``fpr95``: the
share of the unlike images that is kept by the threshold that keeps 95 % of the known images.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from recorded import record

from finetune101.config import DataConfig, ModelConfig, SystemConfig
from finetune101.data import cache, splits
from finetune101.data.images import Index, find_data, images_in, index_images
from finetune101.demo.dataset import clutter_picture, draw
from finetune101.deploy.network import load
from finetune101.evaluation.features import FeatureExtractor
from finetune101.evaluation.metrics import auroc, false_positive_rate
from finetune101.evaluation.unlike import directions, fit_unlike
from finetune101.files import sha256
from finetune101.machine import detect
from finetune101.models.build import build_network
from finetune101.training.probe import features as frozen_features
from finetune101.training.probe import solve

RESULTS = Path(__file__).resolve().parent.parent / "results" / "unlike"
Array = NDArray[np.float64]
Score = Callable[[Array, Array], Array]
"""Features (N, D), logits (N, classes) -> (N,), higher is more unlike."""
SHOWS_A_CLASS = (
    46, 95, 96, 97, 100, 104, 107, 112, 143, 154, 175, 237, 268, 269, 284, 300, 321, 334, 357, 363, 405,
)  # fmt: skip
"""Numbers of the background images that show one of the 101 classes, by eye: electric_guitar, helicopter, ketch, ..."""
CLOSE = ("cougar_body", "crocodile_head")  # left out of the fit, but the same animal as a class that is not
KEPT = "nearest class mean and maximum probability"
MADE = 120  # backgrounds, and noise images


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Features (N, D), logits (N, classes) and labels (N,) of some images."""

    features: Array
    logits: Array
    labels: NDArray[np.int64]


def softmax(logits: Array) -> Array:
    """(N, C) -> probabilities."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def energy(logits: Array) -> Array:
    """-log of the sum of exponentials (Liu et al., 2020)."""
    top = logits.max(1)
    return np.asarray(-top - np.log(np.exp(logits - top[:, None]).sum(1)))


def neighbours(bank: Array, k: int) -> Score:
    """1 - cosine to the k-th nearest row of ``bank`` (Sun et al., 2022)."""
    return lambda features, _: 1 - np.partition(directions(features) @ bank.T, -k, axis=1)[:, -k]


def mahalanobis(train: Outputs, relative: bool, normalised: bool, ridge: float = 1e-2) -> Score:
    """Distance to the nearest class mean under one covariance (Lee et al., 2018), or less that of all (Ren et al.)."""
    change = directions if normalised else np.asarray
    rows = change(train.features)
    means = np.stack([rows[train.labels == one].mean(0) for one in np.unique(train.labels)])
    every = rows.mean(0)

    def root(centred: Array) -> Array:
        covariance = centred.T @ centred / len(centred)
        covariance += ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        return np.asarray(np.linalg.cholesky(np.linalg.inv(covariance)))

    within, around = root(rows - means[np.searchsorted(np.unique(train.labels), train.labels)]), root(rows - every)
    centres = means @ within

    def score(features: Array, _: Array) -> Array:
        x = change(features)
        points = x @ within
        distances = ((points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)).min(1)
        return np.asarray(distances - (((x - every) @ around) ** 2).sum(1) if relative else distances)

    return score


def vim(train: Outputs, weight: Array, bias: Array, kept: int = 256) -> Score:
    """Virtual-logit matching (Wang et al., 2022): the part of a feature outside of the main space, and the energy."""
    origin = -np.linalg.pinv(weight) @ bias
    _, vectors = np.linalg.eigh((train.features - origin).T @ (train.features - origin))
    rest = vectors[:, :-kept]

    def outside(features: Array) -> Array:
        return np.asarray(np.linalg.norm((features - origin) @ rest, axis=1))

    scale = train.logits.max(1).mean() / outside(train.features).mean()
    return lambda features, logits: scale * outside(features) + energy(logits)


def methods(train: Outputs, weight: Array, bias: Array) -> dict[str, tuple[Score, float]]:
    """Name -> (score, megabytes of its parameters in half precision; 0 for what the network has already)."""
    rows, classes = directions(train.features), np.unique(train.labels)
    width = rows.shape[1]
    several = {
        count: np.concatenate([np.flatnonzero(train.labels == one)[:count] for one in classes]) for count in (1, 10)
    }
    centre = rows.mean(0)
    main = np.linalg.svd(rows - centre, full_matrices=False)[2][:128]
    small = directions((rows - centre) @ main.T)
    means = fit_unlike(train.features, train.labels, train.features, train.logits)
    table: dict[str, tuple[Score, int]] = {
        "maximum probability": (lambda _, logits: -softmax(logits).max(1), 0),
        "maximum logit": (lambda _, logits: -logits.max(1), 0),
        "energy": (lambda _, logits: energy(logits), 0),
        "5th neighbour": (neighbours(rows, 5), rows.size),
        "50th neighbour": (neighbours(rows, 50), rows.size),
        "nearest of 10 images per class": (neighbours(rows[several[10]], 1), rows[several[10]].size),
        "5th neighbour, 128 components": (
            lambda features, _: neighbours(small, 5)((directions(features) - centre) @ main.T, _),
            small.size + main.size,
        ),
        "Mahalanobis": (mahalanobis(train, False, False), width * width),
        "relative Mahalanobis": (mahalanobis(train, True, False), 2 * width * width),
        "Mahalanobis, normalised": (mahalanobis(train, False, True), width * width),
        "relative Mahalanobis, normalised": (mahalanobis(train, True, True), 2 * width * width),
        "ViM": (vim(train, weight, bias), width * width),
        "nearest class mean": (neighbours(directions(means.means), 1), means.means.size),
        KEPT: (means.score, means.means.size),
    }
    return {name: (score, round(2 * size / 1e6, 2)) for name, (score, size) in table.items()}


def compared(
    train: Outputs, weight: Array, bias: Array, pairs: dict[str, tuple[Outputs, Outputs]]
) -> dict[str, dict[str, Any]]:
    """Method -> its megabytes, and the ``auroc`` and ``fpr95`` of each of ``pairs`` (unlike images, known images)."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (score, megabytes) in methods(train, weight, bias).items():
        rows[name] = {"megabytes": megabytes}
        for pair, (unlike, known) in pairs.items():
            high, low = (score(one.features, one.logits) for one in (unlike, known))
            numbers = {"auroc": auroc(high, low), "fpr95": false_positive_rate(high, low)}
            rows[name][pair] = {key: round(value, 4) for key, value in numbers.items()}
        print(name, rows[name], flush=True)
    return rows


def folder_outputs(extract: FeatureExtractor, folder: Path) -> tuple[list[str], Outputs]:
    """Names and outputs of the images directly in ``folder``."""
    names = [path.name for path in images_in(folder)]
    index = Index(folder, (), tuple(names), {name: sha256(folder / name) for name in names})
    features, logits = extract.of_images(cache.open_images(index, extract.network.preprocessing), names)
    return names, Outputs(features.double().numpy(), logits.double().numpy(), np.zeros(len(names), np.int64))


def made_images(folder: Path, seed: int = 0) -> list[Path]:
    """Draws three folders of images that show none of Caltech-101's photographs: drawn, clutter and noise."""
    rng = np.random.default_rng(seed)
    folders = [folder / name for name in ("drawn", "clutter", "noise")]
    for one in folders:
        one.mkdir()
    classes = draw(folder / "classes", 12, 20, 5)
    for file in classes.rglob("*.jpg"):
        file.rename(folders[0] / f"{file.parent.name}_{file.name}")
    for i in range(MADE):
        clutter_picture((224, 224), rng).save(folders[1] / f"{i:03}.png")
        Image.fromarray(plain(i, rng)).save(folders[2] / f"{i:03}.png")
    return folders


def plain(number: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """White noise, smooth noise, one colour, or a change from one colour to another: uint8 (224, 224, 3)."""
    if number % 4 == 0:
        return rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
    if number % 4 == 1:
        cells = Image.fromarray(rng.integers(0, 256, (*rng.integers(3, 30, 2), 3), dtype=np.uint8))
        return np.asarray(cells.resize((224, 224), Image.Resampling.BICUBIC))
    first, second = rng.integers(0, 256, (2, 3))
    share = np.linspace(0, 1, 224)[:, None, None] * (number % 4 == 3)
    return np.broadcast_to((1 - share) * first + share * second, (224, 224, 3)).astype(np.uint8)


def measure(run: str, data: str | None) -> None:
    """Compares the methods on a trained network and writes its JSON and CSV."""
    network = load(run).trained
    index = index_images(find_data(data))
    manifest = splits.make_split(index, DataConfig())
    extract, images = FeatureExtractor(network), cache.open_images(index, network.preprocessing)
    parts = {}
    for subset in ("train", "val", "test"):
        features, logits = extract.of_images(images, manifest.subsets[subset])
        labels = np.array(manifest.labels(subset))
        parts[subset] = Outputs(features.double().numpy(), logits.double().numpy(), labels)
    names, background = folder_outputs(extract, index.root / "BACKGROUND_Google")
    alone = np.array([int(name[6:10]) not in SHOWS_A_CLASS for name in names])
    without = Outputs(background.features[alone], background.logits[alone], background.labels[alone])
    with tempfile.TemporaryDirectory() as folder:
        made = {one.name: folder_outputs(extract, one)[1] for one in made_images(Path(folder))}
    pairs = {name: (outputs, parts["val"]) for name, outputs in made.items()}
    pairs |= {"background": (background, parts["test"]), "background_of_no_class": (without, parts["test"])}
    layer = network.model.get_submodule(network.head)
    weight, bias = (value.detach().double().numpy() for value in layer.parameters())
    name = Path(run).name
    counts = {"background": len(names), "background_of_no_class": int(alone.sum())}
    counts |= {key: len(one.labels) for key, one in (parts | made).items()}
    unlike = fit_unlike(parts["train"].features, parts["train"].labels, parts["val"].features, parts["val"].logits)
    scores = {key: unlike.score(one.features, one.logits) for key, one in (parts | {"background": background}).items()}
    rejected = {key: round(float(unlike.is_unlike(scores[key]).mean()), 4) for key in ("val", "test", "background")}
    result = {"network": name, "split": manifest.hash(), "images": counts, "threshold": unlike.threshold}
    result |= {"rejected": rejected, "methods": compared(parts["train"], weight, bias, pairs)}
    record(result, RESULTS / f"{name}.json")
    with open(RESULTS / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["subset", "path", "score"])
        for key, paths in (("test", manifest.subsets["test"]), ("background", names)):
            writer.writerows((key, path, f"{score:.6f}") for path, score in zip(paths, scores[key], strict=True))


def measure_held_out(data: str | None, penalty: float = 0.3) -> None:
    """Compares the methods on frozen ImageNet features, with every fifth class as the unlike images."""
    index = index_images(find_data(data))
    manifest = splits.make_split(index, DataConfig())
    built = build_network(ModelConfig(name="efficientnet_lite0", size=256, cache_size=288), len(manifest.classes), 0)
    paths = [path for subset in ("train", "val") for path in manifest.subsets[subset]]
    labels = np.array([label for subset in ("train", "val") for label in manifest.labels(subset)])
    images = cache.open_images(index, built.preprocessing)
    x = frozen_features(built, images, paths, detect(SystemConfig())).values.double().numpy()
    left_out = np.arange(len(manifest.classes)) % 5 == 4
    close = np.array([name in CLOSE for name in manifest.classes])
    numbers = np.cumsum(~left_out) - 1
    kept, train = ~left_out[labels], np.arange(len(paths)) < len(manifest.subsets["train"])
    fitted = x[train & kept]
    mean, std = fitted.mean(0), fitted.std(0).clip(1e-6)
    standard = torch.from_numpy((fitted - mean) / std).float()
    solution = solve(standard, torch.from_numpy(numbers[labels[train & kept]]), int((~left_out).sum()), penalty)
    weight = solution[:-1].double().numpy().T / std
    bias = solution[-1].double().numpy() - weight @ mean

    def outputs(chosen: NDArray[np.bool_]) -> Outputs:
        return Outputs(x[chosen], x[chosen] @ weight.T + bias, numbers[labels[chosen]])

    unlike, known = outputs(~kept & ~close[labels]), outputs(~train & kept)
    rows = compared(outputs(train & kept), weight, bias, {"held_out": (unlike, known)})
    counts = {"train": int((train & kept).sum()), "val": len(known.labels), "held_out": len(unlike.labels)}
    names = [name for name, out in zip(manifest.classes, left_out, strict=True) if out and name not in CLOSE]
    result = {"network": "frozen efficientnet_lite0", "split": manifest.hash(), "images": counts, "classes": names}
    record({**result, "methods": rows}, RESULTS / "held_out.json")


def write_table() -> None:
    """results/unlike/table.md of the JSON files there; numbers of several networks are means."""
    files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    sets = ("held_out", "drawn", "clutter", "noise", "background", "background_of_no_class")
    networks = ", ".join(one["network"] for one in files)
    lines = [
        "# Scores for pictures unlike the training pictures",
        "",
        f"Made by `python benchmarks/unlike.py table`. Networks: {networks}. AUROC / share of the unlike pictures",
        "that a threshold keeps that keeps 95 % of the known ones; held_out is of the frozen network, the rest are",
        "means over the others.",
        "",
        f"| score | MB | {' | '.join(sets)} |",
        "|---" * (2 + len(sets)) + "|",
    ]
    for method in files[0]["methods"]:
        rows = [one["methods"][method] for one in files]
        cells = []
        for name in sets:
            values = [row[name] for row in rows if name in row]
            auroc, rate = (np.mean([value[key] for value in values]) for key in ("auroc", "fpr95"))
            cells.append(f"{auroc:.3f} / {100 * rate:.0f} %")
        size = max(row["megabytes"] for row in rows)
        lines.append(f"| {method} | {size:.2f} | {' | '.join(cells)} |")
    (RESULTS / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--data")
    arguments = parser.parse_args()
    if arguments.run == "table":
        write_table()
    elif arguments.run == "held_out":
        measure_held_out(arguments.data)
    else:
        measure(arguments.run, arguments.data)


if __name__ == "__main__":
    main()
