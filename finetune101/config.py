"""Every setting of a run and its default; imports no torch, so that ``--help`` is instant."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import msgspec
import tyro
from msgspec import Meta

from finetune101.errors import Refused, escaped, must_be, shortened, shown
from finetune101.files import checked, read_settings, typed

Flat = tyro.conf.arg(name="")  # --lr rather than --optim.lr

Count = Annotated[int, Meta(ge=1, le=10**9)]
Epochs = Annotated[int, Meta(ge=0, le=10**6)]
Threads = Annotated[int, Meta(ge=1, le=4096)]
Pixels = Annotated[int, Meta(ge=32, le=2048)]  # a side: below, networks have nothing left; above, memory is gone
Decoded = Annotated[int, Meta(ge=32, le=4096)]  # a side of decoded images in pixels
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0, le=1e6)]
NotNegative = Annotated[float, Meta(ge=0, le=1e6)]
AboveZero = Annotated[float, Meta(gt=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
Brightness = Annotated[float, Meta(ge=-255, le=255)]
Spread = Annotated[float, Meta(gt=1e-6, le=255)]  # pixels are divided by it
Seed = Annotated[int, Meta(ge=0, lt=2**32)]  # what NumPy and PyTorch take, with room to derive others from it


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What turns an image file into a network's input; it belongs to the weights and travels with them.

    decode to RGB -> resize the whole image to ``cache_size`` x ``cache_size`` (uint8) -> ``size`` x ``size``
    -> (x / 255 - mean) / std.
    """

    size: Pixels
    cache_size: Decoded
    mean: tuple[Brightness, Brightness, Brightness]
    std: tuple[Spread, Spread, Spread]
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
    split_seed: Seed = 42
    """Seed of the split."""
    test_size: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    """Share of each class that tests (reference)."""
    val_size: BelowOne = 0.1
    """Share of each class that validates (reference)."""
    train_per_class: Count = 30
    """Images per class for training, a sixth of them for validation (standard)."""
    max_test_per_class: Count | None = None
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
    crop_scale: AboveZero = 1.0
    """Smallest share of the image that a random resized crop keeps; 1 leaves the crop out."""
    policy: Literal["none", "trivial"] = "none"
    """trivial: one random change of colour or shape to each image (TrivialAugment)."""
    erasing: Share = 0.0
    """Share of training images in which a random box is painted over."""
    mix: Share = 0.0
    """Share of batches in which images are mixed in pairs, by MixUp or CutMix in turn of chance."""
    mixup_alpha: Positive | None = None
    """Mix by MixUp alone, with this alpha; with 1 every share is as likely. Default: MixUp (.2) or CutMix."""
    train_sizes: tuple[Pixels, ...] = ()
    """Sizes in pixels of training images, one after the other over the epochs. Default: the size of the input."""

    def size_at(self, epoch: int, epochs: int) -> int | None:
        """Size of training images in ``epoch`` (from 1) of ``epochs``; None for that of the input."""
        return self.train_sizes[(epoch - 1) * len(self.train_sizes) // epochs] if self.train_sizes else None


SHEET_AUGMENT = AugmentConfig(crop_scale=0.5)  # what a contact sheet shows of augmentation


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network and where it starts."""

    name: Annotated[str, tyro.conf.arg(name="model")] = "efficientnet_lite0"
    """Network: resnet18, alexnet, efficientnet_lite0, ..., or timm:NAME."""
    weights: str | None = None
    """File of ImageNet weights (.safetensors, or a .pth state dict)."""
    pretrain: bool = True
    """Start from ImageNet weights; --no-pretrain starts from random ones."""
    random_layers: tuple[str, ...] = ()
    """Layers that the ImageNet weights lack, such as classifier: they start at random and learn at --lr."""
    head: Literal["random", "probe"] = "random"
    """Start of the new output layer. probe: the best linear one on frozen features (then --epochs may be 0)."""
    probe_l2: Annotated[tuple[Positive, ...], Meta(min_length=1)] = (0.03, 0.01, 0.003, 0.001)
    """L2 penalties that the probe tries; validation chooses."""
    freeze_norm: bool = False
    """Keep the batch-norm statistics of the start; their weights are trained."""
    freeze: bool = False
    """Train the new output layer only (linear probe)."""
    cached_features: bool = False
    """With --freeze: compute the features of every whole image once, so that a run takes seconds; no augmentation."""
    size: Pixels | None = None
    """Height and width of the input in pixels. Default: the recipe's, else the network's own."""
    cache_size: Decoded | None = None
    """Height and width of decoded images: above --size, crops stay sharp. Default: the recipe's, else --size."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with momentum and its schedule; the defaults are the original fine-tuning recipe."""

    epochs: Epochs = 20
    """Passes over the training images."""
    batch_size: Count = 64
    """Images per step."""
    lr: Annotated[float, Meta(gt=0, le=1e30)] = 0.01  # fp32 ends at 3e38
    """Learning rate of the new output layer, and of --random-layers."""
    backbone_lr_ratio: NotNegative | None = None
    """Learning rate of all other layers, as a share of --lr. Default: 0.1 fine-tuning, 1 from scratch."""
    momentum: BelowOne = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: NotNegative = 0.0
    """L2 penalty on all parameters."""
    norm_weight_decay: bool = True
    """Apply --weight-decay to biases and norms as well."""
    ema: BelowOne = 0.0
    """Validate and keep an exponential moving average of the weights, with this decay per step; 0 leaves it out."""
    schedule: Literal["step", "cosine"] = "step"
    """step: times --gamma every --step-size epochs. cosine: down to 0 over the run."""
    step_size: Count = 30
    """Epochs between two drops of the learning rate (step)."""
    gamma: AboveZero = 0.1
    """Factor of each drop (step)."""
    warmup_epochs: NotNegative = 0.0
    """Epochs of linear warm-up (cosine)."""
    label_smoothing: BelowOne = 0.0
    """Share of the target spread over all classes."""
    teacher: tuple[str, ...] = ()
    """Runs on the same split whose mean probabilities the network learns as well (distillation)."""
    teacher_share: AboveZero = 0.5
    """Share of the loss that is theirs, with --teacher; 1 leaves the labels out."""
    teacher_temperature: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    """Divides the outputs of teachers and network before they are compared, with --teacher."""
    val_every: Count = 1
    """Validate after every so many epochs, and after the last."""


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """The machine: what decides speed, and the seed that fixes everything random."""

    seed: Seed = 0
    """Fixes initialisation, order and augmentation."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to train."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """auto: channels_last on a CPU; on other devices with bf16 or fp16 only."""
    threads: Threads | None = None
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


PARTS: dict[str, type] = {
    "data": DataConfig, "augment": AugmentConfig, "model": ModelConfig, "optim": OptimConfig, "system": SystemConfig,
}  # fmt: skip


class Setting(NamedTuple):
    """Where a setting stands: ``part`` of TrainConfig ("" for its own fields), ``field`` of the part, and its type."""

    part: str
    field: str
    type: Any


def flag_of(field: str, hint: Any) -> str:
    """The flag of the setting ``field``, whose type is ``hint``, with underscores: its own name or another."""
    return next((m.name for m in getattr(hint, "__metadata__", ()) if getattr(m, "name", None)), field)


def _all_settings() -> dict[str, Setting]:
    own = get_type_hints(TrainConfig, include_extras=True)
    settings = {name: Setting("", name, hint) for name, hint in own.items() if name not in PARTS}
    for part, kind in PARTS.items():
        hints = get_type_hints(kind, include_extras=True)
        settings |= {flag_of(name, hint): Setting(part, name, hint) for name, hint in hints.items()}
    return settings


SETTINGS = _all_settings()
"""Every setting of a run by the name of its flag: what flags, recipe files, searches and Python's keywords may set."""


def change(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """``config`` with other values of some settings, by the names of their flags: {"lr": 0.02, "model": "resnet18"}.

    Numbers may be written as text. Raises Refused for a name that is no setting, and for a value that it cannot have.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            hint = f"did you mean {near[0]}?" if near else "finetune101 train --help-all lists them"
            raise Refused(f"{shortened(escaped(name), 60)} is no setting; {hint}")
        part, field_name, kind = SETTINGS[name]
        several = isinstance(value, list | tuple)
        plain = [_plain(one) for one in value] if several else _plain(value)
        parts.setdefault(part, {})[field_name] = typed(kind, plain, f"{name} is")
    return _replaced(config, parts)


def _replaced(config: TrainConfig, parts: Mapping[str, Mapping[str, Any]]) -> TrainConfig:
    """``config`` with other values in its parts (part -> field -> value); "" stands for its own fields."""
    inner = {part: dataclasses.replace(getattr(config, part), **fields) for part, fields in parts.items() if part}
    return dataclasses.replace(config, **parts.get("", {}), **inner)


def _plain(value: Any) -> Any:
    """A path as text, NumPy's numbers and arrays as Python's own."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if type(value).__module__ == "numpy" else value


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(values: Any, source: str = "config.json") -> TrainConfig:
    """The inverse of ``to_dict`` for a TrainConfig; ``source`` names the file that holds ``values``.

    Raises Refused on settings that this version does not know, and on values that a setting cannot have.
    """
    remedy = "train the run again, or with the version that wrote it"
    checked(values, dict[str, Any], source, remedy=remedy)
    own = {f.name for f in dataclasses.fields(TrainConfig)}
    unknown = [key for key in values if key not in own and key != "format"]
    for part, kind in PARTS.items():
        if isinstance(values.get(part), dict):
            unknown += [f"{part}.{key}" for key in values[part].keys() - {f.name for f in dataclasses.fields(kind)}]
    if unknown:
        raise Refused(f"{source} has {min(unknown)}, which this version of finetune101 does not know; {remedy}")
    config: TrainConfig = checked(values, TrainConfig, source, remedy=remedy)
    return config


def with_settings(config: TrainConfig, values: dict[str, Any], source: str) -> TrainConfig:
    """``config`` with the parts in ``values`` (such as {"optim": {"lr": 0.02}}), which were read from ``source``.

    Numbers may be written as text (YAML reads 1e-3 as such), and one value where a list belongs. Raises Refused for a
    part or a setting that does not exist, and for a value that its setting cannot have.
    """
    for part, fields in values.items():
        if part not in PARTS:
            raise Refused(f"{source} has {_shown_name(part)}, which is no part of a recipe; {_advice(part, '', PARTS)}")
        if not isinstance(fields, dict | None):
            raise Refused(
                f"{source} has {part} = {shown(fields)}; give a table of settings, such as optim: {{lr: 0.01}}"
            )
        hints = get_type_hints(PARTS[part], include_extras=True)
        changed = {}
        for name, value in (fields or {}).items():
            if name not in hints:
                named = f"{part}.{_shown_name(name)}"
                raise Refused(f"{source} has {named}, which is no setting; {_advice(name, part, hints)}")
            changed[name] = typed(hints[name], value, f"{source} has {part}.{name} =")
        config = _replaced(config, {part: changed})
    return config


def _shown_name(name: Any) -> str:
    return shortened(escaped(f"{name}"), 60)


def _advice(name: Any, part: str, names: Iterable[str]) -> str:
    """What to write instead of ``name`` in ``part`` of a recipe, "" at its top, where ``names`` may stand."""
    word = f"{name}".replace("-", "_")
    prefix = f"{part}." if part else ""
    for own, kind in PARTS.items():
        hints = get_type_hints(kind, include_extras=True)
        if setting := next((field for field, hint in hints.items() if word in (field, flag_of(field, hint))), None):
            return f"write {own}.{setting}, as {own}: {{{setting}: ...}}"
    if near := difflib.get_close_matches(word, names, n=1):
        return f"did you mean {prefix}{near[0]}?"
    return f"use {', '.join(names)}" if not part else "see finetune101 train --help"


def read_recipe(file: str, exp: Any) -> TrainConfig:
    """A recipe file such as a search's winner.yaml as a configuration. Raises Refused as ``with_settings`` does."""
    return with_settings(TrainConfig(exp=exp, recipe=file), read_settings(Path(file)), file)


def check_bounds(settings: Any) -> None:
    """Raises Refused, naming the flag, for a value outside of the bounds that stand beside its field."""
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            check_bounds(value)
            continue
        try:
            msgspec.convert(value, hint)
        except msgspec.ValidationError as error:
            flag = flag_of(name, hint).replace("_", "-")
            value_text = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise Refused(f"--{flag} is {value_text}; give {must_be(hint)}") from error


def check_name(exp: str) -> None:
    """Raises Refused for a name of a run that cannot be that of a folder."""
    parts = exp.split("/")
    fine = not {"", ".", ".."} & set(parts) and not set(exp) & set('\\:*?"<>|') and exp.isprintable()
    if not fine or exp.startswith("~"):
        raise Refused(f"--exp {shown(exp)} cannot name a folder; use letters, digits, - and _")
    if any(len(part.encode()) > 200 for part in parts):
        raise Refused(f"--exp {shortened(exp, 40)} is too long for a folder; use at most 200 letters")


def validate(config: TrainConfig) -> None:
    """Raises Refused, in one sentence that says what to do, for a setting that cannot work."""
    check_bounds(config)
    check_name(config.exp)
    o, d, m, less = config.optim, config.data, config.model, "give less than --epochs"
    rules = [
        (m.freeze or not m.cached_features, "--cached-features needs --freeze"),
        (not (m.cached_features and config.augment.mix), "--cached-features leaves no images for --mix"),
        (m.head == "random" or not m.cached_features, "--cached-features needs --head random"),
        (m.pretrain or not m.random_layers, "--no-pretrain starts every layer at random; leave --random-layers out"),
        (
            not (m.freeze and m.random_layers),
            "--freeze would keep --random-layers as they start; leave one of them out",
        ),
        (not (m.cached_features and o.teacher), "--cached-features leaves no images for a --teacher"),
        (o.epochs >= (m.head == "random"), f"--epochs is {o.epochs}; give at least 1, or 0 with --head probe"),
        (not o.nesterov or o.momentum > 0, "--nesterov needs a --momentum above 0"),
        (o.warmup_epochs < o.epochs or o.warmup_epochs == 0, f"--warmup-epochs is {o.warmup_epochs}; {less}"),
        (d.val_size < 1 - d.test_size, f"--val-size is {d.val_size}; give a share below 1 - test size"),
    ]
    for fine, message in rules:
        if not fine:
            raise Refused(message)
