"""The weights that come with the package: our own networks, trained on Caltech-101, each described in its card."""

from __future__ import annotations

from typing import Any

from finetune101.config import DataConfig, SystemConfig
from finetune101.data import splits
from finetune101.data.images import find_data, index_images
from finetune101.deploy.released_files import FOLDER, RELEASED, available
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import Info, SplitOf, TrainedNetwork, load_hashed
from finetune101.evaluation.evaluate import Opened, check_batch_size, scores
from finetune101.evaluation.unlike import UNLIKE
from finetune101.machine import detect


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
