"""The tensors of a weights file under the names of their network: no code in the file runs, wrappers are taken off."""

from __future__ import annotations

import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from finetune101.errors import Refused, shown

COUNTER = "num_batches_tracked"  # batch norm's step counter: old files lack it, and no result depends on it
CONTAINERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params",
    "state_dict_ema", "ema_state_dict", "model_ema", "ema",
)  # fmt: skip
"""Under what training scripts keep the state dict beside other things, in the order in which they are asked for."""
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch.compile, DataParallel and their like put in, in front or in the middle."""
DEEPEST = 4  # containers in containers


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name: .safetensors, else a state dict saved by torch, alone or in a container.

    No code in the file is run. Raises Refused when it is missing, damaged, or holds anything but tensors.
    """
    if not Path(path).is_file():
        raise Refused(f"there is no weights file {path}; give a .safetensors file or a .pth state dict")
    if Path(path).suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # a damaged file can raise nearly anything
            raise _damaged(path) from error
    state, inside = _unwrapped(read_by_torch(Path(path)))
    if inside not in ("", "state_dict"):
        print(f"{path}: the weights are those under {inside}", file=sys.stderr)
    if not isinstance(state, Mapping) or not state or not all(map(_is_plain, state.keys(), state.values())):
        raise Refused(f"{path} is no state dict (names and tensors); save model.state_dict() with torch.save")
    return dict(state)


def check_random_layers(
    model: nn.Module, layers: Sequence[str], state: Mapping[str, Tensor], head: str, source: str
) -> None:
    """Raises Refused for one of ``layers`` that ``model`` lacks, that is all of it, or that ``state`` holds.

    The output layer ``head`` is always new, so it does not count. ``source`` names the weights ``state`` in messages.
    """
    keys = [key for key, _ in model.named_parameters()]
    for layer in layers:
        inside = [key for key in keys if key.startswith(f"{layer}.")]
        if not inside:
            names = ", ".join(name for name, part in model.named_children() if any(True for _ in part.parameters()))
            raise Refused(f"--random-layers names {shown(layer)}, which the network lacks; its parts are {names}")
        if all(key.startswith(head) for key in inside):
            raise Refused(
                f"--random-layers {layer} names the output layer, which always starts at random; leave it out"
            )
        if all(key.startswith((f"{layer}.", head)) for key in keys):
            raise Refused(f"--random-layers {layer} leaves no layer of {source}; take --no-pretrain")
        if held := next((key for key in state if key.startswith(f"{layer}.") and not key.startswith(head)), None):
            raise Refused(
                f"{source} holds {held}, so {layer} need not start at random; leave it out of --random-layers"
            )


def read_by_torch(path: Path) -> Any:
    """What torch.save wrote to ``path``, on the CPU. Raises Refused for a damaged file, code, or a bomb."""
    try:
        if zipfile.is_zipfile(path):  # torch packs nothing: what is larger inside than outside was made to fill memory
            with zipfile.ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                    raise Refused(f"{path} would unpack to more than its size, as torch.save writes none; get it again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of some foreign files, and refuses them just after
            return torch.load(path, map_location="cpu", weights_only=True)
    except Refused:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise _damaged(path) from error


def _damaged(path: str | Path) -> Refused:
    return Refused(
        f"{path} cannot be read as weights: it is damaged, or holds more than tensors (no code in it was run);"
        " get it again, or save model.state_dict() with torch.save"
    )


def _is_plain(key: Any, value: Any) -> bool:
    """Whether they are a name and a tensor of numbers in memory."""
    return (
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_complex()
        and not value.is_quantized
    )


def _unwrapped(state: Any) -> tuple[Any, str]:
    """The state dict in ``state`` and the path to it, such as "ema.module"; "" where it is ``state`` itself."""
    path: list[str] = []
    while isinstance(state, Mapping) and not all(isinstance(value, Tensor) for value in state.values()):
        inner = next((name for name in CONTAINERS if isinstance(state.get(name), Mapping) and state[name]), None)
        if inner is None or len(path) == DEEPEST:
            break
        path.append(inner)
        state = state[inner]
    return state, ".".join(path)


def without_wrappers(state: Mapping[str, Tensor], own: Collection[str], source: str) -> dict[str, Tensor]:
    """``state`` under the network's ``own`` names, where a wrapper had put something before or into them.

    Such as ``module.`` of DataParallel, ``_orig_mod.`` of torch.compile, ``model.`` of Lightning, and any mixture. What
    lies beside the network, such as a loss with weights, is left out. One line tells of it. Names that do not fit stay.
    """
    own = {name for name in own if not name.endswith(COUNTER)}
    plain = {_without_parts(key, own): value for key, value in state.items()}
    if len(plain) < len(state):  # two tensors would have one name
        plain = dict(state)
    prefix = _prefix(plain, own)
    result = {key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)}
    if not prefix and result.keys() == state.keys():
        return dict(state)
    taken = prefix or next(f"{part}." for key in state for part in WRAPPERS if part in key.split("."))
    beside = len(plain) - len(result)
    rest = f", {beside} tensors beside the network are left out" if beside else ""
    print(f"{source}: {taken!r} is taken off the names of its tensors{rest}", file=sys.stderr)
    return result


def _without_parts(key: str, own: Collection[str]) -> str:
    """``key`` without what wrappers put in; names of the network itself stay whole."""
    return key if key in own else ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _prefix(state: Mapping[str, Tensor], own: Collection[str]) -> str:
    """What stands before most of the network's names; "" where nothing does, or the file is of another network."""
    fits: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for i in range(min(len(parts), 2 * DEEPEST)):
            if ".".join(parts[i:]) in own:
                fits[".".join([*parts[:i], ""]) if i else ""] += 1
                break
    # of networks side by side one would be taken for the whole
    fits = Counter({prefix: count for prefix, count in fits.items() if not prefix.startswith("parts.")})
    best = max(fits, key=lambda prefix: (fits[prefix], -len(prefix)), default="")
    return best if fits[best] > len(own) / 2 else ""
