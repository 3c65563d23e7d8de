"""What grows with the number of images: time and memory of each step, and the exponent of its growth.

``python benchmarks/scale.py --sizes 1000 10000 100000`` draws that many small images, 100 a class, measures each step
in a process of its own and writes results/scale.json. An exponent of 1 is time in proportion to the images.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune101.config import DataConfig, Preprocessing
from finetune101.data import cache, duplicates, splits
from finetune101.data.images import Index, find_data, index_images
from finetune101.files import cache_dir, write_json
from finetune101.host import usable_cores

HERE = Path(__file__).resolve().parent
PER_CLASS = 100
SIDE = 48  # pixels of a drawn image, 32 of a decoded one
OWN = Preprocessing(size=32, cache_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear")
SIMILAR = 20_000  # at most so many images that all look the same
Step = Callable[[Path], Any]


def draw(root: Path, count: int) -> None:
    """Writes ``count`` different JPEG files of random pixels, 100 a class."""
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / f"class_{number // PER_CLASS:04d}"
        if number % PER_CLASS == 0:
            folder.mkdir(parents=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(content, "JPEG", quality=60)
        (folder / f"{number:06d}.jpg").write_bytes(content.getvalue())


def list_and_hash(root: Path) -> Index:
    """Lists the images and hashes them."""
    return index_images(find_data(str(root)))


def make_splits(root: Path) -> None:
    """Both protocols, written, read and compared with the list."""
    index = list_and_hash(root)
    for config in (DataConfig(), DataConfig(protocol="standard")):
        manifest = splits.make_split(index, config, {path: path for path in index.paths})
        file = cache_dir() / "split.json"
        write_json(file, manifest.to_json())
        splits.check_split(splits.read_split(file), index)


def decode_all(root: Path) -> None:
    """Makes the cache of decoded pixels."""
    cache.open_images(list_and_hash(root), OWN)


def start_again(root: Path) -> None:
    """A training until its first step, with warm caches: list, split, open the cache, read the first batch."""
    index = list_and_hash(root)
    manifest = splits.make_split(index, DataConfig())
    splits.check_split(manifest, index)
    images = cache.open_images(index, OWN)
    paths, labels = manifest.subsets["train"], manifest.labels("train")
    order = np.random.default_rng(0).permutation(len(paths))[:64]
    assert len(images.read([paths[i] for i in order])) == len([labels[i] for i in order])


def find_duplicates(root: Path) -> None:
    """Finds the groups of near-duplicates; makes the thumbnails first."""
    duplicates.duplicate_groups(list_and_hash(root))


def group_similar(root: Path) -> None:
    """Groups as many thumbnails, which all look the same."""
    count = min(SIMILAR, len(list_and_hash(root).paths))
    rng = np.random.default_rng(0)
    base = rng.integers(2, 254, 1024, dtype=np.int16)
    thumbs = np.empty((count, 1024), np.uint8)
    for start in range(0, count, 1000):
        part = thumbs[start : start + 1000]
        part[:] = base + rng.integers(-2, 3, part.shape, dtype=np.int16)
    labels = duplicates.near_labels(thumbs)
    assert (labels == labels[0]).all()


STEPS: dict[str, Step] = {
    "list and hash, first time": list_and_hash,
    "list and hash, second time": list_and_hash,
    "list, split and check": make_splits,
    "decode all": decode_all,
    "second start to first step": start_again,
    "near-duplicates, first time": find_duplicates,
    "near-duplicates, second time": find_duplicates,
    "near-duplicates among similar images": group_similar,
}


def _measured(step: Step, root: Path, answer: Any) -> None:
    def resident() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB

    before, started, used = resident(), time.perf_counter(), time.process_time()
    step(root)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    answer.put({"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "mb": round(resident() - before)})


def measure(step: Step, root: Path) -> dict[str, float]:
    """Seconds, processor seconds and MB of memory beyond the imports that ``step`` takes in a new process."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_measured, args=(step, root, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{step.__name__} failed")
    return dict(answer.get())


def exponents(sizes: Sequence[int], rows: Sequence[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Step -> log of the growth of its processor time over log of the growth in images, first to last size."""
    growth = math.log(sizes[len(rows) - 1] / sizes[0])
    first, last = rows[0], rows[-1]
    return {
        name: round(math.log(max(last[name]["cpu_seconds"], 0.01) / max(first[name]["cpu_seconds"], 0.01)) / growth, 2)
        for name in STEPS
    }


def main() -> None:
    """Draws, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, default=HERE.parent / "results/scale.json")
    arguments = parser.parse_args()
    rows: list[dict[str, dict[str, float]]] = []
    for count in arguments.sizes:
        folder = Path(tempfile.mkdtemp(prefix="scale-"))
        try:
            os.environ["FINETUNE101_CACHE"] = str(folder / "cache")
            draw(folder / "data", count)
            time.sleep(2.5)  # files that changed just now are hashed again
            row = {}
            for name, step in STEPS.items():
                row[name] = measure(step, folder / "data")
                print(f"{count:>7,} images  {name:<40}", row[name], flush=True)
            rows.append(row)
        finally:
            shutil.rmtree(folder)
        machine = {"cores": usable_cores(), "processor": platform.machine(), "similar_at_most": SIMILAR}
        result: dict[str, Any] = {"machine": machine, "sizes": arguments.sizes[: len(rows)], "steps": rows}
        if len(rows) > 1:
            result["exponents"] = exponents(arguments.sizes, rows)
            print(result["exponents"])
        write_json(arguments.out, result)  # after each size: the last may take long


if __name__ == "__main__":
    main()
