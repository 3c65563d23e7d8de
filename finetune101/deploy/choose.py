"""Which network answers a command, and which images it names; knows no torch."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune101.deploy.inputs import is_list
from finetune101.deploy.released_files import RELEASED, available
from finetune101.errors import Refused
from finetune101.run import Run, find_run, is_run, open_run
from finetune101.standalone import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from finetune101.evaluation.checkpoint import TrainedNetwork

OF_RUNS = {"config.json", "env.json", "split.json", "metrics.jsonl", "last.pt", "best.safetensors", "study.json"}
"""Files of runs: a folder with one of them below it is not taken for a folder of images."""
OF_NETWORKS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx", ".json"}
"""Suffixes that no image has, and that whoever names a network may mean."""


@dataclass(frozen=True)
class Chosen:
    """The network that the words of a command name, the images that they name, and whether it was named at all."""

    name: str
    """A released network, or the folder of a run or a file as it was given."""
    inputs: list[str]
    named: bool = True
    run: Run | None = None
    """The run of the network; None for a released network and for a file outside of a run."""
    file: Path | None = None
    """A checkpoint, or an exported FILE.onnx, which alone was named."""

    @functools.cached_property
    def network(self) -> TrainedNetwork:
        """The network in PyTorch. Raises Refused where it is damaged, is an exported file, or PyTorch is missing."""
        try:
            from finetune101.deploy.released import open_released
            from finetune101.evaluation.checkpoint import open_file, open_network
        except ModuleNotFoundError as error:
            raise Refused(
                f"{self.name} needs {error.name}, which is not installed; pip install {error.name}"
            ) from error
        if self.file:
            if self.file.suffix == ".onnx":
                raise Refused(f"{self.name} is an exported file; name the run that it was made of")
            return open_file(self.file)
        return open_network(self.run) if self.run else open_released(self.name)[0]


def choose(words: Sequence[str], runs: str = "runs") -> Chosen:
    """The network that ``words`` begin with, else the first released one; the other words are images.

    A run, a checkpoint, an exported FILE.onnx or a released network. Raises Refused when no image is left, or the
    first word is neither a network nor images.
    """
    if not words:
        raise Refused("no image given; name files, folders or patterns")
    first, rest = words[0], list(words[1:])
    chosen = named_network(first, runs)
    if chosen:
        if not rest:
            raise Refused("no image given; name files, folders or patterns after the network")
        return dataclasses.replace(chosen, inputs=rest)
    if not _names_images(first):
        if Path(first).is_file() and Path(first).suffix != ".onnx":  # which open_run knows
            raise Refused(f"{first} is no network that predict reads; name a run, or a best.safetensors of one")
        if close := difflib.get_close_matches(first, available(), n=1):
            raise Refused(f"no run or network named {first}; did you mean {close[0]}?")
        try:
            open_run(first, runs)  # says which runs there are
        except Refused as error:
            raise Refused(f"{first} names no photos and no network: {error}") from error
    if swapped := next((word for word in rest if find_run(word, runs) and not os.path.isfile(word)), None):
        raise Refused(f"{swapped} is a run; name it before the photos")
    return Chosen((available() or list(RELEASED))[0], list(words), named=False)


def named_network(name: str, runs: str = "runs") -> Chosen | None:
    """The network of this ``name``, without images; None where there is none."""
    if name in available():
        return Chosen(name, [])
    if is_list(name):
        return None
    if run := find_run(name, runs):
        return Chosen(str(run.path), [], run=run)
    file = Path(name)
    if (file / "predict.py").is_file() and (file / "network.onnx").is_file():  # a bundle
        file = file / "network.onnx"
    if file.suffix not in (".safetensors", ".onnx") or not (file.is_file() or file.suffix == ".onnx"):
        return None
    return Chosen(name, [], file=file, run=Run(file.parent) if file.suffix != ".onnx" and is_run(file.parent) else None)


def _names_images(word: str) -> bool:
    """Whether the first word of a command can mean images: a file, a list, a pattern, a folder without runs."""
    if is_list(word):
        return True
    suffix = Path(word).suffix.lower()
    if os.path.isdir(word):
        below = {name for _, _, names in os.walk(word) for name in names}
        return not below & OF_RUNS and any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in below)
    if suffix in OF_NETWORKS:
        return False
    return suffix in IMAGE_SUFFIXES or os.path.lexists(word) or bool(glob.glob(word, recursive=True))
