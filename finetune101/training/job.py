"""Settings -> a job: images, split, machine and network, checked before anything is written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from finetune101 import __version__
from finetune101.config import DataConfig, TrainConfig, to_dict, validate
from finetune101.data import cache, splits
from finetune101.data.images import Index, as_found, find_data, index_images, index_notes
from finetune101.errors import Refused, escaped
from finetune101.evaluation.evaluate import trained_subsets, validates
from finetune101.fast import compile_meanwhile, compiled, tune_allocator, without_gcc
from finetune101.files import cache_dir, claim, claimed_by, remove_abandoned
from finetune101.host import place, usable_cores
from finetune101.machine import World, join
from finetune101.models.build import Built, build_network, check_size, freeze, norms_single_values
from finetune101.redaction import command_line
from finetune101.run import Run, create_run, open_run
from finetune101.training import probe
from finetune101.training.distill import Teachers, check_teachers, open_teachers
from finetune101.training.resume import check_same, check_teachers_unchanged

LOCK = "train.lock"


class AtWork(Refused):
    """Another process trains the run."""


@dataclass(frozen=True)
class Job:
    """Everything that one training needs, put together by ``prepare``."""

    config: TrainConfig
    run: Run
    world: World
    manifest: splits.Manifest
    images: cache.Images
    built: Built
    teachers: Teachers | None = None
    notes: tuple[str, ...] = ()
    """Lines about the images for the user: which layout they have, and which are left out."""
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Keeps other processes out of the run; ``fit`` closes it at its end."""

    @property
    def validates(self) -> bool:
        """Whether there are validation images that are not trained on."""
        return validates(self.manifest, self.config.data)

    @property
    def trained_on(self) -> tuple[list[str], list[int]]:
        """Paths and labels of the images that are trained on."""
        subsets = trained_subsets(self.config.data)
        paths = [path for subset in subsets for path in self.manifest.subsets[subset]]
        return paths, [label for subset in subsets for label in self.manifest.labels(subset)]


def prepare(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> Job:
    """Everything that ``fit`` needs; writes config.json, split.json and env.json of the run last.

    No other process can train the run until ``fit`` has ended or the job is gone. Raises Refused, in one sentence that
    says what to do, for settings, data or weights that cannot work, and for a run that another process trains.
    """
    validate(config)
    run = create_run(config, resume=resume, overwrite=overwrite)
    config = dataclasses.replace(config, data=as_found(config.data))
    with contextlib.ExitStack() as undo:
        lock = undo.enter_context(contextlib.ExitStack())
        exists = run.has("config.json") or run.has(LOCK)
        if exists and place().rank == 0:  # refused at once, not after decoding
            lock.enter_context(_alone(run))
        if resume:
            check_same(run, config)
        if config.system.fast_kernels:
            tune_allocator()  # before the first large tensor
        world = _joined(config, run.read_json("env.json")["world"] if resume else None)
        with world.together():
            job = _put_together(config, run, world, resume, lock)
        if world.writes:
            if not exists:
                lock.enter_context(_alone(run))
            if not (resume or overwrite) and run.has("config.json"):  # by another process, since it was looked for
                raise Refused(f"{run.path} exists; add --resume to continue it or --overwrite to start anew")
            _write(job, resume, overwrite)
        undo.pop_all()
    return job


def _joined(config: TrainConfig, recorded: dict[str, Any] | None) -> World:
    """The world of ``config``. Raises Refused when the run or its batches are for another number of processes."""
    world = join(config.system, recorded)
    before = recorded.get("processes", 1) if recorded else world.size
    if before != world.size:
        raise Refused(f"{config.exp} was started with {before} processes; resume it with as many")
    if config.optim.batch_size % world.size:
        raise Refused(
            f"--batch-size {config.optim.batch_size} cannot be shared by {world.size} processes;"
            f" give a multiple of {world.size}"
        )
    return world


@contextlib.contextmanager
def _alone(run: Run) -> Iterator[None]:
    """This process alone trains ``run``. Raises Refused naming the one that does already."""
    lock = run.path / LOCK
    with contextlib.ExitStack() as claims:
        try:
            claimed = claims.enter_context(claim(lock))
        except OSError as error:
            raise Refused(f"cannot write {lock}: {error.strerror}; choose another --runs or --exp") from error
        if not claimed:
            raise AtWork(f"{run.path} is being trained by {claimed_by(lock)}; wait for its end, or end it first")
        remove_abandoned(run.path)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()  # still claimed: a process that opened it meanwhile sees that it is gone


def _put_together(config: TrainConfig, run: Run, world: World, resume: bool, lock: contextlib.ExitStack) -> Job:
    """The job of ``config``. Rank 0 reads, downloads, decodes and compiles; the other processes find its caches."""
    builds = config.system.fast_kernels and world.device.type == "cpu"
    kernels = compile_meanwhile() if builds and world.writes else None
    with world.first():
        index = index_images(find_data(config.data.root), ours=[config.runs])

    def split() -> splits.Manifest:
        return splits.from_json(run.read_json("split.json")) if resume else make_manifest(index, config.data)

    manifest = world.from_first(split)
    splits.check_split(manifest, index)
    by_folders = splits.is_by_folders(manifest, index)
    notes = index_notes(index, split_by_folders=by_folders)
    if not by_folders:
        notes += splits.split_remarks(manifest, config.data.fit_on)
    with world.first():
        built = build_network(config.model, len(manifest.classes), config.system.seed)
        check_network(config, manifest, built)
        if config.model.cached_features and world.size > 1:
            raise Refused("--cached-features trains in one process; start it without torchrun")
        check_teachers(config, manifest)
        teachers = open_teachers(config, built.preprocessing, world)
        if teachers and resume:
            check_teachers_unchanged(run, teachers.hashes)
        if config.model.freeze:
            freeze(built.model, built.head)
        if world.writes and config.data.cache != "off":
            remove_abandoned(cache_dir())
        wanted = (path for paths in manifest.subsets.values() for path in paths)
        images = cache.open_images(index, built.preprocessing, config.data.cache, manifest.skipped, wanted)
        if kernels:
            kernels.join()
        _uses_kernels(config, world)  # the other processes find what the first one has built
    if builds and (remark := without_gcc()):
        notes.append(remark)
    return Job(
        config=config, run=run, world=world, manifest=manifest, images=images, built=built, teachers=teachers,
        notes=tuple(notes), lock=lock,
    )  # fmt: skip


def check_network(config: TrainConfig, manifest: splits.Manifest, built: Built) -> None:
    """Raises Refused for a network that cannot be trained by ``config``: sizes, the probe, single images."""
    for size in sorted(set(config.augment.train_sizes)):
        check_size(config.model.name, built.model, size)
    if config.model.cached_features:
        probe.check_linear(built, (), validates=True)
    if config.model.head == "probe":
        probe.check_linear(built, config.model.probe_l2, validates(manifest, config.data))
    images = sum(len(manifest.subsets[subset]) for subset in trained_subsets(config.data))
    trains_norms = config.optim.epochs and not (config.model.freeze or config.model.freeze_norm)
    smallest = min(config.augment.train_sizes, default=built.preprocessing.size)
    if trains_norms and min(config.optim.batch_size, images) == 1 and norms_single_values(built.model, smallest):
        remedy = "give --batch-size 2 or more" if images > 1 else "give more training images"
        raise Refused(
            f"--batch-size {config.optim.batch_size} and {images} training images make batches of one image, in which"
            f" the batch norms of {config.model.name} see one value at {smallest} px; {remedy}, or --freeze-norm"
        )


def _write(job: Job, resume: bool, overwrite: bool) -> None:
    """Writes what the run's folder says before training; of a resumed one, what has changed since."""
    run, kernels = job.run, _uses_kernels(job.config, job.world)
    if resume:
        recorded = run.read_json("env.json")
        machine = recorded.get("machine", {})
        if machine.get("kernels", kernels) not in (kernels, "in part"):
            lacks = "were not used before" if kernels else "cannot be built here"
            print(
                f"{run.path}: the quick CPU kernels {lacks}: from here on numbers differ by rounding", file=sys.stderr
            )
            run.write_json("env.json", {**recorded, "machine": {**machine, "kernels": "in part"}})
        return
    if overwrite:
        run.clear()  # only now, when nothing can be wrong any more: a mistyped command must not cost the old run
    run.write_json("split.json", job.manifest.to_json())
    start: dict[str, Any] = {"model": {"init_source": job.built.init_source, "init_hash": job.built.init_hash}}
    start["data"] = os.path.abspath(job.images.root)
    if job.teachers:
        start["teachers"] = list(job.teachers.hashes)
    run.write_json("env.json", {"world": job.world.describe(), **start, **environment(kernels, job.world)})
    run.write_json("config.json", to_dict(job.config))


def elsewhere(config: TrainConfig, runs: str) -> TrainConfig:
    """``config`` with its run below ``runs``, such as a temporary folder; its teachers stay where they are."""
    teachers = tuple(str(open_run(name, config.runs).path.resolve()) for name in config.optim.teacher)
    return dataclasses.replace(config, runs=runs, optim=dataclasses.replace(config.optim, teacher=teachers))


def sharing(config: TrainConfig, jobs: int) -> TrainConfig:
    """``config`` with its share of the cores, where it names no number of threads itself."""
    threads = config.system.threads or max(1, usable_cores() // jobs)
    return dataclasses.replace(config, system=dataclasses.replace(config.system, threads=threads))


def make_manifest(index: Index, config: DataConfig) -> splits.Manifest:
    """The split that ``config`` asks for; with ``skip_bad_images`` unreadable images are left out and recorded."""
    skipped = cache.unreadable(index.root, index.paths) if config.skip_bad_images else {}
    if config.split:
        manifest = splits.read_split(Path(config.split))
        used = {path for paths in manifest.subsets.values() for path in paths}
        if bad := sorted(used & set(skipped)):
            raise Refused(
                f"{config.split} holds the unreadable image {escaped(bad[0])}; repair it or leave --split out"
            )
    else:
        good = dataclasses.replace(index, paths=tuple(path for path in index.paths if path not in skipped))
        groups = None
        if config.protocol == "standard" and config.group_duplicates:
            from finetune101.data.duplicates import duplicate_groups  # reads every image: only where it is needed

            groups = duplicate_groups(good)
        manifest = splits.make_split(good, config, groups)
    if skipped:
        names = ", ".join(map(escaped, list(skipped)[:5]))
        print(f"Left out {len(skipped)} unreadable image(s), recorded in split.json: {names}")
        manifest = dataclasses.replace(manifest, options={**manifest.options, "skipped": sorted(skipped)})
    return manifest


def _uses_kernels(config: TrainConfig, world: World) -> bool:
    """Whether training goes through the compiled kernels; they are built for those runs only."""
    return config.system.fast_kernels and world.device.type == "cpu" and compiled() is not None


def environment(kernels: bool, world: World) -> dict[str, Any]:
    """Command, versions and machine: what another person needs to repeat the run."""
    packages = ("torch", "torchvision", "timm", "numpy", "pillow")
    machine = {"system": platform.system(), "processor": platform.machine(), "kernels": kernels}
    if world.device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(world.device)
    return {
        "command": command_line(sys.argv),
        "versions": {
            "finetune101": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "machine": machine,
    }
