"""Labelling a folder of JPEGs: ``finetune101 predict`` against a plain eager fp32 loop, A B A B.

``python benchmarks/predict.py RUN --data FOLDER`` copies 2,000 of the images twice. Ours on 2,000 and on 4,000 images:
the difference is the warm time of 2,000, the rest start-up. The plain loop (PIL, fp32, eager, same batch
size) is timed over the first 500 after a warm-up, decoding included. Writes results/speed/predict.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

from finetune101.config import Preprocessing
from finetune101.data.images import index_images
from finetune101.deploy.inputs import image_inputs
from finetune101.deploy.predict import predict_files
from finetune101.evaluation.checkpoint import load_file, open_network
from finetune101.run import Run

RESULTS = Path(__file__).resolve().parent.parent / "results/speed"
IMAGES, PLAIN, BATCH = 2000, 500, 64


def plain(model: torch.nn.Module, preprocessing: Preprocessing, files: list[Path]) -> float:
    """Images/s of a loop as a user would write it."""
    size = (preprocessing.size, preprocessing.size)
    bicubic = transforms.InterpolationMode.BICUBIC
    normalize = transforms.Normalize(preprocessing.mean, preprocessing.std)
    transform = transforms.Compose([transforms.Resize(size, bicubic), transforms.ToTensor(), normalize])
    started = time.perf_counter()
    with torch.no_grad():
        for at in range(0, len(files), BATCH):
            batch = [transform(Image.open(file).convert("RGB")) for file in files[at : at + BATCH]]
            model(torch.stack(batch)).softmax(1).topk(5)
    return len(files) / (time.perf_counter() - started)


def plain_rate(run: Path, files: list[Path]) -> float:
    """Images/s of the plain loop over ``files``, after a warm-up."""
    model, info = load_file(Run(run).best)
    preprocessing, model = info.preprocessing, model.float().to(memory_format=torch.contiguous_format)
    plain(model, preprocessing, files[:BATCH])
    return plain(model, preprocessing, files)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    run, index = Run(arguments.run), index_images(arguments.data)
    paths = index.paths[:: len(index.paths) // IMAGES][:IMAGES]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / half for half in ("a", "b")]
        for folder in folders:
            folder.mkdir()
            for i, path in enumerate(paths):
                shutil.copyfile(index.root / path, folder / f"{i:04d}.jpg")
        files = sorted(folders[0].iterdir())[:PLAIN]
        for number in range(1, arguments.pairs + 1):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # without our memory allocation
                row = {"plain_images_per_s": pool.submit(plain_rate, run.path, files).result()}
            for key, inputs in (("one", folders[:1]), ("both", folders)):
                started = time.perf_counter()
                images = image_inputs(map(str, inputs))
                labelled = sum(1 for _ in predict_files(open_network(run), images, batch_size=BATCH))
                row[key] = time.perf_counter() - started
                assert labelled == IMAGES * len(inputs) and not images.failed
            row["warm_images_per_s"] = IMAGES / (row["both"] - row["one"])
            row["start_s"] = 2 * row["one"] - row["both"]
            row["ratio"] = row["warm_images_per_s"] / row["plain_images_per_s"]
            print(number, {key: round(value, 1) for key, value in row.items()}, flush=True)
            rows.append(row)
    medians = {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]}
    ratios = [round(row["ratio"], 2) for row in rows]
    result = {**medians, "ratio_range": [min(ratios), max(ratios)], "pairs": len(rows), "cores": os.cpu_count()}
    (RESULTS / "predict.json").write_text(json.dumps({**result, "measurements": rows}, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
