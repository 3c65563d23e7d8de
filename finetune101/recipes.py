"""Named recipes: functions that return a configuration; the docstring holds the command and the result to expect."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune101.config import AugmentConfig, ModelConfig, OptimConfig, TrainConfig, change, read_recipe
from finetune101.errors import Refused
from finetune101.host import has_gpu


def original(exp: str, *, pretrain: bool = True) -> TrainConfig:
    """What the original project's published weights were trained with.

    ``finetune101 train --exp NAME --recipe original [--no-pretrain]``: whole images at 224 px, flips, SGD with momentum
    .9, the head at .01; fine-tuned 20 epochs with the backbone at .001; from scratch 30 epochs, halved every 10, weight
    decay 1e-5. On Caltech-101 (validation, reference split) EfficientNet-Lite0 has 95.8 % fine-tuned, in an hour on two
    cores.
    """
    if pretrain:
        optim = OptimConfig(epochs=20, batch_size=64, lr=0.01, step_size=30, gamma=0.1, weight_decay=0.0)
    else:
        optim = OptimConfig(epochs=30, batch_size=64, lr=0.01, step_size=10, gamma=0.5, weight_decay=1e-5)
    return TrainConfig(exp=exp, recipe="original", model=ModelConfig(pretrain=pretrain), optim=optim)


def probe(exp: str, *, pretrain: bool = True) -> TrainConfig:
    """The best linear output layer on frozen features; no other layer changes.

    ``finetune101 train --exp NAME --recipe probe``: about 97 % on Caltech-101 (validation, reference split) in about
    two minutes on two cores, decoding included.
    """
    model = ModelConfig(name="efficientnet_lite02", pretrain=pretrain, head="probe")
    return TrainConfig(exp=exp, recipe="probe", model=model, optim=OptimConfig(epochs=0))


def finetune_fast(exp: str, *, pretrain: bool = True) -> TrainConfig:
    """A linear probe first, then three epochs of everything (LP-FT, Kumar et al., 2022), batch-norm statistics kept.

    ``finetune101 train --exp NAME --recipe finetune_fast``: 96 to 97 % on Caltech-101 (validation, reference split)
    with EfficientNet-Lite0, in about ten minutes on two cores; the probe alone is there after one.
    Most of its runs keep the probe, with a frozen backbone, and say so.
    """
    if not pretrain:
        raise Refused("recipe finetune_fast starts from ImageNet weights; take --recipe original with --no-pretrain")
    return TrainConfig(
        exp=exp,
        recipe="finetune_fast",
        model=ModelConfig(head="probe", freeze_norm=True),
        augment=AugmentConfig(crop_scale=0.6),
        optim=OptimConfig(
            epochs=3, lr=0.004, backbone_lr_ratio=0.25, nesterov=True, schedule="cosine", warmup_epochs=0.5,
            label_smoothing=0.1,
        ),
    )  # fmt: skip


def finetune(exp: str, *, pretrain: bool = True) -> TrainConfig:
    """A linear probe first, then five epochs of everything on crops of larger images; batch-norm statistics kept.

    ``finetune101 train --exp NAME [--recipe finetune]``: what ``train`` and ``study`` take where no other is named.
    LP-FT (Kumar et al., 2022), trained at 224 px on crops of images of 288 px, tested at 256 px (Touvron et al., 2019):
    about 97 % on Caltech-101 (validation, reference split) with EfficientNet-Lite0, in about 13 minutes on one core
    with bf16, 30 without.
    """
    if not pretrain:
        raise Refused("recipe finetune starts from ImageNet weights; take --recipe scratch with --no-pretrain")
    return TrainConfig(
        exp=exp,
        recipe="finetune",
        # the strong penalty leaves the head something to learn, and small weights that a usual rate does not throw off
        model=ModelConfig(head="probe", probe_l2=(0.3,), freeze_norm=True, size=256, cache_size=288),
        augment=AugmentConfig(crop_scale=0.4, train_sizes=(224,)),
        optim=OptimConfig(
            epochs=5, lr=0.01, backbone_lr_ratio=0.2, nesterov=True, schedule="cosine", warmup_epochs=0.5,
            label_smoothing=0.1,
        ),
    )  # fmt: skip


def scratch_fast(exp: str, *, pretrain: bool = False) -> TrainConfig:
    """From random initialisation, quickly: small images, little augmentation.

    ``finetune101 train --exp NAME --recipe scratch_fast --no-pretrain``: 25 epochs, first at 64, then at 96 px, tested
    at 96 px: 66 to 68 % on Caltech-101 (validation, reference split) with EfficientNet-Lite0, in 30 minutes.
    Strong augmentation, which a long schedule needs, only slows down a short one.
    """
    return TrainConfig(
        exp=exp,
        recipe="scratch_fast",
        model=ModelConfig(pretrain=pretrain, size=96),
        augment=AugmentConfig(crop_scale=0.5, train_sizes=(64, 96)),
        optim=OptimConfig(
            epochs=25, lr=0.1, nesterov=True, weight_decay=5e-4, norm_weight_decay=False, ema=0.99,
            schedule="cosine", warmup_epochs=1, label_smoothing=0.1, val_every=5,
        ),
    )  # fmt: skip


def scratch(exp: str, *, pretrain: bool = False) -> TrainConfig:
    """From random initialisation: a long cosine schedule with strong augmentation, and averaged weights.

    ``finetune101 train --exp NAME --recipe scratch --no-pretrain``: half of the epochs at 64 px, then at 96 and 128 px,
    validated and tested at 160 px (progressive resizing: Tan & Le, 2021; Touvron et al., 2019): 82 to 83 % on
    Caltech-101 (validation, reference split) with EfficientNet-Lite0, in 60 to 90 minutes on two cores with bf16.
    """
    return TrainConfig(
        exp=exp,
        recipe="scratch",
        model=ModelConfig(pretrain=pretrain, size=160),
        augment=AugmentConfig(
            crop_scale=0.3, policy="trivial", erasing=0.1, train_sizes=(64,) * 5 + (96,) * 3 + (128,) * 2
        ),
        optim=OptimConfig(
            epochs=140, lr=0.05, nesterov=True, weight_decay=1e-3, norm_weight_decay=False, ema=0.998,
            schedule="cosine", warmup_epochs=3, label_smoothing=0.1, val_every=5,
        ),
    )  # fmt: skip


def scratch_long(exp: str, *, pretrain: bool = False) -> TrainConfig:
    """From random initialisation on a GPU: like scratch, with large batches, half of them mixed.

    ``finetune101 train --exp NAME --recipe scratch_long --no-pretrain --model resnet18``: 169 epochs at 64 to 160 px,
    validated and tested at 192 px, mixup or CutMix in half of the batches (Zhang et al., 2018; Yun et al., 2019): 87 %
    on Caltech-101 (validation, reference split), one seed, in two minutes on one H200. On two cores it takes hours.
    """
    return TrainConfig(
        exp=exp,
        recipe="scratch_long",
        model=ModelConfig(pretrain=pretrain, size=192),
        augment=AugmentConfig(
            crop_scale=0.3, policy="trivial", erasing=0.1, mix=0.5,
            train_sizes=(64,) * 2 + (96,) * 3 + (128,) * 3 + (160,) * 2,
        ),
        optim=OptimConfig(
            epochs=169, batch_size=256, lr=0.2, nesterov=True, weight_decay=1e-3, norm_weight_decay=False, ema=0.993,
            schedule="cosine", warmup_epochs=5, label_smoothing=0.1, val_every=20,
        ),
    )  # fmt: skip


RECIPES: dict[str, Callable[..., TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (original, probe, finetune, finetune_fast, scratch, scratch_fast, scratch_long)
}


def named(name: str) -> Callable[..., TrainConfig]:
    """The recipe ``name``. Raises Refused naming those that exist."""
    if name not in RECIPES:
        raise Refused(f"there is no recipe {name}; choose from {', '.join(RECIPES)}")
    return RECIPES[name]


_ONE_SIZE = ("vit_", "timm:")  # networks that take images of one size only, and such as may


def usual_finetune(model: str = "") -> str:
    """The name of the recipe that fine-tunes ``model``: ``finetune``, or the one without a size where that counts."""
    return "finetune_fast" if model.startswith(_ONE_SIZE) else "finetune"


def usual_scratch(model: str = "", device: str = "auto") -> str:
    """The name of the recipe from random initialisation that suits the machine, or ``device`` (as --device names it).

    Networks that take images of one size only (vision transformers, and what timm has) keep the original's, which
    sets no size.
    """
    if model.startswith(_ONE_SIZE):
        return "original"
    return "scratch_long" if device == "cuda" or (device == "auto" and has_gpu()) else "scratch_fast"


def from_recipe(name: str, exp: Any, *, pretrain: bool | None = None) -> TrainConfig:
    """The settings of the recipe ``name``, or of a recipe file such as a search's winner.yaml.

    ``pretrain`` None leaves the start to the file; a named recipe then starts from ImageNet weights.
    Raises Refused for a recipe that does not exist, and for a file that is none.
    """
    if Path(name).suffix:
        config = read_recipe(name, exp)
        return config if pretrain is None else change(config, {"pretrain": pretrain})
    return named(name)(exp, pretrain=pretrain is not False)


def usual(model: str = "", device: str = "auto", *, pretrain: bool = True) -> str:
    """The name of the recipe that a training begins with where none is named."""
    return usual_finetune(model) if pretrain else usual_scratch(model, device)


def whole_epochs(config: TrainConfig) -> int | None:
    """The epochs of the named recipe of ``config`` where it was cut to fewer; None where it was not."""
    if config.recipe not in RECIPES:
        return None
    whole = RECIPES[config.recipe](config.exp, pretrain=config.model.pretrain).optim.epochs
    return whole if 0 < config.optim.epochs < whole else None


def rescheduled(optim: OptimConfig, epochs: int) -> OptimConfig:
    """``optim`` with ``epochs`` as a whole schedule: its warm-up and its steps become longer or shorter alike."""
    ratio = epochs / optim.epochs if optim.epochs else 1
    warmup = min(optim.warmup_epochs * ratio, max(epochs - 1, 0))
    return replace(optim, epochs=epochs, step_size=max(1, round(optim.step_size * ratio)), warmup_epochs=warmup)


def fitted(config: TrainConfig, names: Collection[str]) -> TrainConfig:
    """``config`` with the warm-up and the training sizes of its recipe made to fit the settings ``names`` just given.

    The warm-up ends before the last epoch, and no training image is larger than the input.
    """
    optim, augment, model = config.optim, config.augment, config.model
    if "epochs" in names and "warmup_epochs" not in names and optim.warmup_epochs >= optim.epochs:
        config = change(config, {"warmup_epochs": max(optim.epochs - 1, 0)})
    if "size" in names and "train_sizes" not in names and model.size:
        config = change(config, {"train_sizes": tuple(min(size, model.size) for size in augment.train_sizes)})
    return config


def recipe_line(name: str | None) -> str:
    """A recipe's name, and what it is made for where the machine decides."""
    suits = {"scratch_fast": "for a CPU; scratch_long is for a GPU", "scratch_long": "for a GPU"}
    return f"{name} ({suits[name]})" if name in suits else f"{name}"
