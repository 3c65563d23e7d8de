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
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_fill_holes
from tqdm import tqdm

from finetune101.demo.dataset import PICTOGRAMS, picture_and_mask
from finetune101.deploy.network import Network, load
from finetune101.evaluation.metrics import wilson
from finetune101.files import write_json

RESULTS = Path(__file__).resolve().parent.parent / "results/pointing"
SEED, PER_CLASS = 2, 20  # seed 0 drew the training pictures; on 60 of seed 1 the layers of the map were chosen
MEASURES = ("mask", "outline", "box")


def point(network: Network, name: str, number: int, pictures: Path | None) -> dict[str, Any]:
    """Where the map of one picture is largest, and what is there."""
    scene, mask = picture_and_mask(name, np.random.default_rng([SEED, list(PICTOGRAMS).index(name), number]))
    explanation = network.explain(scene)
    values = Image.fromarray(explanation.maps[0]).resize(scene.size, Image.Resampling.BICUBIC)
    y, x = divmod(int(np.asarray(values).argmax()), mask.shape[1])
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    hits = {
        "mask": bool(mask[y, x]),
        "outline": bool(binary_fill_holes(mask)[y, x]),
        "box": bool(rows[0] <= y <= rows[-1] and columns[0] <= x <= columns[-1]),
    }
    if pictures:
        overlay = explanation.overlay().resize(scene.size)
        ImageDraw.Draw(overlay).ellipse((x - 3, y - 3, x + 3, y + 3), outline=(0, 255, 255), width=2)
        pictures.mkdir(parents=True, exist_ok=True)
        overlay.save(pictures / f"{name}_{number}{'' if hits['mask'] else '_missed'}.png")
    return {"class": name, "number": number, "prediction": explanation.classes[0][0], "x": x, "y": y, **hits}


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
    points = [point(network, name, number, args.pictures) for name, number in tqdm(named)]
    result = {
        "network": network.trained.architecture,
        "size": network.preprocessing.size,
        "command": shlex.join(["python", "benchmarks/pointing.py", *sys.argv[1:]]),
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
