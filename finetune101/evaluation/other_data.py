"""A run on another folder of labelled images -> test_NAME.json and predictions_NAME.csv, beside its own test."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune101.data import duplicates, splits
from finetune101.data.images import Index, class_of, find_data, index_images
from finetune101.errors import Refused, escaped
from finetune101.evaluation import metrics
from finetune101.evaluation.checkpoint import open_network
from finetune101.evaluation.evaluate import NO_HELP, calibrations, check_batch_size, scores, trained_on
from finetune101.evaluation.metrics import Calibrated
from finetune101.evaluation.photos import Failure, decoded
from finetune101.evaluation.predictions import write_pair
from finetune101.files import FORMAT
from finetune101.run import Run


def evaluate_other(run: Run, data: str | None, *, batch_size: int = 64, mirror: bool = False) -> dict[str, Any]:
    """Scores the best checkpoint of ``run`` on all images of the folder ``data`` that are of the run's classes.

    Writes test_NAME.json and predictions_NAME.csv, NAME being the folder's, and nothing else: the run's own test stays.
    The result is that of test_NAME.json and ``written``, the path of the predictions. Raises Refused when there is no
    image of the run's classes, or none can be read.
    """
    if data is None:
        raise Refused("--as-test scores another folder of labelled images; name it by --data")
    check_batch_size(batch_size)
    network, root = open_network(run), find_data(data).absolute()
    index = index_images(root, ours=[run.config().runs], to_train=False)
    labels = {str(root / path): class_of(path) for path in index.paths}
    files = [file for file, name in labels.items() if name in network.classes]
    unknown = Counter(name for name in labels.values() if name not in network.classes)
    if not files:
        few = ", ".join(escaped(name) for name in network.classes[:5])
        raise Refused(f"{root} has no image of the classes of {run.path} ({few}, …); name its folders as those classes")
    failed: list[Failure] = []
    forward, outputs, good = network.forward(mirror), [], []
    for part, x in decoded(files, network.preprocessing, network.world, batch_size, failed):
        outputs.append(forward(x).cpu())
        good += part
    if not good:
        raise Refused(f"no image of {root} can be read (first: {escaped(failed[0][0])}: {failed[0][1]}); repair them")
    number = {name: i for i, name in enumerate(network.classes)}
    output, target = torch.cat(outputs), torch.tensor([number[labels[file]] for file in good])
    temperature = network.temperature or 1.0
    reason = "" if temperature != 1 else network.temperature_reason or NO_HELP
    result = scores(output, target)
    if network.frozen_backbone:
        result["frozen_backbone"] = True
    result |= {
        "data": str(root),
        "classes_without_images": sorted(set(network.classes) - {labels[file] for file in good}),
        "unknown_classes": dict(sorted(unknown.items())),
        "left_out": {reason: len(paths) for reason, paths in index.left_out.items()},
        "unreadable": {os.path.relpath(file, root): reason for file, reason in failed},
        "epoch": network.epoch or 0,
        "mirror": mirror,
        "world": network.world.describe(),
    }
    result |= calibrations(output, target, Calibrated(temperature=temperature, reason=reason))
    result |= _near_duplicates(run, index, good, output.argmax(1) == target)
    confidence, prediction = metrics.probabilities(output, temperature).max(1)
    columns = zip(good, prediction.tolist(), confidence.tolist(), strict=True)
    table = [
        (os.path.relpath(file, root).replace(os.sep, "/"), labels[file], network.classes[p], c)
        for file, p, c in columns
    ]
    ending = _ending(run, root)
    write_pair(run.path, ending, {"format": FORMAT, **result}, table)
    return result | {"written": str(run.path / f"predictions{ending}.csv")}


def _near_duplicates(run: Run, other: Index, files: list[str], correct: Tensor) -> dict[str, Any]:
    """How many of ``files`` are near-duplicates of training images, and the accuracy without them; else why not."""
    config = run.config()
    manifest = splits.from_json(run.read_json("split.json"))
    try:
        root = find_data(run.image_folder()).absolute()
        index = index_images(root, ours=[config.runs])
    except Refused:
        return {"near_duplicates": {"n": None, "reason": "the training images are not there any more"}}
    trained = trained_on(manifest, config.data)
    if gone := sum(path not in index.digests for path in trained):
        reason = f"{gone} of {len(trained)} training images are not in {root} any more"
        return {"near_duplicates": {"n": None, "reason": reason}}
    digests = {str(part.root / path): digest for part in (index, other) for path, digest in part.digests.items()}
    trained_files = [str(root / path) for path in trained]
    # both folders as one: a path from the root of the file system stays what it is
    both = Index(Path(root.anchor), manifest.classes, tuple(sorted({*files, *trained_files})), digests)
    duplicated = duplicates.with_duplicate(both, files, trained_files)
    alone = torch.tensor([file not in duplicated for file in files])
    n = int(alone.sum())
    without = {"n": n, "top1": 100 * int(correct[alone].sum()) / n if n else None}
    return {"near_duplicates": {"n": len(files) - n}, "without_duplicates": without}


def _ending(run: Run, root: Path) -> str:
    """What ends the names of the files: _NAME, and more of the path where another folder of this name was scored."""
    name = "_" + (re.sub(r"[^\w.-]+", "_", root.name)[:80] or "root")
    file = run.path / f"test{name}.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8")).get("data") if file.is_file() else None
    except (OSError, ValueError, AttributeError, RecursionError):  # damaged: written anew
        before = None
    if before in (None, str(root)):
        return name
    return f"{name}_{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}"


def other_text(result: dict[str, Any]) -> str:
    """What was scored, what was left out, and what of it the training may have seen; in lines."""
    near = result["near_duplicates"]
    lines = []
    if missing := result["classes_without_images"]:
        lines.append(f"Classes without an image there: {len(missing)} ({_few(missing)})")
    if unknown := result["unknown_classes"]:
        lines.append(
            f"Left out: {sum(unknown.values())} images of classes that the run does not know ({_few(unknown)})"
        )
    lines += [f"Left out: {count} {reason}" for reason, count in result["left_out"].items()]
    if failed := result["unreadable"]:
        lines.append(f"Left out: {len(failed)} images that cannot be read ({_few(failed)})")
    if near["n"] is None:
        lines.append(f"Whether training images are among them is not known: {near['reason']}")
    else:
        lines.append(f"Near-duplicates of training images: {near['n']} of {result['n']}")
    return "\n".join([*lines, f"Every prediction: {result['written']}"])


def _few(names: Iterable[str], most: int = 5) -> str:
    listed = [escaped(name) for name in names]
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")
