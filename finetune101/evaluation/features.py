"""Features: what the output layer of a network sees of images, with the logits of the same forward pass."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from finetune101.config import Preprocessing
from finetune101.data import store
from finetune101.data.batches import eval_batches
from finetune101.data.cache import Images
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.evaluation.forward import Forward, logits
from finetune101.machine import World
from finetune101.models.build import state_hash

BATCH = 64  # images per forward pass
FUSED = "fused 4"  # the version of fast/inference.py, whose features differ by rounding


Asked = tuple[nn.Module, int, Preprocessing, Images, Sequence[str], World, bool]
"""The parameters of ``kept_outputs``."""


class FeatureExtractor:
    """Features and logits of images by one forward pass of a trained network, in its recorded number format.

    Features are the input of the output layer: the pooled values of a CNN, the class token of a ViT. For SqueezeNet,
    whose output layer comes before the pooling, they are the pooled input of that layer. ``width`` is their number D.
    """

    def __init__(self, network: TrainedNetwork) -> None:
        self.network = network
        self.model = copy.deepcopy(network.model).eval()
        layer = self.model.get_submodule(network.head)
        self.width = network.width
        self.model.set_submodule(network.head, _WithInput(layer))
        self._forward = Forward(self.model, network.world, fast=network.fast_kernels)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, size, size) on the world's device -> features (N, D), logits (N, classes): float32, there.

        The logits are those of ``TrainedNetwork.forward``.
        """
        return self._divided(self._forward(x))

    def of_images(self, images: Images, paths: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (N, D) and logits (N, classes) of ``paths`` of a data set, float32 on the CPU.

        Both are kept in the cache folder (see ``kept_outputs``); a progress bar shows the work of the first use.
        """
        return self._divided(kept_outputs(*self._asked(images, paths)).values)

    def has_kept(self, images: Images, paths: Sequence[str]) -> bool:
        """Whether ``of_images`` finds its result in the cache folder."""
        return images.pixels is not None and store.read_array(_place(*self._asked(images, paths))) is not None

    def _asked(self, images: Images, paths: Sequence[str]) -> Asked:
        own, width = self.network, self.width + len(self.network.classes)
        return self.model, width, own.preprocessing, images, paths, own.world, own.fast_kernels

    def _divided(self, output: Tensor) -> tuple[Tensor, Tensor]:
        return output[:, : self.width], output[:, self.width :]


class _WithInput(nn.Module):
    """An output layer that gives its input as well: both side by side, (N, D + classes)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(x)], 1 if isinstance(self.layer, nn.Conv2d) else -1)


class Outputs(NamedTuple):
    """What a network gives for images."""

    values: Tensor
    """float32 (N, D) on the CPU."""
    unpaid: float
    """Seconds to add to the clock, so that the outputs cost what they took when they were computed."""


def kept_outputs(
    model: nn.Module,
    width: int,
    preprocessing: Preprocessing,
    images: Images,
    paths: Sequence[str],
    world: World,
    fast: bool = True,
) -> Outputs:
    """Outputs (N, ``width``) of ``model`` for the whole images ``paths``, kept in the cache folder.

    The seconds that computing took are kept beside them: a run that finds them has the same cost as the run that
    computed them, whether it read them in a moment or waited for another process. ``fast`` allows fused layers.
    """
    started = time.perf_counter()
    if images.pixels is None:  # with --cache off nothing is kept
        return Outputs(_compute(model, images, paths, world, fast), 0.0)
    place = _place(model, width, preprocessing, images, paths, world, fast)
    kept = store.read_array(place)
    with contextlib.nullcontext() if kept else store.turn(place):
        kept = kept or store.read_array(place)  # another process may have computed them meanwhile
        if kept is None:
            computing = time.perf_counter()
            values = _compute(model, images, paths, world, fast)
            seconds = time.perf_counter() - computing
            if not store.make_room(place):
                with contextlib.suppress(Refused):  # on a full disk
                    store.keep_array(place, [values.numpy()], f"{len(paths):,} images seen by a network", seconds)
            return Outputs(values, seconds - (time.perf_counter() - started))
    return Outputs(torch.from_numpy(kept.array), kept.seconds - (time.perf_counter() - started))


def _place(
    model: nn.Module,
    width: int,
    preprocessing: Preprocessing,
    images: Images,
    paths: Sequence[str],
    world: World,
    fast: bool,
) -> store.Place:
    """Where ``kept_outputs`` keeps its result: the name is a hash of everything that decides the numbers."""
    key = [images.key, *paths, state_hash(model), preprocessing, world.precision, world.device.type, fast and FUSED]
    name = hashlib.sha256("\n".join(map(str, key)).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return store.Place(f"features_{name}.npy", (len(paths), width), np.float32)


def _compute(model: nn.Module, images: Images, paths: Sequence[str], world: World, fast: bool) -> Tensor:
    """Outputs float32 (N, D) of ``model``."""
    batches = eval_batches(images, paths, [0] * len(paths), batch_size=BATCH, world=world)
    steps = -(-len(paths) // BATCH)
    result, _ = logits(model, tqdm(batches, total=steps, desc="features", unit="batch", leave=False), world, fast=fast)
    return result
