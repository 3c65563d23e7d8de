"""What the parts share: drawn images, small trainings of five kinds, and how a disturbed one is judged."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recorded import learned

from faults.process import Changes, Ended, Fresh, Process, command, module

Case = tuple[str, str]
"""What was done, and what was wrong with it: "" for nothing."""

SMALL = [
    "--no-pretrain", "--recipe", "original", "--model", "timm:test_efficientnet", "--size", "32", "--batch-size", "8",
    "--threads", "1", "--val-size", "0.2", "--epochs", "6", "--lr", "0.003",
]  # fmt: skip
KINDS = {
    "scratch": ["--schedule", "cosine", "--warmup-epochs", "1"],
    "probe": ["--head", "probe", "--probe-l2", "0.01", "0.1", "--ema", "0.9", "--lr", "0.0003"],
    "mixed": ["--mix", "0.5", "--policy", "trivial", "--erasing", "0.3", "--crop-scale", "0.5", "--val-every", "3"],
    "features": ["--freeze", "--cached-features"],
    "train+val": ["--fit-on", "train+val"],
}
"""Name -> what makes a training one of its kind."""


@dataclass(frozen=True)
class Answer:
    """What a training came to: everything that a resumed one must come to as well."""

    metrics: list[list[Any]]
    weights: str
    predictions: list[tuple[str, ...]]
    seconds: float = 0.0
    """How long the training took."""

    def difference(self, other: Answer) -> str:
        """Where ``other`` differs, in words; "" where it does not."""
        if self.metrics != other.metrics:
            pairs = zip(self.metrics, other.metrics, strict=False)
            return f"metrics differ: {next((pair for pair in pairs if pair[0] != pair[1]), 'their number')}"
        return "weights differ" * (self.weights != other.weights) or "predictions differ" * (
            self.predictions != other.predictions
        )


@dataclass
class Bench:
    """A folder to work in, drawn images, and the undisturbed trainings; ``notes`` counts what a part wants told."""

    folder: Path
    data: Path
    rng: random.Random
    keep: Path | None = None
    """Where the folders of hostile files are kept that were not read well."""
    notes: Counter[str] = field(default_factory=Counter)
    _answers: dict[str, Answer] = field(default_factory=dict)
    _number: int = 0

    def new_folder(self, name: str) -> Path:
        """An empty folder that other users can read."""
        self._number += 1
        folder = self.folder / f"{name}_{self._number}"
        folder.mkdir()
        return folder

    def cache(self, folder: Path) -> Path:
        """A cache in ``folder`` that holds the compiled kernels only, as building them takes longer than a training."""
        cache = folder / "cache"
        cache.mkdir(exist_ok=True)
        for kernels in (self.folder / "cache").glob("kernels_*"):
            shutil.copytree(kernels, cache / kernels.name, dirs_exist_ok=True)
        return cache

    @property
    def has_kernels(self) -> bool:
        """Whether trainings use the compiled kernels; a draw for the tests does without building them."""
        return any((self.folder / "cache").glob("kernels_*"))

    def kernel_bytes(self) -> int:
        """Size of the compiled kernels."""
        return sum(file.stat().st_size for file in (self.folder / "cache").rglob("*.so"))

    def words(self, kind: str, runs: Path, resume: bool = False) -> list[str]:
        """The training ``r`` of ``kind`` below ``runs``."""
        flags = ["--resume"] * resume + ["--no-fast-kernels"] * (not self.has_kernels)
        return ["train", "--exp", "r", "--runs", str(runs), "--data", str(self.data), *SMALL, *KINDS[kind], *flags]

    def answer(self, kind: str) -> Answer:
        """What an undisturbed training of ``kind`` comes to."""
        if kind not in self._answers:
            folder = self.new_folder("undisturbed")
            process = Process(command(self.words(kind, folder)), {"FINETUNE101_CACHE": str(self.cache(folder))})
            ended = process.wait()
            if ended.code:
                raise RuntimeError(f"the undisturbed training of {kind} failed: {ended.err[-2000:]}")
            seconds = time.monotonic() - process.started
            answer = self.judged(folder / "r")
            if isinstance(answer, str):
                raise RuntimeError(answer)
            self._answers[kind] = Answer(answer.metrics, answer.weights, answer.predictions, seconds)
        return self._answers[kind]

    def as_trained(self, run: Path, kind: str) -> str:
        """How the metrics and weights of a training in ``run`` differ from those of ``kind``; "" where they do not."""
        own, answer = Answer(learned(run), weights_of(run / "best.safetensors"), []), self.answer(kind)
        return Answer(answer.metrics, answer.weights, []).difference(own)

    def judged(self, run: Path) -> Answer | str:
        """What the finished training in ``run`` came to, or why it cannot be tested."""
        ended = Process(command(["evaluate", str(run), "--data", str(self.data)])).wait()
        return f"evaluate: {fault}" if (fault := ended.fault(allowed=(0,))) else answer_of(run)


def answer_of(run: Path) -> Answer:
    """Metrics, weights and predictions of a tested run."""
    with open(run / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = [(*row[:3], f"{float(row[3]):.3f}") for row in list(csv.reader(file))[1:]]
    return Answer(learned(run), weights_of(run / "best.safetensors"), rows)


def weights_of(file: Path) -> str:
    """A hash of the tensors and metadata of a checkpoint, without the temperature: ``evaluate`` may have found it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for key in ("temperature", "temperature_reason"):
        header["__metadata__"].pop(key, None)
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + content[8 + length :]).hexdigest()


def whole(run: Path) -> str:
    """Which file of a run is not whole under its final name, in words; "" where all are."""
    import torch

    for file in run.rglob("*"):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".jsonl":
                [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            elif file.suffix == ".safetensors":
                weights_of(file)
            elif file.suffix == ".pt":
                torch.load(file, weights_only=True)
        except Exception as error:  # whatever a damaged file raises
            return f"{file.name} is not whole ({error!r})"
    return ""


Strike = Callable[[Process, Path, Answer], str | None]
"""Disturbs a training in a run; what is wrong with how it ended, None where it had ended before."""


def disturbed(bench: Bench, strike: Strike, most: int, is_fresh: Callable[[], bool] = lambda: False) -> Iterator[Case]:
    """Trainings of all kinds in turn, each struck again and again and resumed each time, until ``most`` strikes.

    Yields a case for each strike; what the finished training lacks is told with its last one.
    """
    count = 0
    for kind in _kinds():
        folder, answer = bench.new_folder("disturbed"), bench.answer(kind)
        cases: list[Case] = []
        variables: Changes = {"FINETUNE101_CACHE": str(bench.cache(folder))}
        run, limit = folder / "r", min(most - count, 9)
        while True:
            words = bench.words(kind, folder, resume=(run / "config.json").is_file())
            fresh = len(cases) < limit and is_fresh()
            process = Fresh(module(*words), variables) if fresh else Process(command(words), variables)
            fault = strike(process, run, answer) if len(cases) < limit else None
            ended = process.wait()
            if fault is None:
                break
            cases.append((f"{kind}, strike {len(cases) + 1}{', fresh' * fresh}", fault))
        last = judge(bench, run, answer, ended) or left_over(folder)
        if last:
            cases = [*cases[:-1], (f"{kind}, resumed after {len(cases)} strikes", last)]
        yield from cases
        count += len(cases)
        shutil.rmtree(folder)
        if count >= most:
            return


def _kinds() -> Iterator[str]:
    while True:
        yield from KINDS


def judge(bench: Bench, run: Path, answer: Answer, ended: Ended) -> str:
    """What is wrong with a training that has ended and should equal ``answer``; "" for nothing."""
    was_done = ended.code < 0 and "Test it:" in ended.out  # the signal came while Python itself ended
    if fault := ended.fault(allowed=(0, ended.code) if was_done else (0,)):
        return fault
    result = bench.judged(run)
    return result if isinstance(result, str) else answer.difference(result)


def left_over(folder: Path) -> str:
    """The temporary files below ``folder``, in words; "" without any."""
    names = [path.name for path in folder.rglob(".*.part")]
    return f"left behind: {', '.join(names[:5])}" if names else ""


def warm_up(bench: Bench, kernels: bool = True) -> None:
    """Imports in this process what a training imports, and builds the kernels in the cache of ``bench``."""
    own = bench.folder / "cache"
    own.mkdir()
    os.environ["FINETUNE101_CACHE"] = str(own)
    for name in ("api", "cli.one_run", "cli.many_runs", "reports.figures", "reports.pages", "evaluation.evaluate"):
        importlib.import_module(f"finetune101.{name}")
    for name in ("jinja2", "scipy.ndimage", "scipy.optimize", "scipy.stats", "torch.utils.tensorboard"):
        importlib.import_module(name)  # which are imported when they are needed only
    from finetune101.models.build import build

    build("timm:test_efficientnet", 3, pretrain=False)  # no backward pass: this process forks
    importlib.import_module("finetune101.cli.one_run").training_settings(bench.words("scratch", bench.folder)[1:])
    if kernels and (ended := Process(_kernels).wait()).code:
        raise RuntimeError(f"the kernels cannot be built: {ended.err}")


def _kernels() -> int:
    from finetune101.fast import compiled

    compiled()
    return 0
