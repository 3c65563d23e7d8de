"""Fixtures that every test may use: a tiny data set of real JPEGs, and the real Caltech-101 where it is at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from finetune101.config import DataConfig, ModelConfig, OptimConfig, SystemConfig, TrainConfig

TINY_CLASSES = ("ball", "box", "stripes")
IMAGES_PER_CLASS = 12


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: a process for each core that the tests may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


LONG = ("test_examples.py", "test_export.py", "test_stress.py", "test_distributed.py")
"""Files that take minutes: they run first, so that no process of the tests waits for the last of them."""
LAST = "tests/training/"
"""A folder whose tests run last, and are shared out one by one, so that the processes end at nearly the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of ``LONG`` before the others, those of ``LAST`` behind them."""
    items.sort(key=lambda item: 0 if item.path.name in LONG else 2 if item.nodeid.startswith(LAST) else 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile``: a file is the work of one process, which makes its fixtures once; but not so in ``LAST``."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.startswith(LAST) and Path(file).name not in LONG else file

    return ByFile(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips the tests marked caltech101 where the real data set is not at hand."""
    if item.get_closest_marker("caltech101") and not os.environ.get("FINETUNE101_DATA"):
        pytest.skip("needs the real Caltech-101: set FINETUNE101_DATA to its 101_ObjectCategories folder")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the tests' caches out of the user's own, unless FINETUNE101_CACHE already names a place."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("FINETUNE101_CACHE"):
            patch.setenv("FINETUNE101_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 3 classes x 12 JPEGs of 64 x 48 pixels, the same bytes every time. Shared: copy it to change it."""
    root = tmp_path_factory.mktemp("tiny") / "images"
    rng = np.random.default_rng(0)
    for name in TINY_CLASSES:
        (root / name).mkdir(parents=True)
        for i in range(1, IMAGES_PER_CLASS + 1):
            _draw(name, rng).save(root / name / f"image_{i:04d}.jpg", quality=90)
    return root


@pytest.fixture
def small(tiny_data: Path, tmp_path: Path) -> TrainConfig:
    """Two epochs of a small network from random initialisation on ``tiny_data``; change it with dataclasses.replace."""
    return TrainConfig(
        exp="small",
        runs=str(tmp_path / "runs"),
        data=DataConfig(root=str(tiny_data)),
        model=ModelConfig(name="squeezenet1_1", pretrain=False, size=32),
        optim=OptimConfig(epochs=2, batch_size=8),
        system=SystemConfig(threads=1),
    )


@pytest.fixture(scope="session")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs a and b (two seeds) and other (another split), all tested. Shared: copy it first."""
    from finetune101.cli.main import main

    small = "--model squeezenet1_1 --size 32 --batch-size 8 --threads 1 --epochs 1 --no-pretrain"
    folder = tmp_path_factory.mktemp("cli") / "runs"
    for name, extra in {"a": [], "b": ["--seed", "1"], "other": ["--split-seed", "1"]}.items():
        words = ["--exp", name, "--runs", str(folder), "--data", str(tiny_data), *small.split()]
        assert main(["train", *words, *extra]) == 0
        assert main(["evaluate", name, "--runs", str(folder)]) == 0
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, and no data set or weights named by the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FINETUNE101_DATA", raising=False)
    monkeypatch.delenv("FINETUNE101_WEIGHTS", raising=False)
    yield tmp_path


@pytest.fixture(scope="session")
def caltech101() -> Path:
    """The real 101_ObjectCategories, to be read only; use it in tests marked caltech101."""
    root = os.environ.get("FINETUNE101_DATA")
    if not root:
        pytest.skip("needs the real Caltech-101: set FINETUNE101_DATA to its 101_ObjectCategories folder")
    if not Path(root, "accordion").is_dir():
        pytest.fail(f"FINETUNE101_DATA is {root}, which has no class folder accordion")
    return Path(root)


def _draw(name: str, rng: np.random.Generator) -> Image.Image:
    # noise below the shape keeps any two images clear of the near-duplicate threshold
    noise = rng.integers(0, 160, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    x, y, r = (int(v) for v in rng.integers((16, 14, 8), (48, 34, 14)))
    colour = tuple(int(v) for v in rng.integers(150, 256, 3))
    if name == "ball":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif name == "box":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    else:
        for k in range(-r, r + 1, 5):
            draw.line((x + k, y - r, x + k, y + r), fill=colour, width=2)
    return image
