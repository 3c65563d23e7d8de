"""Whether answers without PyTorch are PyTorch's: the released networks, a bundle, and networks of the zoo.

``python benchmarks/without_torch.py --data FOLDER --bundle FOLDER --bundle-python PYTHON`` labels all reference test
images by each released network that has an ONNX file and by the same network in PyTorch (fp32, and as ``evaluate``
counts on this machine), the first 200 of them by the bundle's program. With --zoo each network of the table, untrained,
answers drawn pictures in both ways. Writes results/start/answers.json and, for each released network, the classes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune101.config import SystemConfig
from finetune101.data.images import class_of
from finetune101.deploy.choose import Chosen
from finetune101.deploy.export import Source, export_network
from finetune101.deploy.graph import Classifier
from finetune101.deploy.kept import answering_network
from finetune101.deploy.onnx_network import OnnxNetwork
from finetune101.deploy.released import open_reference, open_released
from finetune101.deploy.released_files import available
from finetune101.evaluation import metrics
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.evaluation.forward import Forward
from finetune101.evaluation.photos import decoded
from finetune101.files import write_json
from finetune101.machine import detect
from finetune101.models.build import build
from finetune101.models.table import names
from finetune101.standalone import csv_cell
from finetune101.training.benchmark import machine_facts

RESULTS = Path(__file__).resolve().parent.parent / "results/start"
BUNDLED = 200  # test images
DRAWN = 8
WAYS = ("without_torch", "torch_fp32", "torch")
Shares = NDArray[np.float32]


def of_onnx(network: OnnxNetwork, files: list[str]) -> Shares:
    """Probabilities (N, classes) of image files."""
    failed: list[tuple[str, str]] = []
    passes = [network.probabilities(pixels) for _, pixels in network.decoded(files, failed)]
    assert not failed
    return np.concatenate(passes)


def of_torch(network: TrainedNetwork, files: list[str], precision: str) -> Shares:
    """As ``of_onnx``, by PyTorch."""
    world = dataclasses.replace(network.world, precision=precision)
    forward, failed = Forward(network.model, world), list[tuple[str, str]]()
    batches = decoded(files, network.preprocessing, world, 64, failed)
    shares = [metrics.probabilities(forward(x).cpu(), network.temperature or 1.0).float().numpy() for _, x in batches]
    assert not failed
    return np.concatenate(shares)


def difference(one: Shares, other: Shares) -> dict[str, float]:
    """Images with another first class, and the largest difference of a probability."""
    return {"changed": int((one.argmax(1) != other.argmax(1)).sum()), "largest": float(np.abs(one - other).max())}


def released(name: str, data: str | None, out: Path) -> tuple[dict[str, Any], list[str]]:
    """How the answers of a released network differ on all test images; the images."""
    network, info = open_released(name)
    opened = open_reference(network, data, name, info.split)
    paths = opened.manifest.subsets["test"]
    files = [str(opened.index.root / path) for path in paths]
    answering = answering_network(Chosen(name, []))
    if not isinstance(answering, OnnxNetwork):
        return {"images": len(files), "answers": "PyTorch"}, files
    precision = network.world.precision
    shares = [of_onnx(answering, files), of_torch(network, files, "fp32"), of_torch(network, files, precision)]
    labels = np.array([network.classes.index(class_of(path)) for path in paths])
    with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("path", *WAYS))
        for row, path in enumerate(paths):
            writer.writerow([csv_cell(path), *(csv_cell(network.classes[one[row].argmax()]) for one in shares)])
    facts: dict[str, Any] = {"images": len(files), "answers": "ONNX Runtime", "torch": precision}
    facts["top1"] = {way: 100 * float((one.argmax(1) == labels).mean()) for way, one in zip(WAYS, shares, strict=True)}
    return facts | {"fp32": difference(shares[0], shares[1]), precision: difference(shares[0], shares[2])}, files


def bundled(folder: Path, python: str, files: list[str], name: str) -> dict[str, float]:
    """How the first classes of the bundle's program, run by ``python``, differ from those of the package."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "labels.csv"
        subprocess.run([python, folder / "predict.py", *files, "--out", out], check=True, stdout=subprocess.DEVNULL)
        with open(out, newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
    answering = answering_network(Chosen(name, []))
    assert isinstance(answering, OnnxNetwork) and [row["path"] for row in rows] == files
    predictions = answering.predict(files, top_k=1)
    assert isinstance(predictions, list)
    pairs = list(zip(predictions, rows, strict=True))
    changed = sum(csv_cell(one.label) != row["class_1"] for one, row in pairs)
    largest = max(abs(one.probability - float(row["probability_1"])) for one, row in pairs)
    return {"images": len(files), "changed": changed, "largest": largest}


def zoo() -> Iterator[tuple[str, dict[str, float]]]:
    """Each network of the table, untrained: how its exported file differs from it on drawn pictures."""
    world = detect(SystemConfig())
    for name in names():
        built = build(name, 101, pretrain=False)
        size = built.preprocessing.size
        network = TrainedNetwork(
            model=built.model.eval(),
            preprocessing=built.preprocessing,
            classes=[f"class {i}" for i in range(101)],
            world=world,
            architecture=name,
            name=name,
        )
        pixels = np.random.default_rng(0).integers(0, 256, (DRAWN, size, size, 3), np.uint8)
        with tempfile.TemporaryDirectory() as place, torch.inference_mode():
            file = export_network(Source(network, missing="none are needed"), Path(place) / "network.onnx").file
            expected = Classifier(network).eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2))[0].numpy()
            yield name, difference(OnnxNetwork(file).probabilities(pixels), expected)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--bundle-python")
    parser.add_argument("--zoo", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {**machine_facts(), "networks": {}, "zoo": {}}
    for name in available():
        facts["networks"][name], files = released(name, arguments.data, arguments.out)
        print(name, facts["networks"][name], flush=True)
    if arguments.bundle:
        python = arguments.bundle_python or "python"
        facts["bundle"] = bundled(arguments.bundle, python, files[:BUNDLED], available()[0])
        print("bundle", facts["bundle"], flush=True)
    if arguments.zoo:
        for name, numbers in zoo():
            facts["zoo"][name] = numbers
            print(name, numbers, flush=True)
    write_json(arguments.out / "answers.json", facts)


if __name__ == "__main__":
    main()
