"""The weights that come with the package: our own networks, trained on Caltech-101, each described in its card."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune101.config import DataConfig, SystemConfig
from finetune101.data import splits
from finetune101.data.images import IMAGE_SUFFIXES, find_data, index_images
from finetune101.deploy.inputs import is_list
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import Info, SplitOf, TrainedNetwork, load_hashed, open_file, open_network
from finetune101.evaluation.evaluate import Opened, check_batch_size, scores
from finetune101.evaluation.unlike import UNLIKE
from finetune101.machine import detect
from finetune101.run import Run, find_run, is_run, open_run

FOLDER = Path(__file__).parent.parent / "weights"
RELEASED = {
    "released_finetune": "caltech101_finetune_efficientnet_lite0",
    "released_random": "caltech101_scratch_efficientnet_lite0",
    "released_probe": "caltech101_probe_efficientnet_lite0",
}
"""Name to use -> file in ``weights/``, and the card of the same name beside it; the first that is there predicts."""
OF_RUNS = {"config.json", "env.json", "split.json", "metrics.jsonl", "last.pt", "best.safetensors", "study.json"}
"""Files of runs: a folder with one of them below it is not taken for a folder of images."""
OF_NETWORKS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx", ".json"}
"""Suffixes that no image has, and that whoever names a network may mean."""


def available() -> list[str]:
    """The names of the released networks that this package holds, the one to predict with first."""
    return [name for name, file in RELEASED.items() if (FOLDER / f"{file}.safetensors").is_file()]


def open_released(name: str) -> tuple[TrainedNetwork, Info]:
    """The released network ``name`` (see ``available``), and what is written in its file.

    Raises Refused when it is not there, damaged, or stands on ImageNet weights that are not installed.
    """
    if name not in available():
        raise Refused(f"this package does not hold {name}; it holds {', '.join(available()) or 'none'}")
    model, info, checkpoint_hash = load_hashed(FOLDER / f"{RELEASED[name]}.safetensors")
    network = TrainedNetwork(
        model=model,
        preprocessing=info.preprocessing,
        classes=list(info.classes),
        world=detect(SystemConfig()),
        temperature=info.temperature,
        name=name,
        frozen_backbone=info.part == "head",
        checkpoint_hash=checkpoint_hash,
        architecture=info.model,
    )
    return network.with_unlike(FOLDER / f"{RELEASED[name]}.{UNLIKE}"), info


@dataclass(frozen=True)
class Chosen:
    """The network that the words of a command name, the images that they name, and whether it was named at all."""

    network: TrainedNetwork
    inputs: list[str]
    named: bool
    run: Run | None = None
    """The run of the network; None for a released network and for a checkpoint outside of a run."""


def choose(words: Sequence[str], runs: str = "runs") -> Chosen:
    """The network that ``words`` begin with (a run, a checkpoint, a released one; else the first released one).

    Raises Refused when no image is left, or the first word is neither a network nor images.
    """
    if not words:
        raise Refused("no image given; name files, folders or patterns")
    first, rest = words[0], list(words[1:])
    released, file = available(), Path(first)
    run = None if first in released or is_list(first) else find_run(first, runs)
    checkpoint = file.suffix == ".safetensors" and file.is_file()
    if run or checkpoint or first in released:
        if not rest:
            raise Refused("no image given; name files, folders or patterns after the run")
        network = open_network(run) if run else open_file(file) if checkpoint else open_released(first)[0]
        beside = Run(file.parent) if checkpoint and is_run(file.parent) else None
        return Chosen(network, rest, named=True, run=run or beside)
    if not _names_images(first):
        if file.is_file() and file.suffix != ".onnx":  # which open_run knows
            raise Refused(f"{first} is no network that predict reads; name a run, or a best.safetensors of one")
        open_run(first, runs)  # says which runs there are
    return Chosen(open_released((released or list(RELEASED))[0])[0], list(words), named=False)


def _names_images(word: str) -> bool:
    """Whether the first word of a command can mean images: a file, a list, a pattern, a folder without runs."""
    if is_list(word):
        return True
    suffix = Path(word).suffix.lower()
    if os.path.isdir(word):
        below = {name for _, _, names in os.walk(word) for name in names}
        return not below & OF_RUNS and any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in below)
    if suffix in OF_NETWORKS:
        return False
    return suffix in IMAGE_SUFFIXES or os.path.lexists(word) or bool(glob.glob(word, recursive=True))


def score_released(name: str, data: str | None = None, batch_size: int = 64) -> dict[str, Any]:
    """Scores the released network ``name`` on the test images of the split that it was trained on; writes nothing.

    Raises Refused when the images in ``data`` are not those of that split.
    """
    network, info = open_released(name)
    return score_reference(network, data, batch_size, name, info.split)


def score_reference(
    network: TrainedNetwork, data: str | None, batch_size: int, name: str, split: SplitOf | None = None
) -> dict[str, Any]:
    """Scores ``network`` on the reference test images; ``split`` holds the seed and hash of another than the usual one.

    Raises Refused when the images are of other classes or another split, or when ``batch_size`` is below 1.
    """
    check_batch_size(batch_size)
    opened = open_reference(network, data, name, split)
    result = scores(*opened.logits("test", batch_size))
    return result | ({"frozen_backbone": True} if network.frozen_backbone else {})


def open_reference(network: TrainedNetwork, data: str | None, name: str, split: SplitOf | None = None) -> Opened:
    """``network`` with the images of the reference split. Raises Refused as ``score_reference`` does."""
    config = DataConfig(root=data, split_seed=split.seed if split else DataConfig().split_seed)
    index = index_images(find_data(data))
    manifest = splits.make_split(index, config)
    if len(network.classes) != len(manifest.classes):
        trained, present = len(network.classes), len(manifest.classes)
        raise Refused(f"{name} knows {trained} classes, the data set has {present}; give the --data it was trained on")
    if split and manifest.hash() != split.hash:
        raise Refused(f"the images in {index.root} are not those that {name} was trained on; give them by --data")
    return Opened(network, manifest, index, config)
