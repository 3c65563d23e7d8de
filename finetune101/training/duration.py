"""How long trainings will take on this machine: measured by a few real steps on noise, of which no file stays."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from finetune101.config import DataConfig, Preprocessing, TrainConfig
from finetune101.data import cache, splits
from finetune101.data.decode import decode, in_threads
from finetune101.data.images import Index
from finetune101.errors import Refused
from finetune101.fast import tune_allocator
from finetune101.files import cache_dir
from finetune101.host import usable_cores
from finetune101.machine import World, detect, use_cores
from finetune101.models.build import Built, build, freeze
from finetune101.run import Run
from finetune101.training import probe
from finetune101.training.distill import Teachers, open_teachers
from finetune101.training.forecast import in_words
from finetune101.training.job import Job
from finetune101.training.loop import Trainer
from finetune101.training.sources import ImageBatches

SAMPLE = 24  # images whose decoding is timed
SOLUTIONS = 15  # evaluations of the loss, for each penalty, that solve the output layer
LONG_ENOUGH = 2.0  # seconds of training steps, after the first, that make a measurement


@dataclass(frozen=True)
class Counts:
    """Images of a split."""

    train: int
    val: int
    test: int

    @property
    def all(self) -> int:
        """Images of all subsets."""
        return self.train + self.val + self.test


@dataclass(frozen=True)
class Work:
    """A run to come."""

    config: TrainConfig
    images: Counts
    tested: bool = False
    """Whether its test images are scored as well."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds that the parts of one kind of run take on this machine."""

    start: float
    """Before the first step and after the last one, without decoding."""
    step: dict[int | None, float]
    """The training step, per image, by the size of the images; None is the size of the network."""
    forward: float
    """Validation or test, per image."""
    features: float
    """Computing frozen features, per image."""
    solution: float
    """Solving the output layer, per image."""
    epoch: float
    """Writing the checkpoints of an epoch."""

    def of(self, work: Work) -> float:
        """Seconds of a run, without decoding and frozen features, which runs share."""
        config, images = work.config, work.images
        epochs, every = config.optim.epochs, config.optim.val_every
        scored = config.data.fit_on == "train"
        train = images.train if scored else images.train + images.val
        sizes = [config.augment.size_at(epoch, epochs) for epoch in range(1, epochs + 1)]
        validated = sum(epoch % every == 0 or epoch == epochs for epoch in range(1, epochs + 1)) if scored else 0
        seconds = self.start + self.epoch * epochs + train * sum(self.step[size] for size in sizes)
        if not config.model.cached_features:
            seconds += validated * images.val * self.forward
        if config.model.head == "probe":
            seconds += train * self.solution + (images.val * self.forward if scored else 0)
        return seconds + ((images.test + images.val) * self.forward if work.tested else 0)


def count(index: Index, data: DataConfig) -> Counts:
    """The sizes of the split that ``data`` makes of ``index``; about, as near-duplicates are not looked for.

    Raises Refused as ``splits.make_split`` does.
    """
    manifest = splits.read_split(Path(data.split)) if data.split else splits.make_split(index, data)
    return Counts(*(len(manifest.subsets[name]) for name in splits.SUBSETS))


def kind(config: TrainConfig) -> str:
    """A key of what decides the pace of a run: equal for runs that differ in rates and seeds only."""
    o, s = config.optim, dataclasses.replace(config.system, seed=0)
    return repr((config.model, config.augment, o.batch_size, o.ema > 0, o.teacher, s))


def step_kind(config: TrainConfig) -> str:
    """A key of what decides the pace of a run most: its network, sizes and batches. Augmentation is left out."""
    return repr((config.model, config.augment.train_sizes, config.optim.batch_size))


def duration_text(works: Sequence[Work], index: Index, jobs: int = 1, budget: float = 15.0) -> str:
    """How long ``works`` take, in a sentence; ``jobs`` of them run at a time.

    Kinds of runs are measured until ``budget`` seconds are over; the others are guessed from the nearest kind. Raises
    Refused where no network or size of ``works`` is possible.
    """
    paces: dict[str, tuple[TrainConfig, Pace]] = {}
    impossible: dict[str, Refused] = {}
    started, guessed, total = time.perf_counter(), 0, 0.0
    shared: dict[str, float] = {}  # what the first of several runs does for all
    trained: Counter[str] = Counter()  # images of each kind, an image as often as it is trained on
    for work in works:
        trained[kind(work.config)] += work.images.train * work.config.optim.epochs
    with undisturbed():
        for work in works:
            key = kind(work.config)
            if key not in paces and key not in impossible:
                late = bool(paces) and time.perf_counter() - started > budget
                try:
                    guess = _nearest(work.config, list(paces.values())) if late else None
                    paces[key] = work.config, guess or measure(work.config, len(index.classes), trained[key])
                    guessed += late
                except Refused as error:  # said below, and when its turn comes
                    impossible[key] = error
            if key in paces:
                total += paces[key][1].of(work)
                _add_shared(shared, work, paces[key][1], index)
        total += sum(shared.values())
    if not paces:
        raise next(iter(impossible.values()))
    first = works[0].config.system
    at_once = min(jobs, usable_cores() // (first.threads or 1)) if detect(first).device.type == "cpu" else 1
    text = f"This takes about {in_words(total / max(1, min(at_once, len(works))))}, from a few steps of "
    text += f"{len(paces) - guessed} kind{'s' * (len(paces) - guessed != 1)} of run"
    text += f"; {guessed} more are guessed." if guessed else "."
    return " ".join([text, *(f"Cannot be trained: {error}." for error in impossible.values())])


def _add_shared(shared: dict[str, float], work: Work, pace: Pace, index: Index) -> None:
    """Adds to ``shared`` the seconds of decoding and features that ``work`` needs and no earlier run has computed."""
    model, images = work.config.model, work.images
    built = _shape(work.config)
    key = f"decode {built.cache_size} {built.interpolation}"
    if key not in shared and work.config.data.cache == "auto":
        is_decoded = _is_decoded(built.cache_size, len(index.paths), images.all)
        shared[key] = 0.0 if is_decoded else decode_seconds(index, built) * images.all
    compared = work.tested or (work.config.data.protocol == "standard" and work.config.data.group_duplicates)
    if compared and "duplicates" not in shared and not list(cache_dir().glob("thumbnails_*")):
        shared["duplicates"] = decode_seconds(index, built) * len(index.paths)
    if model.cached_features or model.head == "probe":
        of = f"features {model.name} {model.size} {model.cache_size} {work.config.data.split_seed} {images}"
        shared.setdefault(of, pace.features * (images.train + images.val))


_SHAPES: dict[str, Preprocessing] = {}


def _shape(config: TrainConfig) -> Preprocessing:
    m = config.model
    key = repr((m.name, m.size, m.cache_size))
    if key not in _SHAPES:
        _SHAPES[key] = build(m.name, 2, pretrain=False, size=m.size, cache_size=m.cache_size).preprocessing
    return _SHAPES[key]


def _is_decoded(size: int, *counts: int) -> bool:
    """Whether the cache folder holds as many decoded images of this size: judged by its bytes, without a hash."""
    wanted = [count * size * size * 3 for count in counts]
    files = [file.stat().st_size for file in cache_dir().glob(f"*{size}px*")]
    return any(0 <= have - need < 2**16 for have in files for need in wanted)


def decode_seconds(index: Index, shape: Preprocessing) -> float:
    """Seconds that one image of ``index`` takes to decode, with all cores at work; unreadable images are left out."""
    chosen = random.Random(0).sample(list(index.paths), min(SAMPLE, len(index.paths)))

    def is_read(path: str) -> bool:
        with contextlib.suppress(Refused):
            decode(index.root / path, shape.cache_size, shape.interpolation)
            return True
        return False

    started = time.perf_counter()
    count = sum(in_threads(is_read, chosen))
    return (time.perf_counter() - started) / max(count, 1)


class Noise:
    """Noise in the place of ``cache.Images``: the time of a step does not depend on what the pixels show."""

    def __init__(self, paths: Sequence[str], preprocessing: Preprocessing) -> None:
        self.paths, self.preprocessing, self.key = tuple(paths), preprocessing, ""
        side = preprocessing.cache_size
        self._some = np.random.default_rng(0).integers(0, 256, (8, side, side, 3), dtype=np.uint8)
        self.pixels: cache.Pixels | None = self._some  # other processes may prepare them, as of a cache

    def read(self, paths: Sequence[str]) -> cache.Pixels:
        """uint8 (N, cache_size, cache_size, 3)."""
        return self._some[[i % len(self._some) for i in range(len(paths))]]


def measure(config: TrainConfig, classes: int, images: float = math.inf) -> Pace:
    """The pace of ``config`` on ``classes`` classes: a few steps of the real training, on noise.

    It takes a small share of the time that training on ``images`` takes. Raises Refused for a network, a size or a
    teacher that cannot be.
    """
    world = detect(config.system)
    use_cores(config.system.threads)  # as the training would
    largest = max([_shape(config).size, *config.augment.train_sizes])
    enough = max(16, round(64 * (112 / largest) ** 2))  # beyond, what a step does once no longer counts on a CPU
    batch = max(2, min(config.optim.batch_size, enough if world.device.type == "cpu" else config.optim.batch_size))
    optim = dataclasses.replace(config.optim, batch_size=batch, teacher=())
    data = dataclasses.replace(config.data, fit_on="train")
    started = time.perf_counter()
    if config.system.fast_kernels:
        tune_allocator()
    m = config.model
    built = build(m.name, classes, pretrain=False, size=m.size, cache_size=m.cache_size)
    if m.freeze:
        freeze(built.model, built.head)
    ready = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        trial = dataclasses.replace(config, exp="pace", runs=folder, optim=optim, data=data)
        teachers = open_teachers(config, built.preprocessing, world)  # whatever their split
        job = _job(trial, built, world, batch, classes, teachers)
        forward = _forward(job)
        features = _features(job) if m.cached_features or m.head == "probe" else 0.0
        solution = _solution(job, features, classes) if m.head == "probe" else 0.0
        step, record = _steps(job, batch, classes, images)
        began = time.perf_counter()
        if record:
            model = dataclasses.replace(trial.model, cached_features=False)  # writing needs no features
            trainer = Trainer(dataclasses.replace(job, config=dataclasses.replace(trial, model=model)))
            trainer.finish_epoch(record | {"val_loss": 1.0, "val_top1": 1.0, "val_seconds": 0.0})
        wrote = time.perf_counter() - began
    return Pace(
        start=2 * ready + 0.5, step=step, forward=forward, features=features, solution=solution, epoch=wrote + 0.05
    )


def _job(config: TrainConfig, built: Built, world: World, images: int, classes: int, teachers: Teachers | None) -> Job:
    """A job on ``images`` training images of noise, and as many validation images."""
    names = [f"c{i}" for i in range(classes)]
    subsets = {
        part: tuple(f"{names[i % classes]}/{part}{i}.jpg" for i in range(images)) for part in ("train", "val")
    } | {"test": ()}
    manifest = splits.Manifest(
        protocol="reference", seed=0, options={}, classes=tuple(names), content_hash="", subsets=subsets
    )
    noise: Any = Noise([path for paths in subsets.values() for path in paths], built.preprocessing)
    run = Run(Path(config.runs) / config.exp)
    run.write_json("config.json", {})  # without it the folder would be no run's any more
    return Job(config=config, run=run, world=world, manifest=manifest, images=noise, built=built, teachers=teachers)


def _steps(job: Job, batch: int, classes: int, images: float) -> tuple[dict[int | None, float], dict[str, Any]]:
    """Seconds of the training step per image, by size, without the first step; and the last record."""
    config, per_image, record = job.config, dict[int | None, float](), dict[str, Any]()
    epochs = config.optim.epochs
    sizes = {config.augment.size_at(epoch, epochs): epoch for epoch in range(epochs, 0, -1)}
    for size, epoch in sizes.items():
        steps = 1
        for number in range(3):  # to warm up, to know the pace, and long enough
            longer = _job(config, job.built, job.world, steps * batch, classes, job.teachers)
            trainer = Trainer(longer)
            trainer.wrap()
            with contextlib.suppress(Refused), tqdm(disable=True) as bar:  # noise may diverge
                record = trainer.train_epoch(epoch, trainer.source.train([epoch]), bar)
            seconds = float(record.get("seconds", 0.0))
            per_image[size] = seconds / (steps * batch)
            enough = min(LONG_ENOUGH, 0.05 * per_image[size] * images)
            if number and seconds >= enough:
                break
            steps = min(64, math.ceil(enough / max(seconds / steps, 1e-3))) if number else 1 + 2 * (seconds < 3)
    return per_image, record


def _forward(job: Job) -> float:
    """Seconds of validation per image, the better of two tries."""
    model = job.built.model.to(job.world.device, memory_format=job.world.memory_format)  # type: ignore[call-overload]
    source, tries = ImageBatches(job, *job.trained_on), []
    for _ in range(2):
        started = time.perf_counter()
        source.val_logits(model)
        tries.append(time.perf_counter() - started)
    return min(tries) / len(job.manifest.subsets["val"])


def _features(job: Job) -> float:
    """Seconds of frozen features per image, without the cost of the start."""
    paths, took = job.manifest.subsets["train"], []
    without_cache: Any = Noise(job.images.paths, job.images.preprocessing)
    without_cache.pixels = None  # so that nothing is kept of them
    for times in (1, 3):
        started = time.perf_counter()
        probe.features(job.built, without_cache, paths * times, job.world, job.config.system.fast_kernels)
        took.append(time.perf_counter() - started)
    return max(took[1] - took[0], 0.1 * took[1]) / (2 * len(paths))


def _solution(job: Job, features: float, classes: int) -> float:
    """Seconds of solving the output layer, per image."""
    width = getattr(job.built.output_layer, "in_features", 1024)
    x, y = torch.randn(512, width), torch.arange(512) % classes
    probe.solve(x, y, classes, 0.01, steps=1)
    started = time.perf_counter()
    probe.solve(x, y, classes, 0.01, steps=4)
    evaluation = (time.perf_counter() - started) / 5
    return SOLUTIONS * len(job.config.model.probe_l2) * evaluation / 512


def _nearest(config: TrainConfig, measured: Sequence[tuple[TrainConfig, Pace]]) -> Pace:
    """A guess for ``config`` from ``measured`` runs, in proportion to the pixels; of the same network if possible."""
    own = [pair for pair in measured if pair[0].model.name == config.model.name] or list(measured)
    like, pace = own[0]
    mean = statistics.mean(pace.step.values()) if pace.step else pace.forward
    scale = (_shape(config).size / _shape(like).size) ** 2
    sizes = {config.augment.size_at(epoch, config.optim.epochs) for epoch in range(1, config.optim.epochs + 1)}
    return dataclasses.replace(
        pace,
        step={size: mean * ((size / _shape(like).size) ** 2 if size else scale) for size in sizes},
        forward=pace.forward * scale,
        features=(pace.features or pace.forward) * scale,
    )


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restores PyTorch's random state and number of threads after the block."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        torch.set_num_threads(threads)


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """In the block the cache folder is a copy (by links), which is removed afterwards."""
    real, before = cache_dir(), os.environ.get("FINETUNE101_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        for file in real.iterdir() if real.is_dir() else ():
            if file.is_dir() and file.match("kernels_*"):  # loaded from private files only
                with contextlib.suppress(OSError):
                    shutil.copytree(file, Path(folder) / file.name)
            elif file.is_file():
                with contextlib.suppress(OSError):
                    os.symlink(file.resolve(), Path(folder) / file.name)
        os.environ["FINETUNE101_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("FINETUNE101_CACHE")
            if before is not None:
                os.environ["FINETUNE101_CACHE"] = before
