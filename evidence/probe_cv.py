"""A linear output layer on features of several networks, sizes and stages, chosen by ten-fold cross-validation.

python evidence/probe_cv.py choose IMAGES          table of what was tried and the choice: results/probe_cv/choice.json
python evidence/probe_cv.py test IMAGES            the choice, trained on train + val and tested, once

Blocks of features: the last layer and the mean of the last stage before it (Head2Toe: Evci et al., 2022), at one size,
plain or as the mean over an image and its mirror image. Each is standardised and weighted: a weight w of a block is an
L2 penalty of l2 / w squared on it. The folds hold the train and validation images of the reference split (6,907, so a
standard error of .2 points); the test images are not looked at until ``test``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from finetune101.config import DataConfig, SystemConfig, to_dict
from finetune101.data import cache
from finetune101.data.images import Index, index_images
from finetune101.data.splits import Manifest, make_split
from finetune101.evaluation.evaluate import calibrations, prediction_rows, scores
from finetune101.evaluation.features import kept_outputs
from finetune101.evaluation.metrics import calibrate
from finetune101.evaluation.predictions import write_pair
from finetune101.files import write_json
from finetune101.machine import World, detect
from finetune101.models.build import build
from finetune101.run import Run
from finetune101.training.probe import solve

OUT = Path(__file__).resolve().parent.parent / "results" / "probe_cv"
SIZES = {"efficientnet_lite0": (224, 288), "efficientnet_lite1": (240, 288), "efficientnet_lite2": (260, 300)}
PENALTIES = (0.01, 0.003, 0.001, 0.0003)
FOLDS = 10


@dataclass(frozen=True, order=True)
class Block:
    """Features of one network at one size: of its "last" layer or of the "stage" before it."""

    network: str
    size: int
    layer: str
    weight: float = 1.0


@dataclass(frozen=True)
class Choice:
    """What the output layer sees, and its penalty."""

    blocks: tuple[Block, ...]
    mirror: bool = False
    l2: float = PENALTIES[1]


class Views(nn.Module):
    """Of a timm EfficientNet: last stage and last layer, of an image and of its mirror image, side by side."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, size, size) -> (N, 2 x (stage + last))."""
        return torch.cat([self.once(x), self.once(x.flip(3))], 1)

    def once(self, x: Tensor) -> Tensor:
        """(N, 3, size, size) -> (N, stage + last)."""
        net = self.network
        maps = net.blocks(net.bn1(net.conv_stem(x)))
        return torch.cat([maps.mean((2, 3)), net.global_pool(net.bn2(net.conv_head(maps)))], 1)


class Features:
    """The features of all blocks for the images ``paths`` of ``index``; each network and size is computed once."""

    def __init__(self, index: Index, paths: Sequence[str], world: World) -> None:
        self.index, self.paths, self.world = index, paths, world
        self.parts: dict[tuple[str, int], tuple[Tensor, int]] = {}

    def of(self, block: Block, mirror: bool) -> Tensor:
        """float32 (N, D): plain, or with ``mirror`` the mean of both views."""
        values, stage = self._views(block.network, block.size)
        plain, flipped = values.chunk(2, 1)
        mean = (plain + flipped) / 2 if mirror else plain
        return mean[:, :stage] if block.layer == "stage" else mean[:, stage:]

    def _views(self, network: str, size: int) -> tuple[Tensor, int]:
        if (network, size) not in self.parts:
            built = build(network, 2, size=size)
            stage = int(built.model.conv_head.in_channels)  # type: ignore[union-attr,arg-type]
            width = 2 * (stage + int(built.output_layer.in_features))  # type: ignore[arg-type]
            images = cache.open_images(self.index, built.preprocessing, wanted=self.paths)
            views = Views(built.model.eval())
            outputs = kept_outputs(views, width, built.preprocessing, images, self.paths, self.world)
            self.parts[network, size] = outputs.values, stage
        return self.parts[network, size]


def stacked(features: Features, choice: Choice, train: Tensor) -> Tensor:
    """The blocks side by side (N, D), each standardised by the images ``train`` and times its weight."""
    parts = []
    for block in choice.blocks:
        x = features.of(block, choice.mirror)
        mean, std = x[train].mean(0), x[train].std(0).clamp_min(1e-6)
        parts.append((x - mean) / std * block.weight)
    return torch.cat(parts, 1)


def fitted_outputs(x: Tensor, y: Tensor, train: Tensor, held: Tensor, classes: int, l2: float) -> Tensor:
    """Logits (held, classes) of the output layer that is fitted to the rows ``train``."""
    solution = solve(x[train], y[train], classes, l2)
    return x[held] @ solution[:-1] + solution[-1]


def held_out(features: Features, y: Tensor, classes: int, choice: Choice) -> Tensor:
    """Logits (N, classes) of every image by the output layer of the nine folds that it is not in."""
    result = torch.empty(len(y), classes)
    for train, held in folds_of(y):
        x = stacked(features, choice, train)
        result[held] = fitted_outputs(x, y, train, held, classes, choice.l2)
    return result


def folds_of(y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows that train and rows that are held out, of each fold; every class is spread over all folds."""
    generator = torch.Generator().manual_seed(0)
    classes = [(y == k).nonzero()[:, 0] for k in y.unique()]
    by_class = [rows[torch.randperm(len(rows), generator=generator)] for rows in classes]
    order = torch.cat(by_class)
    for fold in range(FOLDS):
        is_held = torch.arange(len(order)) % FOLDS == fold
        yield order[~is_held].sort().values, order[is_held].sort().values


def steps(sizes: dict[str, tuple[int, int]]) -> Iterator[tuple[str, Any]]:
    """What is tried after the start, one after the other: what it is, and choice -> changed choice."""
    for l2 in PENALTIES:
        yield f"l2 {l2}", lambda choice, l2=l2: replace(choice, l2=l2)
    yield "mirror mean", lambda choice: replace(choice, mirror=True)
    for network, (own, other) in sizes.items():
        larger = Block(network, other, "last")
        yield (
            f"{network} at {other} px",
            lambda c, old=Block(network, own, "last"), new=larger: replace(
                c, blocks=tuple(new if block == old else block for block in c.blocks)
            ),
        )
        both = (Block(network, own, "last"), larger)
        yield f"{network} at both sizes", lambda c, both=both: replace(c, blocks=tuple(sorted({*c.blocks, *both})))
    for network, (own, _) in sizes.items():
        for weight in (0.3, 1.0):
            stage = Block(network, own, "stage", weight)
            yield (
                f"last stage of {network}, weight {weight}",
                lambda c, stage=stage: replace(
                    c, blocks=(*[block for block in c.blocks if _place(block) != _place(stage)], stage)
                ),
            )
    for network in sizes:
        for weight in (0.7, 1.4):
            yield (
                f"{network}, weight x {weight}",
                lambda c, network=network, weight=weight: replace(
                    c,
                    blocks=tuple(replace(b, weight=b.weight * weight) if b.network == network else b for b in c.blocks),
                ),
            )
    for l2 in PENALTIES:
        yield f"l2 {l2}, again", lambda choice, l2=l2: replace(choice, l2=l2)


def _place(block: Block) -> tuple[str, int, str]:
    return block.network, block.size, block.layer


def choose(features: Features, y: Tensor, classes: int, sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Greedy: each step is kept where more held-out images are right, of equals where their loss is lower."""
    best = Choice(tuple(Block(network, own, "last") for network, (own, _) in sizes.items()))
    rows: list[dict[str, Any]] = []
    tried: dict[Choice, tuple[float, float]] = {}
    for name, change in tqdm([("start", lambda choice: choice), *steps(sizes)], desc="choose"):
        choice = change(best)
        if choice in tried:
            continue
        result = scores(held_out(features, y, classes, choice), y)
        tried[choice] = result["top1"], -result["loss"]
        kept = tried[choice] >= tried[best]
        best = choice if kept else best
        rows.append({"step": name, "top1": round(result["top1"], 3), "loss": round(result["loss"], 4), "kept": kept})
        tqdm.write(f"{rows[-1]}")
    return {"choice": to_dict(best), "folds": FOLDS, "images": len(y), "top1": tried[best][0], "tried": rows}


def test(index: Index, manifest: Manifest, choice: Choice, world: World, out: Path) -> dict[str, Any]:
    """Fits the choice to train + val, tests it, and writes test.json and predictions.csv to ``out``.

    The temperature is that of the held-out images. Raises ValueError where it was tested before.
    """
    if (out / "test.json").is_file():
        raise ValueError(f"{out} was tested before; a test set that is looked at often is no test set")
    paths, y = trained_on(manifest)
    known, classes = len(paths), len(manifest.classes)
    calibrated = calibrate(held_out(Features(index, paths, world), y, classes, choice), y)
    features = Features(index, [*paths, *manifest.subsets["test"]], world)
    rows = torch.arange(len(features.paths))
    x = stacked(features, choice, rows[:known])
    output = fitted_outputs(x, y, rows[:known], rows[known:], classes, choice.l2)
    labels = torch.tensor(manifest.labels("test"))
    result = scores(output, labels) | {
        "manifest_hash": manifest.hash(), "protocol": manifest.protocol, "times_scored": 1, "mirror": choice.mirror,
        "frozen_backbone": True, "world": world.describe(), **calibrations(output, labels, calibrated),
    }  # fmt: skip
    write_pair(out, "", result, prediction_rows(manifest, output, calibrated.temperature))
    return result


def trained_on(manifest: Manifest) -> tuple[list[str], Tensor]:
    """Paths and labels of the train and validation images."""
    labels = [label for subset in ("train", "val") for label in manifest.labels(subset)]
    return [path for subset in ("train", "val") for path in manifest.subsets[subset]], torch.tensor(labels)


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("choose", "test"))
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args(words)
    index, world = index_images(asked.images), detect(SystemConfig())
    manifest = make_split(index, DataConfig())
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.verb == "choose":
        paths, y = trained_on(manifest)
        result = choose(Features(index, paths, world), y, len(manifest.classes), SIZES)
        write_json(asked.out / "choice.json", result)
        print(f"{result['top1']:.2f} % of the held-out images: {result['choice']}")
        return
    values = Run(asked.out).read_json("choice.json")["choice"]
    choice = Choice(tuple(Block(**block) for block in values["blocks"]), values["mirror"], values["l2"])
    print(f"{test(index, manifest, choice, world, asked.out)['top1']:.2f} % of the test images")


if __name__ == "__main__":
    main()
