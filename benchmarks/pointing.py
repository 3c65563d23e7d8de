"""The pointing game (Zhang et al., 2018) on drawn pictures: does the map's maximum lie on the object?

``python benchmarks/pointing.py RUN`` draws 20 new pictures of each of the 12 classes, none of them the run's, and
asks the run where it looks for the class that it predicts. RUN is trained on the drawn set:
``python -c "from finetune101.demo.dataset import *; draw(Path('drawn'))"; finetune101 train --data drawn --exp drawn
--size 224 --epochs 3``. A point hits the mask where it lies on the pictogram's own strokes, the outline where it lies
on them or in what they enclose, and the box where it lies in the rectangle around them. Writes
results/pointing/pointing.json with every point, and some overlays with ``--pictures FOLDER``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_fill_holes
from tqdm import tqdm

from finetune101.demo.dataset import PICTOGRAMS, picture_and_mask
from finetune101.deploy.explain import overlay
from finetune101.deploy.network import Network, load
from finetune101.evaluation.metrics import wilson
from finetune101.files import write_json

RESULTS = Path(__file__).resolve().parent.parent / "results/pointing"
# seed 0 drew the training pictures; on 60 pictures of seed 1 the layers of the map were chosen
SEED, PER_CLASS, BATCH = 2, 20, 16
MEASURES = ("mask", "outline", "box")


def points_of(network: Network, named: Sequence[tuple[str, int]], pictures: Path | None) -> list[dict[str, Any]]:
    """Where the map of each picture is largest, and what is there."""
    drawn = [picture_and_mask(name, _drawing(name, number)) for name, number in named]
    inputs = network.to_inputs([scene for scene, _ in drawn])
    points = []
    best_classes = network.forward(inputs).argmax(1).tolist()
    for (name, number), (scene, mask), x, best in zip(named, drawn, inputs, best_classes, strict=True):
        (values,) = network.explainer.maps(x[None], [best])
        whole = np.asarray(Image.fromarray(values).resize(scene.size, Image.Resampling.BICUBIC))
        y, column = divmod(int(whole.argmax()), mask.shape[1])
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        hits = {
            "mask": bool(mask[y, column]),
            "outline": bool(binary_fill_holes(mask)[y, column]),
            "box": bool(rows[0] <= y <= rows[-1] and columns[0] <= column <= columns[-1]),
        }
        prediction = network.classes[best]
        points.append({"class": name, "number": number, "prediction": prediction, "x": column, "y": y, **hits})
        if pictures:
            file = pictures / f"{name}_{number}{'' if hits['mask'] else '_missed'}.png"
            _save_overlay(overlay(scene, values), column, y, file)
    return points


def _drawing(name: str, number: int) -> np.random.Generator:
    return np.random.default_rng([SEED, list(PICTOGRAMS).index(name), number])


def _save_overlay(picture: Image.Image, x: int, y: int, file: Path) -> None:
    ImageDraw.Draw(picture).ellipse((x - 3, y - 3, x + 3, y + 3), outline=(0, 255, 255), width=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def shares(points: list[dict[str, Any]], measure: str) -> dict[str, Any]:
    """The share of ``points`` that hit, its 95 % interval (Wilson), and the share of each class."""
    hits = [one[measure] for one in points]
    low, high = (value / 100 for value in wilson(sum(hits), len(hits)))
    of_class = {name: [one[measure] for one in points if one["class"] == name] for name in PICTOGRAMS}
    return {
        "share": sum(hits) / len(hits),
        "interval": [low, high],
        "classes": {name: sum(values) / len(values) for name, values in of_class.items() if values},
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--per-class", type=int, default=PER_CLASS)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "pointing.json")
    args = parser.parse_args()
    network = load(args.run)
    named = [(name, number) for name in PICTOGRAMS for number in range(args.per_class)]
    starts = tqdm(range(0, len(named), BATCH))
    points = [one for start in starts for one in points_of(network, named[start : start + BATCH], args.pictures)]
    result = {
        "network": network.trained.architecture,
        "size": network.preprocessing.size,
        "weights": network.trained.checkpoint_hash,
        "command": f"python benchmarks/pointing.py {args.run}",
        "seed": SEED,
        "n": len(points),
        "right": sum(one["class"] == one["prediction"] for one in points) / len(points),
        **{measure: shares(points, measure) for measure in MEASURES},
        "points": points,
    }
    write_json(args.out, result)
    for measure in MEASURES:
        print(f"{measure}: {result[measure]['share']:.3f} of {len(points)}")


if __name__ == "__main__":
    main()
