"""Labels without PyTorch: in environments that do not have it, and as a program that knows nothing of finetune101."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import pytest
from bare_python import AS_FINETUNE101, AS_PROGRAM, environment, run
from exported import CLASSES, save, small_model

from finetune101 import standalone
from finetune101.deploy.onnx_network import OnnxNetwork

ROOT = Path(__file__).parents[1]
PACKAGES = ("numpy", "pillow", "onnxruntime", "tyro", "msgspec", "filelock", "pyyaml", "tqdm")
HEAVY = ("torch", "torchvision", "timm", "onnx", "scipy", "matplotlib", "captum", "jinja2", "safetensors", "optuna")


@pytest.fixture(scope="module")
def python_of_bundle(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the requirements.txt of a bundle installs."""
    return environment(tmp_path_factory.mktemp("bundle") / "site", "numpy", "pillow", "onnxruntime")


@pytest.fixture(scope="module")
def python_without_torch(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What finetune101 needs to label photos."""
    return environment(tmp_path_factory.mktemp("light") / "site", *PACKAGES)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder as ``export --format bundle`` writes it."""
    save(small_model(), tmp_path / "network.onnx")
    (tmp_path / "predict.py").write_bytes(Path(standalone.__file__).read_bytes())
    return tmp_path


@pytest.mark.parametrize("module", ["finetune101", "finetune101.standalone"])
def test_onnx_runtime_is_told_to_send_nothing_before_it_is_imported(module: str) -> None:
    code = f"import sys, os, {module}; print('onnxruntime' in sys.modules, os.environ['ORT_DISABLE_TELEMETRY'])"
    usual = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], env=usual, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1"]


def test_the_program_labels_as_the_package(python_of_bundle: list[str], bundle: Path, tiny_data: Path) -> None:
    out = bundle / "labels.csv"
    done = run(python_of_bundle, [], AS_PROGRAM, bundle / "predict.py", tiny_data, "--out", out, "--top-k", "3")
    assert done.returncode == 0, done.stderr
    with open(out, newline="", encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    files = sorted(str(path) for path in tiny_data.rglob("*.jpg"))
    assert sorted(rows) == files and f"{len(files)} images: {out}" in done.stdout
    for prediction in OnnxNetwork(bundle / "network.onnx").predict(files, top_k=3):
        row, (name, share) = rows[prediction.source], prediction.classes[0]
        assert row["class_1"] == standalone.csv_cell(name) and float(row["probability_1"]) == pytest.approx(
            share, abs=1e-4
        )
        assert row["unlike"] == row["unlike_score"] == ""


def test_the_program_prints_and_refuses_in_sentences(
    python_of_bundle: list[str], bundle: Path, tiny_data: Path
) -> None:
    (bundle / "text.jpg").write_text("no image")
    program, photo = bundle / "predict.py", tiny_data / "ball" / "image_0001.jpg"
    done = run(python_of_bundle, [], AS_PROGRAM, program, photo, bundle / "text.jpg", bundle / "gone")
    assert done.returncode == 1 and done.stdout.startswith(f"{photo}\n") and done.stdout.count("%") == 5
    assert "gone: no such file" in done.stderr and "text.jpg: no image format" in done.stderr
    (bundle / "labels.csv").write_text("mine")
    for words, sentence in (
        (["--out", str(bundle / "labels.csv")], "exists"),
        (["--out", "x.txt"], "no name of a CSV table"),
        (["--top-k", "0"], "at least 1"),
        (["--reject"], "has no score"),
        (["--network", str(bundle / "none.onnx")], "there is no file"),
        (["--network", str(bundle / "text.jpg")], "is damaged"),
    ):
        done = run(python_of_bundle, [], AS_PROGRAM, program, photo, *words)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert (bundle / "labels.csv").read_text() == "mine"


@pytest.mark.parametrize("verb", ["predict", "embed"])
def test_a_verb_runs_without_torch(
    verb: str, python_without_torch: list[str], bundle: Path, tiny_data: Path, tmp_path: Path
) -> None:
    photo, network = str(tiny_data / "ball" / "image_0001.jpg"), str(bundle / "network.onnx")
    words = {
        "predict": [network, photo, "--csv"],
        "embed": [network, photo, "--out", str(tmp_path / "features.npz")],
    }[verb]
    done = run(python_without_torch, [ROOT], AS_FINETUNE101, "finetune101", verb, *words)
    assert done.returncode == 0, done.stderr
    if verb == "embed":
        with np.load(tmp_path / "features.npz") as table:
            assert table["features"].shape == (1, 48) and table["probabilities"].shape == (1, len(CLASSES))
    else:
        assert photo in done.stdout


def test_serve_names_the_packages_that_it_lacks(python_without_torch: list[str]) -> None:
    done = run(python_without_torch, [ROOT], AS_FINETUNE101, "finetune101", "serve", "released_finetune")
    assert done.returncode == 2 and "serve needs" in done.stderr and "torch" not in done.stderr


def test_serve_answers_without_torch(tmp_path: Path, bundle: Path, tiny_data: Path) -> None:
    packages = (*PACKAGES, "starlette", "uvicorn", "python-multipart")
    *start, code, folder = environment(tmp_path / "site", *packages)
    code = code.format(paths=[str(ROOT), folder], run=AS_FINETUNE101)
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "FINETUNE101_CACHE": str(tmp_path / "cache")}
    words = ["finetune101", "serve", str(bundle / "network.onnx"), "--port", "0"]
    photo = tiny_data / "ball" / "image_0001.jpg"
    server = subprocess.Popen(
        [*start, code, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    try:
        assert server.stdout is not None
        lines: list[str] = []
        address = None
        for line in server.stdout:
            lines.append(line)
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        assert address, "".join(lines)
        asked = urllib.request.Request(f"{address[0]}/predict", photo.read_bytes(), {"Content-Type": "image/jpeg"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            value = json.load(answer)
    finally:
        server.terminate()
        server.communicate(timeout=60)
    name, share = OnnxNetwork(bundle / "network.onnx").predict([photo], top_k=1)[0].classes[0]
    best = value["predictions"][0]["classes"][0]
    assert best["class"] == name and best["probability"] == pytest.approx(share, abs=1e-4)


def test_released_networks_answer_without_torch(python_without_torch: list[str], tiny_data: Path) -> None:
    photo = tiny_data / "ball" / "image_0001.jpg"
    done = run(python_without_torch, [ROOT], AS_FINETUNE101, "finetune101", "predict", photo, "--json")
    assert done.returncode == 0, done.stderr
    assert '"probability": ' in done.stdout and "torch" not in done.stderr.lower()
    done = run(python_without_torch, [ROOT], AS_FINETUNE101, "finetune101", "predict", "released_probe", photo)
    assert done.returncode == 2 and "needs torch" in done.stderr and "Traceback" not in done.stderr


def test_nothing_heavy_is_loaded_for_an_answer(tiny_data: Path) -> None:
    code = "import sys; from finetune101.cli.main import main; main(sys.argv[1:]); print('loaded:', *sys.modules)"
    words = ["predict", str(tiny_data / "ball" / "image_0001.jpg")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = done.stdout.rpartition("loaded:")[2].split()
    assert "onnxruntime" in loaded and not set(HEAVY) & set(loaded)


def test_few_images_are_in_memory(tmp_path: Path, tiny_data: Path) -> None:
    """However many photos there are: decoding waits for the network."""
    ahead, most = 0, 0

    def pixels(file: str) -> standalone.Pixels:
        nonlocal ahead, most
        ahead += 1
        most = max(most, ahead)
        return np.zeros((4, 4, 3), np.uint8)

    for files, _ in standalone.decoded_passes(pixels, map(str, range(500)), [], threads=2):
        ahead -= len(files)
    assert ahead == 0 and most <= 8 * 2 + 2 * standalone.PASS


def test_an_exported_file_takes_weights_of_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign file could name any file of the current folder, and the probabilities would tell what is in it."""
    save(small_model(), tmp_path / "whole.onnx")
    model = onnx.load(tmp_path / "whole.onnx")
    onnx.save(model, tmp_path / "thief.onnx", save_as_external_data=True, location="private", size_threshold=1000)
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "thief.onnx", "thief.onnx"):
        with pytest.raises(standalone.UnusableFile, match="is damaged"):
            standalone.ExportedNetwork(str(name))
    trusted = standalone.ExportedNetwork("thief.onnx", in_place=True)
    pictures = np.zeros((1, 40, 40, 3), np.uint8)
    expected = standalone.ExportedNetwork("whole.onnx").outputs(pictures).probabilities
    assert np.array_equal(trusted.outputs(pictures).probabilities, expected)
