"""The verbs around the runs: data, recipes, benchmark, cache, doctor, demo. A function's signature is its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from finetune101.cli.parse import Flag
from finetune101.config import SHEET_AUGMENT, AugmentConfig, Flat, ModelConfig, check_bounds
from finetune101.errors import Refused


def data_download(*, target: str = "data") -> int:
    """Download, verify and unpack Caltech-101.

    Args:
        target: Folder that will hold 101_ObjectCategories.
    """
    from finetune101.data.download import download

    print(f"Caltech-101 is in {download(Path(target))}")
    return 0


def data_verify(*, data: str | None = None) -> int:
    """Read every image and report what is wrong, duplicated or unusual; changes nothing.

    The exit code is 1 when an image cannot be read.

    Args:
        data: Folder with one folder per class (or its parent).
    """
    from finetune101.data.images import find_data
    from finetune101.data.verify import verify

    result = verify(find_data(data))
    print(result.text())
    return 1 if result.bad else 0


def data_show(
    augment: Annotated[AugmentConfig, Flat] = SHEET_AUGMENT,
    *,
    data: str | None = None,
    out: str = "contact_sheet.jpg",
    per_class: int = 4,
) -> int:
    """Draw a contact sheet: a few images per class, and what augmentation makes of some.

    Args:
        data: Folder with one folder per class (or its parent).
        out: Picture to write.
        per_class: Images of each class.
    """
    from finetune101.data.images import find_data
    from finetune101.data.sheet import contact_sheet

    print(f"Picture: {contact_sheet(find_data(data), Path(out), augment, per_class)}")
    return 0


def demo(*, out: str = "demo", epochs: Annotated[int, tyro.conf.Suppress] = 8) -> int:
    """The whole job on a drawn data set in a few minutes: verify, train both arms, test, compare, predict.

    Args:
        out: Folder for everything that the demo writes.
    """
    from finetune101.demo.job import run_demo

    run_demo(Path(out), epochs)
    return 0


def recipes() -> int:
    """The named recipes: their commands and what to expect of them."""
    from inspect import getdoc

    from finetune101.recipes import RECIPES

    for name, recipe in RECIPES.items():
        print(f"{name}\n  " + (getdoc(recipe) or "").replace("\n", "\n  ").replace("``", "") + "\n")
    return 0


def cache(action: tyro.conf.Positional[Literal["list", "clear"]] = "list", *, older_than: float = 0.0) -> int:
    """List or empty the folder of caches: decoded images, features of networks, thumbnails, compiled kernels.

    Args:
        action: list: each file with its size, age and content. clear: remove them; what is needed again is made anew.
        older_than: Only what was not used for so many days.
    """
    from finetune101.data import store

    if not older_than >= 0:
        raise Refused(f"--older-than is {older_than}; give a number of days of at least 0")
    if action == "list":
        print(store.cache_table(older_than))
        return 0
    removed = store.clear_cache(older_than)
    print(f"Removed {len(removed)} files, {sum(entry.bytes for entry in removed) / 1e9:.2f} GB.")
    return 0


def doctor(*, data: str | None = None, runs: str = "runs", json: Flag = False) -> int:
    """What a training needs of this machine, what is wrong with it, and the command that mends it; changes nothing.

    The exit code is 1 where a training could not work.

    Args:
        data: Folder with one folder per class (or its parent).
        runs: Folder of all runs.
        json: Print all of it as JSON.
    """
    from finetune101.doctor import can_train, check_lines, checks_as_table, examine_machine, verdict
    from finetune101.files import as_json

    checks = []
    for check in examine_machine(data, runs):
        checks.append(check)
        if not json:
            print("\n".join(check_lines(check)), flush=True)
    print(as_json(checks_as_table(checks), indent=1) if json else f"\n{verdict(checks)}")
    return 0 if can_train(checks) else 1


def benchmark(
    *,
    models: tuple[str, ...] = ("resnet18", "efficientnet_lite0"),
    inference: tuple[str, ...] = (),
    data: str | None = None,
    size: int | None = None,
    batch_size: int = 64,
    steps: int = 10,
    repeats: int = 5,
    every: Flag = False,
    out: str = "benchmark.json",
    runs: str = "runs",
) -> int:
    """Images/s of the bare training step, of the data alone and of both, on this machine.

    Args:
        models: Networks to measure.
        inference: Measure instead how fast these answer, one image and 32 at a time: runs, released networks or
            FILE.onnx; by PyTorch, by the fused layers, by ONNX Runtime and by OpenVINO where it is installed.
        data: Folder with one folder per class (or its parent). Without any, images are drawn.
        size: Height and width of the input in pixels. Default: the network's own.
        batch_size: Images per step.
        steps: Steps of one measurement.
        repeats: Measurements; the median counts.
        every: Measure fp32 and bf16, contiguous and channels_last, not only what the machine would choose.
        out: File for the numbers.
        runs: Folder of all runs.
    """
    from tempfile import TemporaryDirectory

    from finetune101.data.images import find_data
    from finetune101.demo.dataset import draw
    from finetune101.files import write_json
    from finetune101.training.benchmark import Workload, benchmark_table
    from finetune101.training.benchmark import measure_machine as measure

    check_bounds(ModelConfig(size=size))
    for name, value in (("batch-size", batch_size), ("steps", steps), ("repeats", repeats)):
        if value < 1:
            raise Refused(f"--{name} is {value}; give at least 1")
    if inference:
        from finetune101.deploy.inference_speed import inference_table, measure_inference

        speeds = measure_inference(inference, runs, repeats=repeats)
        print(inference_table(speeds))
        write_json(Path(out), speeds)
        return 0
    with TemporaryDirectory() as folder:
        try:
            root = find_data(data)
        except Refused:
            if data is not None:
                raise
            root = draw(Path(folder) / "data")
        work = Workload(size=size, batch_size=batch_size, steps=steps, repeats=repeats)
        result = measure(root, models, work, every)
    print(benchmark_table(result))
    write_json(Path(out), result)
    return 0
