"""Every setting of a run and its default; imports no torch, so that ``--help`` is instant."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Flat = tyro.conf.arg(name="")  # --lr rather than --optim.lr


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What turns an image file into a network's input; it belongs to the weights and travels with them.

    decode to RGB -> resize the whole image to ``cache_size`` x ``cache_size`` (uint8) -> ``size`` x ``size``
    -> (x / 255 - mean) / std.
    """

    size: int
    cache_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and who is trained, validated and tested on them."""

    root: Annotated[str | None, tyro.conf.arg(name="data")] = None
    """Folder with one folder per class (or its parent). Default: $FINETUNE101_DATA, then data/101_ObjectCategories."""
    protocol: Literal["reference", "standard", "folders"] = "reference"
    """reference: 70/10/20 % of each class. standard: --train-per-class images, the rest tests. folders: as they are."""
    split: str | None = None
    """Use this split manifest (JSON) instead of making one."""
    split_seed: int = 42
    """Seed of the split."""
    test_size: float = 0.2
    """Share of each class that tests (reference)."""
    val_size: float = 0.1
    """Share of each class that validates (reference)."""
    train_per_class: int = 30
    """Images per class for training, a sixth of them for validation (standard)."""
    max_test_per_class: int | None = None
    """At most this many test images per class (standard)."""
    group_duplicates: bool = True
    """Keep near-duplicates and Faces/Faces_easy twins on one side of the split (standard)."""
    fit_on: Literal["train", "train+val"] = "train"
    """train+val: train on both, without validation, and keep the last epoch."""
    cache: Literal["auto", "off"] = "auto"
    """auto: decode every image once and keep the pixels in $FINETUNE101_CACHE."""
    skip_bad_images: bool = False
    """Go on without unreadable images (they are recorded) instead of stopping."""
    download: bool = False
    """Download Caltech-101 without asking if it is not there."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to a training image, besides its preprocessing."""

    flip: bool = True
    """Mirror every second training image."""
    crop_scale: float = 1.0
    """Smallest share of the image that a random resized crop keeps; 1 leaves the crop out."""
    policy: Literal["none", "trivial"] = "none"
    """trivial: one random change of colour or shape to each image (TrivialAugment)."""
    erasing: float = 0.0
    """Share of training images in which a random box is painted over."""
    mix: float = 0.0
    """Share of batches in which images are mixed in pairs, by MixUp or CutMix in turn of chance."""
    train_sizes: tuple[int, ...] = ()
    """Sizes in pixels of training images, one after the other over the epochs. Default: the size of the input."""

    def size_at(self, epoch: int, epochs: int) -> int | None:
        """Size of training images in ``epoch`` (from 1) of ``epochs``; None for that of the input."""
        return self.train_sizes[(epoch - 1) * len(self.train_sizes) // epochs] if self.train_sizes else None


SHEET_PER_CLASS = 4  # of a contact sheet: images of each class,
SHEET_AUGMENT = AugmentConfig(crop_scale=0.5)  # and what is shown of augmentation


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network and where it starts."""

    name: Annotated[str, tyro.conf.arg(name="model")] = "efficientnet_lite0"
    """Network: resnet18, alexnet, efficientnet_lite0, ..., or timm:NAME."""
    weights: str | None = None
    """File of ImageNet weights (.safetensors, or a .pth state dict)."""
    pretrain: bool = True
    """Start from ImageNet weights; --no-pretrain starts from random ones."""
    head: Literal["random", "probe"] = "random"
    """Start of the new output layer. probe: the best linear one on frozen features (then --epochs may be 0)."""
    probe_l2: tuple[float, ...] = (0.03, 0.01, 0.003, 0.001)
    """L2 penalties that the probe tries; validation chooses."""
    freeze_norm: bool = False
    """Keep the batch-norm statistics of the start; their weights are trained."""
    freeze: bool = False
    """Train the new output layer only (linear probe)."""
    cached_features: bool = False
    """With --freeze: compute the features of every whole image once, so that a run takes seconds; no augmentation."""
    size: int | None = None
    """Height and width of the input in pixels. Default: the network's own."""
    cache_size: int | None = None
    """Height and width at which images are decoded: above --size, crops stay sharp. Default: the input's."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with momentum and its schedule; the defaults are the original fine-tuning recipe."""

    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 0.01
    """Learning rate of the new output layer."""
    backbone_lr_ratio: float | None = None
    """Learning rate of all other layers, as a share of --lr. Default: 0.1 fine-tuning, 1 from scratch."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 0.0
    """L2 penalty on all parameters."""
    norm_weight_decay: bool = True
    """Apply --weight-decay to biases and norms as well."""
    ema: float = 0.0
    """Validate and keep an exponential moving average of the weights, with this decay per step; 0 leaves it out."""
    schedule: Literal["step", "cosine"] = "step"
    """step: times --gamma every --step-size epochs. cosine: down to 0 over the run."""
    step_size: int = 30
    """Epochs between two drops of the learning rate (step)."""
    gamma: float = 0.1
    """Factor of each drop (step)."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up (cosine)."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    teacher: tuple[str, ...] = ()
    """Runs on the same split whose mean probabilities the network learns as well (distillation)."""
    teacher_share: float = 0.5
    """Share of the target that is theirs, with --teacher."""
    val_every: int = 1
    """Validate after every so many epochs, and after the last."""


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """The machine: what decides speed, and the seed that fixes everything random."""

    seed: int = 0
    """Fixes initialisation, order and augmentation."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to train."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """auto: channels_last with bf16 or fp16."""
    threads: int | None = None
    """CPU threads; on a GPU also the processes that prepare its images. Default: all cores."""
    fast_kernels: bool = True
    """Faster memory allocation, depthwise gradients, batch norms and inference on CPUs."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: config.json is this, nothing else."""

    exp: str
    """Name of the run: it is written to RUNS/EXP."""
    runs: str = "runs"
    """Folder of all runs."""
    recipe: str | None = None
    """Start from a named recipe (`finetune101 recipes` lists them); other flags override it."""
    data: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    augment: Annotated[AugmentConfig, Flat] = field(default_factory=AugmentConfig)
    model: Annotated[ModelConfig, Flat] = field(default_factory=ModelConfig)
    optim: Annotated[OptimConfig, Flat] = field(default_factory=OptimConfig)
    system: Annotated[SystemConfig, Flat] = field(default_factory=SystemConfig)

    def backbone_lr_ratio(self) -> float:
        """Learning rate of the backbone as a share of the head's, with the default resolved."""
        if self.optim.backbone_lr_ratio is not None:
            return self.optim.backbone_lr_ratio
        return 0.1 if self.model.pretrain else 1.0


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study: seeds x splits x arms x networks x training sizes."""

    exp: str
    """Name of the study: its runs are RUNS/EXP/NETWORK/ARM/SIZE/SPLIT_SEED."""
    runs: str = "runs"
    """Folder of all runs."""
    arms: tuple[Literal["finetune", "scratch", "probe"], ...] = ("finetune", "scratch", "probe")
    """Fine-tuning, random initialisation, and a linear output layer on frozen features."""
    models: tuple[str, ...] = ("efficientnet_lite0",)
    """Networks."""
    seeds: int = 3
    """Runs of each arm on each split, with seeds 0, 1, ..."""
    splits: int = 1
    """Number of splits, with seeds from --split-seed on."""
    train_per_class: tuple[int, ...] = ()
    """Training images per class (standard), such as 1,2,5,10,20,30, each in the steps of the largest. Default: all."""
    finetune_recipe: str = "finetune_fast"
    """Recipe of the arm finetune: a name, or a file such as a search's winner.yaml."""
    scratch_recipe: str = "original"
    """Recipe of the arm scratch: a name, or a file such as a search's winner.yaml."""
    probe_recipe: str = "probe"
    """Recipe of the arm probe: a name, or a file such as a search's winner.yaml."""
    epochs: int | None = None
    """Epochs of every arm that trains all layers. Default: its recipe's."""
    scratch_epochs: int | None = None
    """Epochs of the arm scratch, which takes far longer than the others. Default: --epochs, then its recipe's."""
    batch_size: int | None = None
    """Images per step. Default: the recipe's."""
    size: int | None = None
    """Height and width of the input in pixels. Default: the recipe's, then the network's own."""
    probe_l2: float = 0.003
    """L2 penalty of a linear output layer whose recipe leaves the choice to validation, with --train-per-class."""
    data: str | None = None
    """Folder with one folder per class (or its parent)."""
    protocol: Literal["reference", "standard", "folders"] = "reference"
    """The split, without --train-per-class."""
    split_seed: int = 42
    """Seed of the first split."""
    max_test_per_class: int | None = None
    """At most this many test images per class (standard)."""
    threads: int | None = None
    """CPU threads of a run. Default: all cores, shared by --jobs."""


PARTS: dict[str, type] = {
    "data": DataConfig,
    "augment": AugmentConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "system": SystemConfig,
}


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of ``to_dict`` for a TrainConfig. Raises ValueError on keys this version does not know."""
    try:
        parts = {key: PARTS[key](**_tuples(value)) if key in PARTS else value for key, value in values.items()}
        return TrainConfig(**parts)
    except TypeError as error:
        raise ValueError(f"config.json was written by another version of finetune101: {error}") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}  # JSON has lists


def read_settings(file: Path) -> dict[str, Any]:
    """The table in a YAML, TOML or JSON file. Raises ValueError when it cannot be read or holds no table."""
    if file.suffix not in (".yaml", ".yml", ".toml", ".json"):
        raise ValueError(f"{file} is no file of settings; give one that ends in .yaml, .toml or .json")
    import yaml  # only where a file is read: the command line starts without it

    try:
        text = file.read_text(encoding="utf-8")
        read = {".toml": tomllib.loads, ".json": json.loads}.get(file.suffix, yaml.safe_load)
        values = read(text)
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}; check its name") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not valid {file.suffix[1:].upper()} ({reason}); correct it") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{file} holds no table of names and values; write lines such as lr: [0.01, 0.001]")
    return values


def with_settings(config: TrainConfig, values: dict[str, Any], source: str) -> TrainConfig:
    """``config`` with the parts in ``values`` (such as {"optim": {"lr": 0.02}}), which were read from ``source``.

    Raises ValueError for a part or a setting that does not exist.
    """
    for part, fields in values.items():
        if part not in PARTS or not isinstance(fields, dict):
            raise ValueError(f"{source} has {part!r}, which is no part of a recipe; use {', '.join(PARTS)}")
        unknown = fields.keys() - {f.name for f in dataclasses.fields(PARTS[part])}
        if unknown:
            raise ValueError(f"{source} has {part}.{min(unknown)}, which is no setting; see finetune101 train --help")
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **_tuples(fields))})
    return config


def read_recipe(file: str, exp: Any) -> TrainConfig:
    """A recipe file such as a search's winner.yaml as a configuration. Raises ValueError as ``with_settings`` does."""
    return with_settings(TrainConfig(exp=exp, recipe=file), read_settings(Path(file)), file)


def preprocessing_from_dict(values: dict[str, Any]) -> Preprocessing:
    """The inverse of ``to_dict`` for a Preprocessing."""
    return Preprocessing(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def validate(config: TrainConfig) -> None:
    """Raises ValueError, in one sentence that says what to do, for a setting that cannot work."""
    o, d = config.optim, config.data
    rules = [
        (config.model.freeze or not config.model.cached_features, "--cached-features needs --freeze"),
        (not (config.model.cached_features and config.augment.mix), "--cached-features leaves no images for --mix"),
        (config.model.head == "random" or not config.model.cached_features, "--cached-features needs --head random"),
        (
            o.epochs >= (config.model.head == "random"),
            f"--epochs is {o.epochs}; give at least 1, or 0 with --head probe",
        ),
        (
            all(math.isfinite(l2) and l2 > 0 for l2 in config.model.probe_l2) and len(config.model.probe_l2) > 0,
            "--probe-l2 needs positive numbers such as 0.003",
        ),
        (all(size >= 32 for size in config.augment.train_sizes), "--train-sizes must be at least 32 each"),
        (0 < o.teacher_share <= 1, f"--teacher-share is {o.teacher_share}; give a share above 0, at most 1"),
        (not (config.model.cached_features and o.teacher), "--cached-features leaves no images for a --teacher"),
        (o.val_every >= 1, f"--val-every is {o.val_every}; give at least 1"),
        (o.batch_size >= 1, f"--batch-size is {o.batch_size}; give at least 1"),
        (math.isfinite(o.lr) and o.lr > 0, f"--lr is {o.lr}; give a positive number such as 0.01"),
        (
            o.backbone_lr_ratio is None or (math.isfinite(o.backbone_lr_ratio) and o.backbone_lr_ratio >= 0),
            f"--backbone-lr-ratio is {o.backbone_lr_ratio}; give 0 or more, such as 0.1",
        ),
        (0 <= o.momentum < 1, f"--momentum is {o.momentum}; give a number from 0 to below 1"),
        (not o.nesterov or o.momentum > 0, "--nesterov needs a --momentum above 0"),
        (
            math.isfinite(o.weight_decay) and o.weight_decay >= 0,
            f"--weight-decay is {o.weight_decay}; give 0 or more",
        ),
        (0 <= o.ema < 1, f"--ema is {o.ema}; give a number from 0 to below 1, such as 0.999"),
        (0 <= config.augment.erasing <= 1, f"--erasing is {config.augment.erasing}; give a share from 0 to 1"),
        (0 <= config.augment.mix <= 1, f"--mix is {config.augment.mix}; give a share from 0 to 1"),
        (o.step_size >= 1, f"--step-size is {o.step_size}; give at least 1"),
        (0 < o.gamma <= 1, f"--gamma is {o.gamma}; give a number above 0, at most 1"),
        (
            0 <= o.warmup_epochs < o.epochs or o.warmup_epochs == 0,
            f"--warmup-epochs is {o.warmup_epochs}; give less than --epochs",
        ),
        (0 <= o.label_smoothing < 1, f"--label-smoothing is {o.label_smoothing}; give a number from 0 to below 1"),
        (0 < config.augment.crop_scale <= 1, f"--crop-scale is {config.augment.crop_scale}; give (0, 1]"),
        (config.model.size is None or config.model.size >= 32, f"--size is {config.model.size}; give at least 32"),
        (
            config.model.cache_size is None or config.model.cache_size >= 32,
            f"--cache-size is {config.model.cache_size}; give at least 32",
        ),
        (0 < d.test_size < 1, f"--test-size is {d.test_size}; give a share between 0 and 1"),
        (0 <= d.val_size < 1 - d.test_size, f"--val-size is {d.val_size}; give a share below 1 - test size"),
        (d.train_per_class >= 1, f"--train-per-class is {d.train_per_class}; give at least 1"),
        (
            d.max_test_per_class is None or d.max_test_per_class >= 1,
            f"--max-test-per-class is {d.max_test_per_class}; give at least 1",
        ),
        (config.system.threads is None or config.system.threads >= 1, "--threads must be at least 1"),
        (
            not {"", ".", ".."} & set(config.exp.split("/")) and not set(config.exp) & set('\\:*?"<>|\n\0'),
            f"--exp {config.exp!r} cannot name a folder; use letters, digits, - and _",
        ),
    ]
    for fine, message in rules:
        if not fine:
            raise ValueError(message)
