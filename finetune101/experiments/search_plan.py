"""What to search, and how: checked before anything is trained."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finetune101.config import AugmentConfig, ModelConfig, TrainConfig
from finetune101.errors import Refused
from finetune101.experiments.point_run import split_hash
from finetune101.experiments.settings import SearchOptions
from finetune101.experiments.space import Point, Range, Space, around, described, own_point, points
from finetune101.experiments.stage import Pruner, Sampler
from finetune101.models.table import lookup
from finetune101.training.resume import essence

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MOST = 1000  # points that a budget alone bounds
ETA = 4
"""Of so many points one goes on to the whole schedule."""
SHORT = 1 / ETA**2
"""Share of the epochs that the first schedule has, with halving; one epoch at least."""


def seconds(text: str) -> float:
    """A time such as 90s, 30m or 2h in seconds. Raises Refused for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not match or float(match[1]) == 0:
        raise Refused(f"--budget {text} is no time; write it like 90s, 30m or 2h")
    return float(match[1]) * UNITS[match[2]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to search, and how."""

    base: TrainConfig
    space: Space
    sampler: Sampler = "grid"
    pruner: Pruner = "none"
    trials: int | None = None
    """How many points. Default: the whole grid, or what the budget allows."""
    budget: float | None = None
    """Seconds in which the winner is trained, validated and written."""
    finalists: int = 0
    """So many of the best are trained with several seeds; the best mean wins."""
    seeds: int = 3
    jobs: int = 1
    """Worker processes."""
    first: tuple[Point, ...] = ()
    """Points to try before those that are drawn."""
    probe: TrainConfig | None = None
    """Train this before anything else: the output layer alone, which fine-tuning has to beat."""

    @property
    def folder(self) -> Path:
        """Where everything about the search is."""
        return Path(self.base.runs) / self.base.exp

    def shares(self) -> list[float]:
        """The share of the epochs that each rung trains: with halving a short one comes first."""
        epochs = self.base.optim.epochs
        return [max(SHORT, 1 / epochs), 1.0] if self.pruner == "halving" and epochs > 1 else [1.0]

    def points(self) -> list[Point]:
        """The points of the first rung; {} is one that the sampler draws. Raises Refused for a grid of ranges."""
        if self.sampler != "grid":
            drawn = self.trials if self.trials else MOST
            return [*self.first, *[{}] * (drawn - len(self.first))][:drawn]
        grid = points(self.space)
        if self.trials or self.budget or self.pruner != "none":  # a part of a grid in order would be a corner of it
            order = np.random.default_rng(self.base.system.seed).permutation(len(grid))
            grid = [grid[i] for i in order]
        return grid[: self.trials]


def check_plan(plan: Plan) -> None:
    """Raises Refused, in one sentence that says what to do, for a plan that cannot work."""
    bounded = plan.sampler == "grid" or plan.trials or plan.budget
    rules = [
        (plan.trials is None or plan.trials >= 1, f"--trials is {plan.trials}; give at least 1"),
        (bounded, f"--sampler {plan.sampler} goes on for ever; add --trials such as 20, or --budget such as 1h"),
        (plan.jobs >= 1, f"--jobs is {plan.jobs}; give at least 1"),
        (plan.finalists >= 0, f"--finalists is {plan.finalists}; give 0 or more"),
        (plan.seeds >= 1, f"--seeds is {plan.seeds}; give at least 1"),
        (plan.base.data.fit_on == "train", "a search chooses by validation images; leave --fit-on train+val out"),
        (plan.base.optim.val_every == 1, "a search compares trials at every epoch; leave --val-every out"),
    ]
    for fine, message in rules:
        if not fine:
            raise Refused(message)
    models = plan.space.get("model", [])
    for name in models if isinstance(models, list) else []:
        lookup(name)
    plan.points()


def search_name(plan: Plan) -> str:
    """Names the search: another base, split, space, sampler or pruner is another one (the runs are shared by all)."""
    parts = [essence(plan.base), split_hash(plan.base.data), described(plan.space), plan.sampler, plan.pruner]
    text = json.dumps(parts)
    return f"{plan.base.exp}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def make_plan(config: TrainConfig, space: Space, options: SearchOptions) -> Plan:
    """The plan of ``options``; where the budget alone is given: probe, tpe, halving and seeds for the best two."""
    budget = None if options.budget is None else seconds(options.budget)
    if epochs := space.get("epochs"):  # the base's are no point's: time is reckoned for the longest one
        most = epochs.high if isinstance(epochs, Range) else max(epochs)
        config = replace(config, optim=replace(config.optim, epochs=int(most)))
    plan = Plan(
        base=config, space=space, sampler=options.sampler, pruner=options.pruner, trials=options.trials,
        budget=budget, finalists=options.finalists, seeds=options.seeds, jobs=options.jobs or 1,
    )  # fmt: skip
    if not options.is_automatic or space != around(config):
        return plan
    return replace(
        plan,
        sampler="tpe" if plan.sampler == "grid" else plan.sampler,
        pruner="halving" if plan.pruner == "none" else plan.pruner,
        finalists=plan.finalists or 2,
        probe=probe_of(config),
        first=(own_point(config, space),),
    )


def probe_of(config: TrainConfig) -> TrainConfig | None:
    """The output layer alone on the network of ``config``; None for a network that starts from random weights."""
    if not config.model.pretrain:
        return None
    optim = replace(config.optim, epochs=0, warmup_epochs=0.0, teacher=())
    model = replace(config.model, head="probe", probe_l2=ModelConfig().probe_l2, freeze=False)
    return replace(config, recipe="probe", model=model, optim=optim, augment=AugmentConfig())
