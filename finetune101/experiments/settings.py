"""The settings of a study and of a search, with their defaults; imports no torch, so that ``--help`` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from finetune101.config import Count, Pixels, Positive, Seed, Threads


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
    seeds: Count = 3
    """Runs of each arm on each split, with seeds 0, 1, ..."""
    splits: Count = 1
    """Number of splits, with seeds from --split-seed on."""
    train_per_class: tuple[Count, ...] = ()
    """Training images per class (standard), such as 1,2,5,10,20,30, each in the steps of the largest. Default: all."""
    finetune_recipe: str | None = None
    """Recipe of the arm finetune: a name, or a file such as a search's winner.yaml. Default: finetune."""
    scratch_recipe: str | None = None
    """Recipe of the arm scratch: a name, or a file. Default: scratch_long on a GPU, else scratch_fast."""
    probe_recipe: str = "probe"
    """Recipe of the arm probe: a name, or a file such as a search's winner.yaml."""
    epochs: Count | None = None
    """Epochs of every arm that trains all layers. Default: its recipe's."""
    scratch_epochs: Count | None = None
    """Epochs of the arm scratch, which takes far longer than the others. Default: --epochs, then its recipe's."""
    batch_size: Count | None = None
    """Images per step. Default: the recipe's."""
    size: Pixels | None = None
    """Height and width of the input in pixels. Default: the recipe's, then the network's own."""
    probe_l2: Positive = 0.003
    """L2 penalty of a linear output layer whose recipe leaves the choice to validation, with --train-per-class."""
    data: str | None = None
    """Folder with one folder per class (or its parent)."""
    protocol: Literal["reference", "standard", "folders"] = "reference"
    """The split, without --train-per-class."""
    split_seed: Seed = 42
    """Seed of the first split."""
    max_test_per_class: Count | None = None
    """At most this many test images per class (standard)."""
    threads: Threads | None = None
    """CPU threads of a run. Default: all cores, shared by --jobs."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What trains the runs of a study or a search."""

    jobs: int | None = None
    """Runs at a time. Default: 1, on a cluster as many as it has room for."""
    cluster: str | None = None
    """Train on a Ray cluster: auto, or its address. See docs/cluster.md."""
    gpus_per_run: float = 0.0
    """GPUs of a run on a cluster, such as 1 or 0.5."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(WorkerOptions):
    """A search: which points are tried, how, and for how long."""

    grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE,VALUE,... to try, or a range NAME=LOW..HIGH or NAME=LOW..HIGH:log for random and tpe. Repeat it."""
    space: str | None = None
    """YAML or TOML file: a list or a range for each name. Default without --grid: the original's 72 combinations."""
    stage: Literal["all", "probe"] = "all"
    """probe: search for the output layer alone, on frozen features computed once; a trial takes seconds."""
    budget: str | None = None
    """Finish within this time, such as 30m or 2h. Alone it also chooses what to search: the output layer, the recipe
    itself, what lies around the recipe by tpe and halving, then seeds for the best two."""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """Which points: all combinations, random ones, or what the scores so far suggest."""
    pruner: Literal["none", "median", "halving"] = "none"
    """Stop bad points early: halving gives each a short schedule, and of every four the best one the whole schedule;
    median stops a run below the median of the others at the same share of its schedule."""
    trials: int | None = None
    """How many points. Default: the whole grid, or what the budget allows."""
    finalists: int = 0
    """Train this many of the best again with several seeds; the best mean wins."""
    seeds: int = 3
    """Seeds of each finalist."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say how many trials there are and about how long they take, then stop."""

    @property
    def is_automatic(self) -> bool:
        """Whether the budget chooses what to search and how."""
        return self.budget is not None and not (self.grid or self.space) and self.stage == "all"


USUAL_SEARCH, USUAL_WORKERS = SearchOptions(), WorkerOptions()
