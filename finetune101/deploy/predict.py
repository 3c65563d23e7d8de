"""What a trained network sees in images: files, whole folders or patterns."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from tqdm import tqdm

from finetune101.config import Preprocessing
from finetune101.data.batches import to_input
from finetune101.data.dataset import images_in
from finetune101.data.decode import Pixels, Unreadable, decode, in_threads
from finetune101.data.formats import IMAGE_SUFFIXES
from finetune101.errors import Refused
from finetune101.evaluation.inference import Network, logits
from finetune101.training import cpu
from finetune101.training.cpu_frozen import frozen

Failure = tuple[str, str]


class Row(TypedDict):
    """One image: its path as given, and (class name, probability from 0 to 1), most probable first."""

    path: str
    predictions: list[tuple[str, float]]


def predict(
    network: Network, inputs: Sequence[str], top_k: int = 5, batch_size: int = 64
) -> tuple[list[Row], list[Failure]]:
    """The ``top_k`` most probable classes of every image in ``inputs``: files, folders (with all below) and patterns.

    Returns (rows, failed); failed holds (path, reason) for what is missing or cannot be read. With fewer classes than
    ``top_k``, all are given. Raises Refused when a number is below 1.
    """
    for name, value in (("--top-k", top_k), ("--batch-size", batch_size)):
        if value < 1:
            raise Refused(f"{name} is {value}; give at least 1")
    files, failed = expand(inputs)
    if network.fast_kernels:
        cpu.tune_allocator()
    model, world, preprocessing = network.model, network.world, network.preprocessing
    model.to(world.device, memory_format=world.memory_format)  # type: ignore[call-overload]
    forward = frozen(model, world) if network.fast_kernels else model
    rows: list[Row] = []
    with tqdm(total=len(files), unit="img", leave=False, disable=None) as bar:
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            decoded = list(in_threads(lambda file: _decode(file, preprocessing), part))
            failed += [(file, result) for file, result in zip(part, decoded, strict=True) if isinstance(result, str)]
            pixels = [result for result in decoded if not isinstance(result, str)]
            if pixels:
                x = to_input(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), preprocessing, world)
                output, _ = logits(forward, [(x, torch.zeros(len(x)))], world)
                values, indices = (output / network.temperature).softmax(1).topk(min(top_k, len(network.classes)))
                good = [file for file, result in zip(part, decoded, strict=True) if not isinstance(result, str)]
                for file, probabilities, numbers in zip(good, values.tolist(), indices.tolist(), strict=True):
                    names = [network.classes[number] for number in numbers]
                    rows.append({"path": file, "predictions": list(zip(names, probabilities, strict=True))})
            bar.update(len(part))
    return rows, failed


def expand(inputs: Iterable[str]) -> tuple[list[str], list[Failure]]:
    """The image files that ``inputs`` name, each once, and (input, reason) for those that name none.

    A folder stands for every image below it, hidden ones left out. Patterns know ``*``, ``?``, ``[...]`` and ``**``.
    """
    files: dict[str, None] = {}
    failed: list[Failure] = []
    for given in inputs:
        try:
            files |= dict.fromkeys(_images(given))
        except Refused as error:
            failed.append((given, str(error)))
    return list(files), failed


def as_text(rows: Iterable[Row]) -> str:
    """Lines for a terminal: each path, and below it its classes with their probability in percent."""
    lines = []
    for row in rows:
        lines += [row["path"], *(f"  {100 * probability:5.1f} %  {name}" for name, probability in row["predictions"])]
    return "\n".join(lines)


def as_csv(rows: Sequence[Row]) -> str:
    """One line per image: path, class_1, probability_1, class_2, ...; like the others, without a newline at the end."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    width = max((len(row["predictions"]) for row in rows), default=1)
    writer.writerow(["path", *(f"{column}_{k + 1}" for k in range(width) for column in ("class", "probability"))])
    for row in rows:
        cells = [cell for name, probability in row["predictions"] for cell in (name, f"{probability:.6f}")]
        writer.writerow([row["path"], *cells])
    return file.getvalue().rstrip("\n")


def as_json(rows: Iterable[Row], failed: Iterable[Failure]) -> str:
    """{"predictions": [{"path", "classes": [{"class", "probability"}]}], "failed": [{"path", "reason"}]}."""
    value = {
        "predictions": [
            {"path": r["path"], "classes": [{"class": n, "probability": round(p, 6)} for n, p in r["predictions"]]}
            for r in rows
        ],
        "failed": [{"path": path, "reason": reason} for path, reason in failed],
    }
    return json.dumps(value, indent=1, ensure_ascii=False)


def _images(given: str) -> list[str]:
    """The images that one input names. Raises Refused when there are none."""
    if os.path.isfile(given):  # also one whose own name looks like a pattern; its suffix does not matter
        return [given]
    matches = [given] if os.path.isdir(given) else sorted(glob.glob(given, recursive=True))
    if not matches:
        raise Refused("no such file or folder")
    found: list[str] = []
    for match in matches:
        if os.path.isdir(match):
            found += map(str, _below(Path(match)))
        elif Path(match).suffix.lower() in IMAGE_SUFFIXES:
            found.append(match)
    if not found:
        raise Refused(f"no image there ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _below(folder: Path) -> Iterator[Path]:
    """Visible images in ``folder`` and its sub-folders, in order of their names; links to folders are not followed."""
    for here, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from images_in(Path(here))


def _decode(file: str, preprocessing: Preprocessing) -> Pixels | str:
    """The pixels, or why there are none."""
    try:
        return decode(Path(file), preprocessing.cache_size, preprocessing.interpolation)
    except Unreadable as error:
        return error.reason
