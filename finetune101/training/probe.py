"""A linear head on frozen features: the first stage of fine-tuning, and a recipe of its own."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from finetune101.data.batches import eval_batches
from finetune101.data.cache import Images
from finetune101.errors import Refused
from finetune101.evaluation.forward import logits
from finetune101.files import atomic, cache_dir
from finetune101.models.build import Built, state_hash
from finetune101.world import World

BATCH = 64  # images per forward pass
FUSED = "fused 4"  # the version of evaluation/fused, whose features differ by rounding

Labelled = tuple[Sequence[str], Sequence[int]]


def check(built: Built, penalties: Sequence[float], validates: bool) -> None:
    """Raises Refused when the network does not end in a linear layer, or nothing can choose between penalties."""
    if not isinstance(built.output_layer, nn.Linear):
        raise Refused("this network does not end in a linear layer; take --head random or another --model")
    if not validates and len(penalties) > 1:
        raise Refused("without validation images nothing can choose between --probe-l2 values; give one")


def fit_head(
    built: Built,
    images: Images,
    train: Labelled,
    val: Labelled | None,
    penalties: Sequence[float],
    world: World,
    fast: bool = True,
) -> dict[str, Any]:
    """Sets the head of ``built.model`` to the best linear classifier of its frozen features.

    Multinomial logistic regression on standardised features of whole images, by L-BFGS (Liu & Nocedal, 1989), for each
    of the L2 ``penalties``; the one with the highest validation accuracy is kept, of equals the one with the lowest
    validation loss. Returns what the record of the run shows. ``check`` says what it cannot work with.
    """
    head = built.output_layer
    assert isinstance(head, nn.Linear)
    shown = [*train[0], *(val[0] if val else ())]
    x, x_val = features(built, images, shown, world, fast).split([len(train[0]), len(shown) - len(train[0])])
    y = torch.tensor(train[1])
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    found, solution = [], None
    standard = (x - mean) / std
    for l2 in sorted(penalties, reverse=True):  # from strong to weak, each from the solution before
        solution = solve(standard, y, head.out_features, l2, solution)
        weight = solution[:-1].T / std
        bias = solution[-1] - weight @ mean
        score = (0.0, 0.0)
        if val:
            output, target = F.linear(x_val, weight, bias), torch.tensor(val[1])
            score = float((output.argmax(1) == target).float().mean()), -float(F.cross_entropy(output, target))
        found.append((score, l2, weight, bias))
    _, l2, weight, bias = max(found, key=lambda one: one[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    output = F.linear(x, weight, bias)
    correct = float((output.argmax(1) == y).float().mean())
    return {"train_loss": float(F.cross_entropy(output, y)), "train_top1": 100 * correct, "probe_l2": l2}


def solve(x: Tensor, y: Tensor, classes: int, l2: float, start: Tensor | None = None, steps: int = 100) -> Tensor:
    """The minimum of mean cross-entropy + l2 / 2 * |weight|^2: (D + 1, classes), the last row is the bias.

    x (N, D) float32, y (N,) int64; ``start`` is an earlier solution.
    """
    weight = torch.zeros(x.shape[1] + 1, classes) if start is None else start.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight[:-1] + weight[-1], y) + 0.5 * l2 * (weight[:-1] ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def features(built: Built, images: Images, paths: Sequence[str], world: World, fast: bool = True) -> Tensor:
    """What the head of ``built.model`` sees of whole images: float32 (N, D) on the CPU, kept in the cache folder.

    ``fast`` allows ``evaluation.fused``.
    """
    model = copy.deepcopy(built.model).eval()
    model.set_submodule(built.head.rstrip("."), nn.Identity())
    key = [
        images.key,
        *paths,
        state_hash(model),
        built.preprocessing,
        world.precision,
        world.device.type,
        fast and FUSED,
    ]
    name = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:16]
    file = cache_dir() / f"features_{name}.npy"
    if images.pixels is not None and file.is_file():
        return torch.from_numpy(np.load(file))
    batches = eval_batches(images, paths, [0] * len(paths), batch_size=BATCH, world=world)
    steps = -(-len(paths) // BATCH)
    result, _ = logits(model, tqdm(batches, total=steps, desc="features", unit="batch", leave=False), world, fast=fast)
    if images.pixels is not None:  # with --cache off nothing is kept
        with contextlib.suppress(Refused), atomic(file) as part, open(part, "wb") as opened:  # as on a full disk
            np.save(opened, result.numpy())
    return result
