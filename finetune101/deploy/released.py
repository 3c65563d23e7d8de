"""The weights that come with the package: our own networks, trained on Caltech-101, each described in its card."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune101.config import DataConfig, SystemConfig
from finetune101.data import dataset, splits
from finetune101.data.dataset import IMAGE_SUFFIXES
from finetune101.errors import Refused
from finetune101.evaluation.evaluate import Opened, check_batch_size, scores
from finetune101.evaluation.inference import Network, load_file, open_network
from finetune101.runs import find_run, open_run
from finetune101.world import detect

FOLDER = Path(__file__).parent.parent / "weights"
RELEASED = {
    "released_finetune": "caltech101_finetune_efficientnet_lite0",
    "released_random": "caltech101_scratch_efficientnet_lite0",
    "released_probe": "caltech101_probe_efficientnet_lite0",
}
"""Name to use -> file in ``weights/``, and the card of the same name beside it; the first that is there predicts."""


def available() -> list[str]:
    """The names of the released networks that this package holds, the one to predict with first."""
    return [name for name, file in RELEASED.items() if (FOLDER / f"{file}.safetensors").is_file()]


def open_released(name: str) -> tuple[Network, dict[str, str]]:
    """The released network ``name`` (see ``available``), and what is written in its file.

    Raises Refused when it is not there, damaged, or stands on ImageNet weights that are not installed.
    """
    if name not in available():
        raise Refused(f"this package does not hold {name}; it holds {', '.join(available()) or 'none'}")
    model, preprocessing, classes, info = load_file(FOLDER / f"{RELEASED[name]}.safetensors")
    world, temperature = detect(SystemConfig()), float(info["temperature"])
    network = Network(model=model, preprocessing=preprocessing, classes=classes, world=world, temperature=temperature)
    return network, info


def choose(words: Sequence[str], runs: str = "runs") -> tuple[Network, list[str]]:
    """The network that ``words`` begin with, a run or a released one, and the rest; without, the first released one.

    Raises Refused when no image is left, or the first word is neither a network nor an image.
    """
    first, rest = (words[0], list(words[1:])) if words else ("", [])
    released = available()
    run = None if first in released else find_run(first, runs)
    if run or first in released:
        if not rest:
            raise Refused("no image given; name files, folders or patterns after the run")
        return (open_network(run) if run else open_released(first)[0]), rest
    if not words:
        raise Refused("no image given; name files, folders or patterns")
    if (
        Path(first).suffix.lower() not in IMAGE_SUFFIXES
        and not Path(first).exists()
        and not glob.glob(first, recursive=True)
    ):
        open_run(first, runs)  # says which runs there are
    return open_released((released or list(RELEASED))[0])[0], list(words)


def score_released(name: str, data: str | None = None, batch_size: int = 64) -> dict[str, Any]:
    """Scores the released network ``name`` on the test images of the split that it was trained on; writes nothing.

    Raises Refused when the images in ``data`` are not those of that split.
    """
    network, info = open_released(name)
    return score_reference(network, data, batch_size, name, json.loads(info["split"]))


def score_reference(
    network: Network, data: str | None, batch_size: int, name: str, split: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Scores ``network`` on the reference test images; ``split`` holds the seed and hash of another than the usual one.

    Raises Refused when the images are of other classes or another split, or when ``batch_size`` is below 1.
    """
    check_batch_size(batch_size)
    config = DataConfig(root=data, split_seed=split["seed"] if split else DataConfig().split_seed)
    index = dataset.index(dataset.find(data))
    manifest = splits.make(index, config)
    if len(network.classes) != len(manifest.classes):
        known, found = len(network.classes), len(manifest.classes)
        raise Refused(f"{name} knows {known} classes, the data set has {found}; give the --data it was trained on")
    if split and manifest.hash() != split["hash"]:
        raise Refused(f"the images in {index.root} are not those that {name} was trained on; give them by --data")
    opened = Opened(network.model, network.preprocessing, manifest, index, config, network.world)
    return scores(*opened.logits("test", batch_size))
