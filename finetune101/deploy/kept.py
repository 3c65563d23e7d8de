"""The exported network of a run: made when labels are first asked for, kept in the run, made anew when the run changes.

Who asks again answers by ONNX Runtime and never loads PyTorch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune101.deploy.choose import Chosen
from finetune101.deploy.onnx_network import OnnxNetwork
from finetune101.deploy.released_files import FOLDER, RELEASED
from finetune101.errors import Refused
from finetune101.files import atomic, sha256
from finetune101.host import has_gpu
from finetune101.run import KEPT, KEPT_RECORD, Run
from finetune101.standalone import PICTURES, Outputs

if TYPE_CHECKING:
    from finetune101.evaluation.checkpoint import TrainedNetwork

FORM = 1  # of what is kept: another number makes it anew
PARTS = ("best.safetensors", "temperature.json", "unlike.safetensors")
"""The files of a run that its exported network is made of."""
MANY = 500  # images: from here on a GPU is asked, which takes the start of PyTorch
SAME = 1e-3  # largest difference from PyTorch's outputs on drawn images, over their size
DRAWN = 4  # images


def answering_network(chosen: Chosen, images: int = 1) -> OnnxNetwork | TrainedNetwork:
    """What labels so many ``images``: an exported network where there is one or can be one, else PyTorch.

    Says on standard error where PyTorch answers, and why. Raises Refused for a damaged network.
    """
    run, file = chosen.run, chosen.file
    if file and file.suffix == ".onnx":
        return OnnxNetwork(file)
    if images >= MANY and find_spec("torch") and has_gpu():
        return _by_pytorch(chosen, f"there is a GPU for the {images} images")
    if not run and not file:
        kept = FOLDER / f"{RELEASED[chosen.name]}.onnx"
        if kept.is_file():
            return OnnxNetwork(kept, name=chosen.name, in_place=True)
        return _by_pytorch(chosen, "this package holds no ONNX file of it")
    if not run or (file and file.name != run.best.name):
        return _by_pytorch(chosen, "a checkpoint alone has no folder to keep an exported network in")
    return open_kept(run) or _keep(chosen, run)


def open_kept(run: Run) -> OnnxNetwork | None:
    """The exported network that ``run`` keeps; None where it keeps none, a damaged one, or one of other weights."""
    file, record = run.path / KEPT, _record(run)
    if not file.is_file() or record.get("made_of") != made_of(run) or record.get("sha256") != sha256(file):
        return None
    return OnnxNetwork(file, name=str(run.path))


def _record(run: Run) -> dict[str, Any]:
    """What ``run`` says of its exported network: what it was made of, and its hash, or why there is none."""
    try:
        record = run.read_json(KEPT_RECORD) if run.has(KEPT_RECORD) else {}
    except Refused:  # damaged: the network is exported again
        return {}
    return record if isinstance(record, dict) else {}


def made_of(run: Run) -> str:
    """The hash (sha256, hex) of what an exported network of ``run`` is made of."""
    files = [run.path / name for name in PARTS]
    parts = [sha256(file) if file.is_file() else "" for file in files]
    return hashlib.sha256(" ".join([str(FORM), *parts]).encode()).hexdigest()


def _keep(chosen: Chosen, run: Run) -> OnnxNetwork | TrainedNetwork:
    """Exports the network of ``run`` into its folder; where that cannot be, PyTorch answers."""
    file, hashed = run.path / KEPT, made_of(run)
    why = _not_kept(run, hashed)
    network = chosen.network
    if why:
        return _by_pytorch(chosen, why)
    print(f"Exporting {run.path}, once; the next answers need no PyTorch", file=sys.stderr)
    try:
        with atomic(file) as part:
            export_checked(network, part)
        run.write_json(KEPT_RECORD, {"made_of": hashed, "sha256": sha256(file)})
        return OnnxNetwork(file, name=str(run.path))
    except Refused as error:
        with contextlib.suppress(Refused):
            run.write_json(KEPT_RECORD, {"made_of": hashed, "reason": str(error)})
        return _by_pytorch(chosen, str(error))


def _not_kept(run: Run, hashed: str) -> str:
    """Why ``run`` can keep no exported network, as far as that is known before the work; "" where it can."""
    file = run.path / KEPT
    if not os.access(run.path, os.W_OK):
        return f"{run.path} cannot be written, so that no exported network can be kept there"
    if file.exists() and not file.is_file():
        return f"{file} is in the way of the exported network"
    record = _record(run)
    return str(record.get("reason", "")) if record.get("made_of") == hashed else ""


def export_checked(network: TrainedNetwork, file: Path) -> None:
    """Writes the exported ``network`` to ``file``. Raises Refused where that cannot be, or its answers differ."""
    from finetune101.deploy.export import Source, exported_info, save_graph
    from finetune101.deploy.graph import onnx_graph, prepend_resize

    graph = onnx_graph(network)
    prepend_resize(graph, network.preprocessing)
    save_graph(graph, exported_info(Source(network), PICTURES), file)
    check_same(OnnxNetwork(file), network)


def check_same(made: OnnxNetwork, network: TrainedNetwork) -> None:
    """Raises Refused where the outputs of ``made`` for drawn images are not those of ``network``."""
    import torch

    from finetune101.deploy.graph import Classifier

    size = network.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (DRAWN, size, size, 3), np.uint8)
    with torch.inference_mode():
        expected = Classifier(network).eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    for name, values, own in zip(Outputs._fields, made.outputs(pixels), expected, strict=False):
        wanted = own.numpy()
        scale = max(1.0, float(np.abs(wanted).max()))
        difference = float(np.abs(values - wanted).max()) / scale
        if not difference <= SAME:
            raise Refused(f"the exported network differs from it by {difference:.1e} in its {name}")


def _by_pytorch(chosen: Chosen, reason: str) -> TrainedNetwork:
    network = chosen.network
    print(f"PyTorch answers for {chosen.name}: {reason}", file=sys.stderr)
    return network
