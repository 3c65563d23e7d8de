"""The only evaluation forward pass, and how a finished run becomes a model again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune101.config import Preprocessing, SystemConfig, preprocessing_from_dict
from finetune101.errors import Refused
from finetune101.models.build import build
from finetune101.runs import Run
from finetune101.world import World, detect


def logits(
    model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], world: World
) -> tuple[Tensor, Tensor]:
    """The model's output for every image: float32 logits (N, classes) and int64 labels (N,), both on the CPU."""
    if isinstance(model, nn.Module):
        model.eval()
    outputs, labels = [], []
    with torch.no_grad():
        for x, y in batches:
            with world.autocast():
                output = model(x)
            outputs.append(output.float().cpu())
            labels.append(y.cpu())
    return torch.cat(outputs), torch.cat(labels)


def mirrored(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``model`` as the mean of its outputs for an image and for the mirror image (Krizhevsky et al., 2012)."""
    if isinstance(model, nn.Module):
        model.eval()
    return lambda x: (model(x) + model(x.flip(3))) / 2


def world_of(run: Run) -> World:
    """The number format that ``run`` was trained with, where this machine has it; else the machine's own."""
    recorded, here = run.read_json("env.json")["world"], detect(SystemConfig())
    # emulated bf16 is slower than fp32 and no more exact
    usable = recorded["device"] == str(here.device) and recorded["precision"] in ("fp32", here.precision)
    return detect(SystemConfig(), recorded) if usable else here


@dataclass(frozen=True, kw_only=True)
class Network:
    """A trained network, and what its use needs: the machine, and the temperature that its logits are divided by."""

    model: nn.Module
    preprocessing: Preprocessing
    classes: list[str]
    world: World
    fast_kernels: bool = True
    temperature: float = 1.0


def open_network(run: Run) -> Network:
    """The best checkpoint of ``run``, ready for images. Raises Refused as ``load_model`` does."""
    model, preprocessing, classes = load_model(run)
    fast, world = run.config().system.fast_kernels, world_of(run)
    return Network(model=model, preprocessing=preprocessing, classes=classes, world=world, fast_kernels=fast)


def load_model(run: Run) -> tuple[nn.Module, Preprocessing, list[str]]:
    """The best checkpoint of ``run``: (model in evaluation mode, its preprocessing, class names).

    Raises Refused when the checkpoint is missing, damaged, or of another class count than the run's split.
    """
    return load_file(run.best)[:3]


def load_file(file: Path) -> tuple[nn.Module, Preprocessing, list[str], dict[str, str]]:
    """A checkpoint as a model in evaluation mode, its preprocessing, class names, and all that is written in it.

    One that holds the output layer only stands on the ImageNet weights of its network. Raises Refused when it is
    missing, damaged, or fits no network of its name and number of classes.
    """
    state, info = read_checkpoint(file)
    classes = json.loads(info["classes"])
    preprocessing = preprocessing_from_dict(json.loads(info["preprocessing"]))
    only_head = info.get("part") == "head"
    built = build(info["model"], len(classes), pretrain=only_head, size=preprocessing.size)
    if only_head:
        state = {**built.model.state_dict(), **state}
    try:
        built.model.load_state_dict(state)
    except RuntimeError as error:
        fit = f"{info['model']} with {len(classes)} classes"
        raise Refused(f"{file} does not fit {fit}; train the run again") from error
    return built.model.eval(), preprocessing, classes, info


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint. Raises Refused when it is missing or damaged."""
    if not file.is_file():
        raise Refused(f"{file} is missing: no epoch of this run has finished yet; continue it with --resume")
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    except SafetensorError as error:
        raise Refused(f"{file} is damaged ({error}); train the run again") from error
