"""The exported network of a run: made when labels are first asked for, kept in the run, made anew when the run changes.

Who asks again answers by ONNX Runtime and never loads PyTorch.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune101.deploy.choose import FOLDER, RELEASED, Chosen
from finetune101.deploy.onnx_network import OnnxNetwork
from finetune101.errors import Refused
from finetune101.files import sha256
from finetune101.host import has_gpu
from finetune101.run import KEPT, Run

if TYPE_CHECKING:
    from finetune101.evaluation.checkpoint import TrainedNetwork

FORM = 1  # of what is kept: another number makes it anew
PARTS = ("best.safetensors", "temperature.json", "unlike.safetensors")
"""The files of a run that its exported network is made of."""
MANY = 500  # images: from here on a GPU is asked, which takes the start of PyTorch
SAME = 1e-3  # largest difference of a probability from PyTorch's, on drawn images
DRAWN = 4  # images


def answering_network(chosen: Chosen, images: int = 1) -> OnnxNetwork | TrainedNetwork:
    """What labels so many ``images``: an exported network where there is one or can be one, else PyTorch.

    Says on standard error where PyTorch answers, and why. Raises Refused for a damaged network.
    """
    run, file = chosen.run, chosen.file
    if file and file.suffix == ".onnx":
        return OnnxNetwork(file)
    if images >= MANY and has_gpu():
        return chosen.network
    if not run and not file:
        kept = FOLDER / f"{RELEASED[chosen.name]}.onnx"
        if kept.is_file():
            return OnnxNetwork(kept, name=chosen.name, in_place=True)
        return _by_pytorch(chosen, "this package holds no ONNX file of it")
    if not run or (file and file.name != run.best.name):
        return _by_pytorch(chosen, "a checkpoint alone has no folder to keep an exported network in")
    return open_kept(run) or _keep(chosen, run)


def open_kept(run: Run) -> OnnxNetwork | None:
    """The exported network that ``run`` keeps; None where it keeps none, or one of other weights."""
    file = run.path / KEPT
    if not file.is_file():
        return None
    try:
        network = OnnxNetwork(file, name=str(run.path))
    except Refused:  # damaged, or of another version: it is made anew
        return None
    return network if network.info.made_of == made_of(run) else None


def made_of(run: Run) -> str:
    """The hash (sha256, hex) of what an exported network of ``run`` is made of."""
    files = [run.path / name for name in PARTS]
    parts = [sha256(file) if file.is_file() else "" for file in files]
    return hashlib.sha256(" ".join([str(FORM), *parts]).encode()).hexdigest()


def _keep(chosen: Chosen, run: Run) -> OnnxNetwork | TrainedNetwork:
    """Exports the network of ``run`` into its folder; where that cannot be, PyTorch answers."""
    file, hashed = run.path / KEPT, made_of(run)
    network = chosen.network
    print(f"Making {file}, once: from now on {run.path} answers in a second, without PyTorch", file=sys.stderr)
    try:
        from finetune101.deploy.export import Source, export_network

        export_network(Source(network), file, overwrite=True, made_of=hashed)
        made = OnnxNetwork(file, name=str(run.path))
        check_same(made, network)
    except Refused as error:
        return _by_pytorch(chosen, str(error))
    return made


def check_same(made: OnnxNetwork, network: TrainedNetwork) -> None:
    """Raises Refused, and removes the file of ``made``, where its answers to drawn images are not the network's."""
    import torch

    from finetune101.deploy.graph import Classifier

    size = network.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (DRAWN, size, size, 3), np.uint8)
    with torch.inference_mode():
        expected = Classifier(network).eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2))[0].numpy()
    difference = float(np.abs(made.probabilities(pixels) - expected).max())
    if not difference <= SAME:
        Path(made.file).unlink(missing_ok=True)
        raise Refused(f"the exported network differs from it by {difference:.1e}")


def _by_pytorch(chosen: Chosen, reason: str) -> TrainedNetwork:
    network = chosen.network
    print(f"PyTorch answers for {chosen.name}: {reason}", file=sys.stderr)
    return network
