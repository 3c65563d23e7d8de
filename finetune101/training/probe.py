"""A linear head on frozen features: the first stage of fine-tuning, and a recipe of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune101.data.cache import Images
from finetune101.errors import Refused
from finetune101.evaluation.features import Outputs, kept_outputs
from finetune101.machine import World
from finetune101.models.build import Built, feature_width
from finetune101.training.optim import Lbfgs

Labelled = tuple[Sequence[str], Sequence[int]]


def check_linear(built: Built, penalties: Sequence[float], validates: bool) -> None:
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
    validation loss. Returns what the record of the run shows, and ``unpaid`` (see ``Outputs``), which is for its
    seconds. ``check_linear`` refuses the networks that this cannot work with.
    """
    head = built.output_layer
    assert isinstance(head, nn.Linear)
    paths = [*train[0], *(val[0] if val else ())]
    both, unpaid = features(built, images, paths, world, fast)
    x, x_val = both.split([len(train[0]), len(paths) - len(train[0])])
    y = torch.tensor(train[1])
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    heads, solution = [], None
    standard = (x - mean) / std
    for l2 in sorted(penalties, reverse=True):  # from strong to weak, each from the solution before
        solution = solve(standard, y, head.out_features, l2, solution)
        weight = solution[:-1].T / std
        bias = solution[-1] - weight @ mean
        score = (0.0, 0.0)
        if val:
            output, target = F.linear(x_val, weight, bias), torch.tensor(val[1])
            score = float((output.argmax(1) == target).float().mean()), -float(F.cross_entropy(output, target))
        heads.append((score, l2, weight, bias))
    _, l2, weight, bias = max(heads, key=lambda head: head[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    output = F.linear(x, weight, bias)
    correct = float((output.argmax(1) == y).float().mean())
    loss = float(F.cross_entropy(output, y))
    return {"train_loss": loss, "train_top1": 100 * correct, "probe_l2": l2, "unpaid": unpaid}


def solve(x: Tensor, y: Tensor, classes: int, l2: float, start: Tensor | None = None, steps: int = 100) -> Tensor:
    """The minimum of mean cross-entropy + l2 / 2 * |weight|^2: (D + 1, classes), the last row is the bias.

    x (N, D) float32, y (N,) int64; ``start`` is an earlier solution.
    """
    weight = torch.zeros(x.shape[1] + 1, classes) if start is None else start.clone()
    weight.requires_grad_()
    optimizer = Lbfgs([weight], max_iter=steps, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight[:-1] + weight[-1], y) + 0.5 * l2 * (weight[:-1] ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def features(built: Built, images: Images, paths: Sequence[str], world: World, fast: bool = True) -> Outputs:
    """What the head of ``built.model`` sees of the whole images ``paths``, kept in the cache folder."""
    model = copy.deepcopy(built.model).eval()
    model.set_submodule(built.head.rstrip("."), nn.Identity())
    return kept_outputs(model, feature_width(built.output_layer), built.preprocessing, images, paths, world, fast)
