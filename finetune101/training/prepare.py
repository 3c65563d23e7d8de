"""From a configuration to a job: images, split, machine and model, checked before anything is written."""

from __future__ import annotations

import dataclasses
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from finetune101 import __version__
from finetune101.config import DataConfig, TrainConfig, to_dict, validate
from finetune101.data import cache, dataset, splits
from finetune101.errors import Refused
from finetune101.faults import command
from finetune101.machine import usable_cores
from finetune101.models.build import build, check_size, freeze
from finetune101.runs import Run, create_run
from finetune101.training import cpu, probe
from finetune101.training.distill import open_teachers
from finetune101.training.identity import differences, split_of
from finetune101.training.kernels import compiled
from finetune101.training.loop import Job
from finetune101.world import World, detect


def prepare(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> Job:
    """Everything that ``fit`` needs; writes config.json, split.json and env.json of the run last.

    Raises Refused, in one sentence that says what to do, for settings, data or weights that cannot work.
    """
    validate(config)
    run = create_run(config, resume=resume, overwrite=overwrite)
    if resume:
        check_same(run, config)
    if config.system.fast_kernels:
        cpu.tune_allocator()  # before the first large tensor
    recorded = run.read_json("env.json") if resume else None
    world = detect(config.system, recorded["world"] if recorded else None)
    if recorded and recorded["world"].get("processes", 1) != world.size:
        before = recorded["world"].get("processes", 1)
        raise Refused(f"{config.exp} was started with {before} processes; resume it with as many")
    if config.optim.batch_size % world.size:
        raise Refused(
            f"--batch-size {config.optim.batch_size} cannot be shared by {world.size} processes;"
            f" give a multiple of {world.size}"
        )
    index = dataset.index(dataset.find(config.data.root), "folders" if config.data.protocol == "folders" else "classes")
    manifest = splits.from_json(run.read_json("split.json")) if resume else make_manifest(index, config.data)
    splits.check(manifest, index)
    built = build(
        config.model.name,
        len(manifest.classes),
        pretrain=config.model.pretrain,
        weights=config.model.weights,
        size=config.model.size,
        cache_size=config.model.cache_size,
        seed=config.system.seed,
    )
    for size in config.augment.train_sizes:
        check_size(config.model.name, built.model, size)
    if config.model.cached_features:
        probe.check(built, (), validates=True)
        if world.size > 1:
            raise Refused("--cached-features trains in one process; start it without torchrun")
    if config.model.head == "probe":
        validates = config.data.fit_on == "train" and bool(manifest.subsets["val"])
        probe.check(built, config.model.probe_l2, validates)
    teachers = open_teachers(config, manifest, built.preprocessing, world)
    if config.model.freeze:
        freeze(built.model, built.head)
    with world.first():  # the others find the cache that rank 0 builds
        wanted = (path for paths in manifest.subsets.values() for path in paths)
        images = cache.open_images(index, built.preprocessing, config.data.cache, wanted=wanted)
    if world.writes and not resume:
        if overwrite:
            run.clear()  # only now, when nothing can be wrong any more: a mistyped command must not cost the old run
        run.write_json("split.json", manifest.to_json())
        kernels = _uses_kernels(config, world)
        model = {"init_source": built.init_source, "init_hash": built.init_hash}
        run.write_json("env.json", {"world": world.describe(), "model": model, **environment(kernels, world)})
        run.write_json("config.json", to_dict(config))
    return Job(config=config, run=run, world=world, manifest=manifest, images=images, built=built, teachers=teachers)


def sharing(config: TrainConfig, jobs: int) -> TrainConfig:
    """``config`` with its share of the cores, where it names no number of threads itself."""
    threads = config.system.threads or max(1, usable_cores() // jobs)
    return dataclasses.replace(config, system=dataclasses.replace(config.system, threads=threads))


def make_manifest(index: dataset.Index, config: DataConfig) -> splits.Manifest:
    """The split that ``config`` asks for; with ``skip_bad_images`` unreadable images are left out and recorded."""
    skipped = cache.unreadable(index.root, index.paths) if config.skip_bad_images else {}
    if config.split:
        manifest = splits.read(Path(config.split))
        held = {path for paths in manifest.subsets.values() for path in paths}
        if bad := sorted(held & set(skipped)):
            raise Refused(f"{config.split} holds the unreadable image {bad[0]}; repair it or leave --split out")
    else:
        good = dataclasses.replace(index, paths=tuple(path for path in index.paths if path not in skipped))
        groups = None
        if config.protocol == "standard" and config.group_duplicates:
            from finetune101.data.verify import duplicate_groups  # reads every image: only where it is needed

            groups = duplicate_groups(good)
        manifest = splits.make(good, config, groups)
    if skipped:
        print(f"Left out {len(skipped)} unreadable image(s), recorded in split.json: {', '.join(list(skipped)[:5])}")
        manifest = dataclasses.replace(manifest, options={**manifest.options, "skipped": sorted(skipped)})
    return manifest


def check_same(run: Run, config: TrainConfig) -> None:
    """Raises Refused naming the settings of ``config`` that would change the numbers of ``run``; names are none."""
    recorded = run.config()
    changed = differences(recorded, config)
    if config.data.split and config.data.split != recorded.data.split:  # another file may hold the same split
        changed += ["data.split"] if splits.read(Path(config.data.split)).hash() != split_of(run) else []
    if changed:
        raise Refused(
            f"--resume cannot change {', '.join(changed)} of {config.exp}; "
            "leave these flags out, or train under another --exp"
        )


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
        "command": command(sys.argv),
        "versions": {
            "finetune101": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "machine": machine,
    }
