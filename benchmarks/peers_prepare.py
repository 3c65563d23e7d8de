"""What ``benchmarks/peers.py`` needs before it measures: the peers' environment, the folders of images, the weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision

from finetune101.config import DataConfig, ModelConfig
from finetune101.data.images import class_of, index_images
from finetune101.data.splits import Manifest, make_split
from finetune101.errors import Refused
from finetune101.files import write_json

ROOT = Path(__file__).resolve().parent.parent
PINNED = ("timm==1.0.31", "fastai==2.8.12", "transformers==5.24.0", "datasets==5.2.0", "accelerate==1.15.0",
          "ultralytics==8.4.190")  # fmt: skip
LITE = "efficientnet_lite0"
PHOTOS = 500


@dataclass(frozen=True)
class Images:
    """A folder of images: so many classes, and images of each for training and validation."""

    classes: int
    train: int
    val: int


FOLDERS = {
    LITE: Images(96, 2, 1),
    "resnet18": Images(48, 2, 1),
    "two_minutes": Images(96, 4, 2),
    "screen": Images(32, 2, 1),
}
"""Training images are whole batches of 32, for some loaders leave out the last one where it is smaller."""


def install(folder: Path) -> Path:
    """The Python of the peers' environment in ``folder``, which is made where it is not there yet (minutes)."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = folder / "peers_installed.json"
    same = [
        f"torch=={torch.__version__.partition('+')[0]}",
        f"torchvision=={torchvision.__version__.partition('+')[0]}",
    ]
    wanted = [*same, f"pillow=={PIL.__version__}", *PINNED]
    if ready.is_file() and json.loads(ready.read_text()) == wanted:
        return python
    print(f"Installing the peers into {folder}: {' '.join(wanted)} (minutes, some 7 GB)", flush=True)
    if not python.is_file():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *wanted], check=True)
    ready.write_text(json.dumps(wanted))
    return python


def versions_of(python: Path) -> dict[str, str]:
    """Versions of the packages that matter, those of them that an environment has."""
    names = {"torch", "torchvision", "pillow", "numpy", "onnxruntime", *(pin.partition("==")[0] for pin in PINNED)}
    code = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    done = subprocess.run([python, "-c", code], capture_output=True, check=True)
    installed = {name.lower(): version for name, version in json.loads(done.stdout).items()}
    return {name: installed[name] for name in sorted(names & installed.keys())}


def _evenly(items: Sequence[str], count: int) -> list[str]:
    """``count`` of the items, from beginning to end; all where there are fewer."""
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else list(items)


def _copy(root: Path, split: Manifest, images: Images, share: float, folder: Path) -> None:
    """Copies the first images of each class of the split to folder/train/CLASS and folder/val/CLASS."""
    count = max(16, 16 * round(images.classes * share / 16))
    if count > len(split.classes):
        raise Refused(f"this table needs {count} classes with images, and {root} has {len(split.classes)}; see --share")
    for subset, number in (("train", images.train), ("val", images.val)):
        for name in split.classes[:count]:
            paths = sorted(path for path in split.subsets[subset] if class_of(path) == name)
            if len(paths) < number:
                raise Refused(f"class {name} has {len(paths)} images in {subset}, {number} are needed; see --data")
            (folder / subset / name).mkdir(parents=True)
            for path in paths[:number]:
                shutil.copyfile(root / path, folder / subset / name / Path(path).name)


def write_folders(data: Path, share: float, folder: Path) -> None:
    """Folders NAME/train and NAME/val of every set of images, and photos/: 500 test images named CLASS__FILE."""
    index = index_images(data)
    split = make_split(index, DataConfig(root=str(data)))
    for name, images in FOLDERS.items():
        _copy(index.root, split, images, share, folder / name)
    (folder / "photos").mkdir(parents=True)
    known = {path.name for path in (folder / "two_minutes/train").iterdir()}
    tested = sorted(path for path in split.subsets["test"] if class_of(path) in known)
    for path in _evenly(tested, max(20, round(PHOTOS * share))):
        shutil.copyfile(index.root / path, folder / "photos" / f"{class_of(path)}__{Path(path).name}")
    (folder / "photo").mkdir()
    first = min((folder / "photos").iterdir())
    shutil.copyfile(first, folder / "photo" / first.name)


def write_weights(folder: Path) -> dict[str, Any]:
    """ImageNet weights of every network, without output layer, as folder/NAME.safetensors; returns what is there.

    A network whose weights are not on this machine starts from random ones, with everybody.
    """
    from safetensors.torch import save_file

    from finetune101.models.build import build_network, is_installed

    folder.mkdir(parents=True)
    sources: dict[str, Any] = {}
    for name in (LITE, "resnet18"):
        pretrain = is_installed(name)
        built = build_network(ModelConfig(name=name, pretrain=pretrain), 2, seed=0)
        state = {key: value.contiguous() for key, value in built.model.state_dict().items()}
        if pretrain:
            save_file(
                {key: value for key, value in state.items() if not key.startswith(built.head)},
                folder / f"{name}.safetensors",
            )
        sources[name] = {
            "weights": built.init_source if pretrain else "random",
            "mean": built.preprocessing.mean,
            "std": built.preprocessing.std,
        }
    return sources


def write_predictor(run: Path, folder: Path) -> None:
    """The weights of a trained run under timm's names, for every peer to predict with."""
    from safetensors.torch import save_file

    from finetune101.evaluation.checkpoint import load_file

    model, _ = load_file(run / "best.safetensors")
    save_file({key: value.float().contiguous() for key, value in model.state_dict().items()}, folder)


def prepare(data: Path, share: float, work: Path) -> dict[str, Any]:
    """Everything of ``write_folders`` and ``write_weights`` below ``work``, once; returns the networks' input."""
    file = work / "prepared.json"
    if file.is_file():
        prepared: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if prepared["share"] == share:
            return prepared
    for name in ("images", "weights", "predict"):
        shutil.rmtree(work / name, ignore_errors=True)
    print(f"Preparing images and weights in {work}", file=sys.stderr, flush=True)
    write_folders(data, share, work / "images")
    prepared = {"share": share, "networks": write_weights(work / "weights")}
    write_json(file, prepared)
    return prepared
