"""What a trained network sees in images: files, whole folders or patterns; probabilities are calibrated."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from tqdm import tqdm

from finetune101.data.formats import IMAGE_SUFFIXES
from finetune101.data.images import images_in
from finetune101.data.layouts import is_junk
from finetune101.deploy.network import ranked_classes
from finetune101.errors import Refused, escaped
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.evaluation.photos import Failure, decoded
from finetune101.evaluation.predictions import cell
from finetune101.fast import tune_allocator


class Row(TypedDict):
    """One image: its path as given, and (class name, probability from 0 to 1), most probable first."""

    path: str
    predictions: list[tuple[str, float]]


def predict_files(
    network: TrainedNetwork, inputs: Sequence[str], top_k: int = 5, batch_size: int = 64
) -> tuple[list[Row], list[Failure]]:
    """The ``top_k`` most probable classes of every image in ``inputs``: files, folders (with all below) and patterns.

    Returns (rows, failed); failed holds (path, reason) for what is missing or cannot be read. With fewer classes than
    ``top_k``, all are given. Raises Refused when a number is below 1, or the network's output is not finite.
    """
    for name, value in (("--top-k", top_k), ("--batch-size", batch_size)):
        if value < 1:
            raise Refused(f"{name} is {value}; give at least 1")
    files, failed = expand(inputs)
    if network.fast_kernels:
        tune_allocator()
    forward = network.forward()
    rows: list[Row] = []
    with tqdm(total=len(files), unit="img", leave=False, disable=None) as bar:
        for good, x in decoded(files, network.preprocessing, network.world, batch_size, failed):
            ranked = ranked_classes(network, forward(x).cpu(), top_k)
            rows += [Row(path=file, predictions=classes) for file, classes in zip(good, ranked, strict=True)]
            bar.update(len(good))
    return rows, failed


def expand(inputs: Iterable[str]) -> tuple[list[str], list[Failure]]:
    """The image files that ``inputs`` name, each once, and (input, reason) for those that name none.

    A folder stands for every image below it, hidden ones left out. Patterns know ``*``, ``?``, ``[...]`` and ``**``.
    """
    files: dict[str, None] = {}
    failed: list[Failure] = []
    for source in inputs:
        try:
            files |= dict.fromkeys(_images(source))
        except Refused as error:
            failed.append((source, str(error)))
    return list(files), failed


def as_text(rows: Iterable[Row]) -> str:
    """Lines for a terminal: each path, and below it its classes with their probability in percent; names escaped."""
    lines = []
    for row in rows:
        lines.append(escaped(row["path"]))
        lines += [f"  {100 * probability:5.1f} %  {escaped(name)}" for name, probability in row["predictions"]]
    return "\n".join(lines)


def as_csv(rows: Sequence[Row]) -> str:
    """One line per image: path, class_1, probability_1, class_2, ...; like the others, without a newline at the end.

    Names are written as ``predictions.cell`` does.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    width = max((len(row["predictions"]) for row in rows), default=1)
    writer.writerow(["path", *(f"{column}_{k + 1}" for k in range(width) for column in ("class", "probability"))])
    for row in rows:
        cells = [value for name, probability in row["predictions"] for value in (cell(name), f"{probability:.6f}")]
        writer.writerow([cell(row["path"]), *cells])
    return file.getvalue().rstrip("\n")


def as_json(rows: Iterable[Row], failed: Iterable[Failure]) -> str:
    """{"predictions": [{"path", "classes": [{"class", "probability"}]}], "failed": [{"path", "reason"}]}, in ASCII."""
    value = {
        "predictions": [
            {"path": r["path"], "classes": [{"class": n, "probability": round(p, 6)} for n, p in r["predictions"]]}
            for r in rows
        ],
        "failed": [{"path": path, "reason": reason} for path, reason in failed],
    }
    return json.dumps(value, indent=1)


def _images(source: str) -> list[str]:
    """The images that one input names. Raises Refused when there are none."""
    try:
        if os.path.isfile(source):  # also one whose own name looks like a pattern; its suffix does not matter
            return [source]
        if os.path.lexists(source) and not os.path.isdir(source):
            dead = os.path.islink(source) and not os.path.exists(source)
            raise Refused("a link to nothing" if dead else "a pipe or a device, not a file")
        matches = [source] if os.path.isdir(source) else _matches(source)
    except ValueError as error:  # a NUL in the name
        raise Refused("no such file or folder") from error
    if not matches:
        raise Refused("no such file or folder")
    images: list[str] = []
    for match in matches:
        if os.path.isdir(match):
            images += map(str, _below(Path(match)))
        elif Path(match).suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(match):
            images.append(match)
    if not images:
        raise Refused(f"no image there ({', '.join(IMAGE_SUFFIXES)})")
    return images


def _matches(pattern: str) -> list[str]:
    """Paths that ``pattern`` matches, sorted, without those in which it matched junk."""
    fixed = next((i for i, part in enumerate(Path(pattern).parts) if glob.has_magic(part)), 0)
    paths = sorted(glob.glob(pattern, recursive=True))
    return [path for path in paths if not any(map(is_junk, Path(path).parts[fixed:]))]


def _below(folder: Path) -> Iterator[Path]:
    """Images in ``folder`` and its sub-folders but junk, in order of their names; links to folders are not followed."""
    for here, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_junk(name))
        yield from images_in(Path(here))
