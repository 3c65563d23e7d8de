"""How a checkpoint becomes a network that is ready for images: weights, preprocessing, classes, temperature."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from finetune101.config import Preprocessing, SystemConfig, TrainConfig
from finetune101.errors import Refused, shortened
from finetune101.evaluation.forward import Forward
from finetune101.evaluation.metrics import Calibrated
from finetune101.evaluation.unlike import FEWEST, UNLIKE, Unlike, no_unlike_reason, read_unlike
from finetune101.files import checked, parse_json, read_json
from finetune101.machine import World, detect
from finetune101.models.build import build, feature_width
from finetune101.models.table import lookup
from finetune101.run import Run
from finetune101.schemas import Machine

TEXTS = ("model", "part", "exp", "temperature_reason")  # of the metadata, where all else is JSON
TEMPERATURE = "temperature.json"
"""In a run whose checkpoint holds no temperature: the one that ``evaluate`` found."""
Temperature = Annotated[float, Meta(gt=0, le=1e3)]


@dataclass(frozen=True)
class SplitOf:
    """The split that a released network was trained on."""

    seed: int
    hash: str


@dataclass(frozen=True, kw_only=True)
class Info:
    """What is written in a checkpoint beside its tensors."""

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    classes: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=1000)], ...], Meta(min_length=1, max_length=100_000)
    ]
    preprocessing: Preprocessing
    epoch: Annotated[int, Meta(ge=0, le=10**6)] | None = None
    temperature: Temperature | None = None
    temperature_reason: Annotated[str, Meta(max_length=1000)] = ""
    part: Literal["head"] | None = None
    frozen_backbone: bool = False
    split: SplitOf | None = None


@dataclass(frozen=True)
class Fitted:
    """temperature.json: what ``metrics.calibrate`` gave for the checkpoint with this sha256."""

    weights: str
    temperature: Temperature
    reason: str = ""
    format: int = 1


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """A trained network, and what its use needs: the machine, and the temperature that its logits are divided by.

    ``temperature`` is None where none is known; outputs are then taken as they are. ``temperature_reason`` says why it
    is None or 1. ``checkpoint_hash`` is the sha256 (hex) of the checkpoint's bytes, "" for a network of no checkpoint.
    """

    model: nn.Module
    preprocessing: Preprocessing
    classes: list[str]
    world: World
    fast_kernels: bool = True
    temperature: float | None = None
    temperature_reason: str = ""
    epoch: int | None = None
    name: str = ""
    frozen_backbone: bool = False
    """See ``has_frozen_backbone``."""
    checkpoint_hash: str = ""
    architecture: str = ""
    """The name of the network in ``models/table.py``."""
    unlike: Unlike | None = None
    """The score for images unlike the training images; ``unlike_reason`` says why there is none."""
    unlike_reason: str = ""

    @property
    def head(self) -> str:
        """The name of the output layer, a module of ``model``, such as "fc". Raises Refused without architecture."""
        return lookup(self.architecture).head.rstrip(".")

    @property
    def width(self) -> int:
        """The number of features that the output layer sees."""
        return feature_width(self.model.get_submodule(self.head))

    def with_unlike(self, file: Path) -> TrainedNetwork:
        """This network with the score for unlike images in ``file``, or with the reason why it holds none."""
        unlike, reason = read_unlike(file, self.checkpoint_hash, self.width, len(self.classes))
        return dataclasses.replace(self, unlike=unlike, unlike_reason=reason)

    def forward(self, mirror: bool = False) -> Forward:
        """Its only forward pass."""
        return Forward(self.model, self.world, fast=self.fast_kernels, mirror=mirror)


def has_frozen_backbone(config: TrainConfig, epoch: int | None) -> bool:
    """Whether the weights of ``epoch`` of a run have the backbone that it started with: only the output layer changed.

    That is so with ``freeze``, and at epoch 0, which is the solved output layer that fine-tuning starts from.
    """
    return config.model.freeze or (config.model.head == "probe" and epoch == 0)


def world_of(recorded: Machine | Mapping[str, Any]) -> World:
    """This machine's device with the number format that ``recorded`` (of env.json) names, fp32 where it has none such.

    Emulated bf16 is slower than fp32 and no more exact, and another format is not what the run was trained in.
    """
    here, precision = detect(SystemConfig()), recorded["precision"]
    native = precision == here.precision or (precision == "fp16" and here.device.type == "cuda")
    same = recorded["device"] == here.device.type
    return dataclasses.replace(
        here,
        precision=precision if native else "fp32",
        channels_last=recorded["channels_last"] if same else here.channels_last,
    )


def open_network(run: Run, file: Path | None = None) -> TrainedNetwork:
    """The best checkpoint of ``run``, or its ``file``, ready for images. Raises Refused as ``load_file`` does."""
    network = _open(file or run.best, str(run.path))
    world, config = world_of(run.read_json("env.json")["world"]), run.config()
    network = dataclasses.replace(
        network,
        world=world,
        fast_kernels=config.system.fast_kernels,
        frozen_backbone=has_frozen_backbone(config, network.epoch),
    )
    if network.temperature is None:
        reason = "evaluate the run first"
        if config.data.fit_on == "train+val":
            reason = "this run was trained on its validation images too, so that none are left to find a temperature"
        elif run.has("split.json") and not run.read_json("split.json")["subsets"]["val"]:
            reason = "the split of this run has no validation images to find a temperature"
        network = dataclasses.replace(network, temperature_reason=reason)
    if network.unlike is None:
        validation = len(run.read_json("split.json")["subsets"]["val"]) if run.has("split.json") else FEWEST
        missing = network.unlike_reason if run.has(UNLIKE) else "evaluate the run first"
        reason = no_unlike_reason(validation, config.data.fit_on) or missing
        network = dataclasses.replace(network, unlike_reason=reason)
    return network


def open_file(file: Path) -> TrainedNetwork:
    """A checkpoint that may lie anywhere; in the folder of a run as ``open_network``, else in this machine's format."""
    run = Run(file.parent)
    if run.has("config.json") and run.has("env.json"):
        return open_network(run, file)
    return _open(file, str(file))


def _open(file: Path, name: str) -> TrainedNetwork:
    model, info, checkpoint_hash = load_hashed(file)
    temperature, reason = info.temperature, info.temperature_reason
    if temperature is None:
        temperature, reason = _temperature_beside(file, checkpoint_hash)
    network = TrainedNetwork(
        model=model,
        preprocessing=info.preprocessing,
        classes=list(info.classes),
        world=detect(SystemConfig()),
        temperature=temperature,
        temperature_reason=reason,
        epoch=info.epoch,
        name=name,
        frozen_backbone=info.frozen_backbone or info.part == "head" or info.epoch == 0,
        checkpoint_hash=checkpoint_hash,
        architecture=info.model,
    )
    return network.with_unlike(file.parent / UNLIKE)


def _temperature_beside(file: Path, checkpoint_hash: str) -> tuple[float | None, str]:
    """The temperature, and why it is 1 or None, that was kept for the checkpoint ``file`` with this hash."""
    beside = file.parent / TEMPERATURE
    if not beside.is_file():
        return None, "its checkpoint holds no temperature"
    kept: Fitted = read_json(beside, Fitted, remedy="remove it, and evaluate the run again")
    if kept.weights == checkpoint_hash:
        return kept.temperature, kept.reason
    return None, "its temperature is of other weights"


def checkpoint_info(model: str, classes: Sequence[str], preprocessing: Preprocessing, **others: Any) -> dict[str, str]:
    """The metadata of a checkpoint of ``model``: an ``Info`` as text; ``others`` that are None are left out."""
    values: dict[str, Any] = {"classes": list(classes), "preprocessing": dataclasses.asdict(preprocessing)}
    values |= {key: value for key, value in others.items() if value is not None}
    return {"model": model} | {key: v if key in TEXTS else json.dumps(v) for key, v in values.items()}


def as_checkpoint(network: TrainedNetwork) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of ``network``, and the metadata with which ``open_file`` makes the same network of them."""
    info = checkpoint_info(
        network.architecture,
        network.classes,
        network.preprocessing,
        epoch=network.epoch,
        temperature=network.temperature,
        temperature_reason=network.temperature_reason or None,
        frozen_backbone=network.frozen_backbone or None,
    )
    return network.model.state_dict(), info


def keep_temperature(run: Run, network: TrainedNetwork, result: Calibrated) -> None:
    """Writes what ``metrics.calibrate`` gave for ``network``, a checkpoint of ``run``.

    The hash is that of the checkpoint that was scored, whatever another process has written there since.
    """
    run.write_json(TEMPERATURE, {"weights": network.checkpoint_hash, **dataclasses.asdict(result)})


def load_file(file: Path) -> tuple[nn.Module, Info]:
    """A checkpoint as a model in evaluation mode, and what is written in it.

    One that holds the output layer only stands on the ImageNet weights of its network. Raises Refused when it is
    missing, damaged, not finite, or fits no network of its name and number of classes.
    """
    model, info, _ = load_hashed(file)
    return model, info


def load_hashed(file: Path) -> tuple[nn.Module, Info, str]:
    """As ``load_file``, and the sha256 (hex) of the very bytes that were read: another process may replace the file."""
    content = _content(file)
    state, metadata = _parsed(content, file)
    info = described(metadata, file)
    count, head = len(info.classes), info.part == "head"
    fit = f"{info.model} with {count} classes"
    if not any(tensor.shape[:1] == (count,) for tensor in state.values()):  # before a network of that size is built
        raise Refused(f"{file} does not fit {fit}; train the run again")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise Refused(f"the weights in {file} are not finite ({shortened(name, 60)}); train the run again")
    built = build(info.model, count, pretrain=head, size=info.preprocessing.size)
    if head:
        state = {**built.model.state_dict(), **state}
    try:
        built.model.load_state_dict(state)
    except RuntimeError as error:
        raise Refused(f"{file} does not fit {fit}; train the run again") from error
    return built.model.eval(), info, hashlib.sha256(content).hexdigest()


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint. Raises Refused when it is missing or damaged."""
    return _parsed(_content(file), file)


def _content(file: Path) -> bytes:
    if not file.is_file():
        raise Refused(f"{file} is missing: no epoch of this run has finished yet; continue it with --resume")
    try:
        return file.read_bytes()
    except OSError as error:
        raise Refused(f"{file} cannot be read ({error.strerror}); repair it, or train the run again") from error


def _parsed(content: bytes, file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of ``content``: eight bytes of a length, a JSON header of that length, the tensors."""
    try:
        tensors = load_tensors(content)  # checks the header as well
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, header.get("__metadata__") or {}
    except Exception as error:  # a damaged file can raise nearly anything
        raise Refused(f"{file} is damaged ({shortened(str(error))}); train the run again") from error


def described(metadata: Mapping[str, str], file: Path) -> Info:
    """The metadata of the checkpoint ``file`` by its types and bounds. Raises Refused naming what is wrong."""
    remedy = "give a best.safetensors that finetune101 wrote"
    if "model" not in metadata and len(metadata) == 1:  # all of it in one key
        inside = parse_json(next(iter(metadata.values())), f"the metadata of {file}", remedy)
        metadata = inside if isinstance(inside, dict) else {}
    if not {"model", "classes", "preprocessing"} <= metadata.keys():
        raise Refused(f"{file} does not say of which network and classes its weights are; {remedy}")
    fields = [field.name for field in dataclasses.fields(Info)]
    values = {
        key: parse_json(value, f"{key} in {file}", remedy) if isinstance(value, str) and key not in TEXTS else value
        for key, value in metadata.items()
        if key in fields
    }
    info: Info = checked(values, Info, f"{file}", remedy=remedy)
    if len(set(info.classes)) < len(info.classes):
        raise Refused(f"{file} names a class twice; {remedy}")
    if not all(value > 0 for value in info.preprocessing.std):
        raise Refused(f"{file} has a preprocessing.std that is not above 0; {remedy}")
    return info
