"""Networks that come with the package: how a run becomes one, and what can be asked of those that are there."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest
import release

from finetune101 import original
from finetune101.cli.main import main
from finetune101.deploy import choose, kept, released, released_files
from finetune101.deploy.inputs import image_inputs
from finetune101.deploy.predict import predict_files
from finetune101.run import Run

RESULTS = Path(__file__).parents[2] / "results"
EVIDENCE = {
    "released_finetune": "study_gain/efficientnet_lite0/finetune/all/split42_seed1",
    "released_random": "scratch_lite0/scratch_lite0_seed1",
    "released_probe": "study_gain/efficientnet_lite0/probe/all/split42_seed0",
}
"""What each was when it was tested, or a run of the same recipe."""
WORDS = "--no-pretrain --model squeezenet1_1 --size 32 --batch-size 8 --threads 1 --epochs 1 --precision fp32"


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tested run of one epoch."""
    folder = tmp_path_factory.mktemp("released") / "runs"
    words = ["--exp", "tiny", "--runs", str(folder), "--data", str(tiny_data)]
    assert main(["train", *words, *WORDS.split()]) == 0
    assert main(["evaluate", "tiny", "--runs", str(folder)]) == 0
    return Run(folder / "tiny")


@pytest.fixture
def folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's folder of weights with ``run`` in it as released_random, and no data set in sight."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FINETUNE101_DATA", raising=False)
    for module in (released_files, kept, released, release):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "weights")
    release.release(run, "released_random")
    release.release_card(run, "released_random")
    return tmp_path / "weights"


def test_a_run_becomes_one(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert released_files.available() == ["released_random"]
    card = (folder / "caltech101_scratch_efficientnet_lite0.md").read_text(encoding="utf-8")
    assert f"{run.read_json('test.json')['top1']:.2f} %" in card
    assert (folder / "caltech101_scratch_efficientnet_lite0.safetensors").stat().st_size < run.best.stat().st_size


def test_its_accuracy_is_reproduced(
    run: Run, folder: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert original.test(["--exp", "released_random", "--data", str(tiny_data)]) == 0
    result = run.read_json("test.json")
    assert f"Test accuracy: {result['top1']:.2f} % ({result['correct']}/{result['n']}" in capsys.readouterr().out


def test_other_images_are_refused(
    folder: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, tmp_path / "other")
    (tmp_path / "other" / "ball" / "image_0001.jpg").unlink()
    assert original.test(["--exp", "released_random", "--data", str(tmp_path / "other")]) == 2
    assert "are not those that released_random was trained on" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "other" / "ball")
    assert original.test(["--exp", "released_random", "--data", str(tmp_path / "other")]) == 2
    assert "released_random knows 3 classes, the data set has 2" in capsys.readouterr().err
    assert original.test(["--exp", "released_probe", "--data", str(tiny_data)]) == 2
    assert "released_probe" in capsys.readouterr().err  # this package has none


def test_predict_needs_no_run(run: Run, folder: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(tiny_data / "ball" / "image_0001.jpg")
    said = []
    for words in ([photo], ["released_random", photo]):
        assert main(["predict", *words, "--csv"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and photo in said[0]
    release.release_onnx("released_random")  # the same answer, without PyTorch
    capsys.readouterr()
    assert main(["predict", photo, "--csv"]) == 0
    printed = capsys.readouterr()
    assert rows(printed.out) == pytest.approx(rows(said[0]), abs=1e-4) and "PyTorch" not in printed.err
    chosen = choose.choose([photo])
    scaled = run.read_json("test.json")["calibration_scaled"]
    assert chosen.inputs == [photo] and not chosen.named and chosen.network.temperature == scaled["temperature"]
    assert main(["predict", str(run.path), photo, "--csv"]) == 0  # a run of one's own comes first
    assert main(["predict", "missing.jpg"]) == 1
    for words, sentence in (
        ([], "no image given"),
        (["released_random"], "no image given"),
        (["nope", photo], "no run named nope"),
    ):
        capsys.readouterr()
        assert main(["predict", *words]) == 2
        assert sentence in capsys.readouterr().err


def rows(table: str) -> list[float]:
    """The probabilities in a CSV table of one image."""
    (row,) = csv.DictReader(table.splitlines())
    return [float(value) for name, value in row.items() if name.startswith("probability")]


def test_a_folder_that_is_no_run_is_never_a_photo(
    run: Run, folder: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The package's own network answers by name, or where no network was named, and then says so."""
    photo = str(tiny_data / "ball" / "image_0001.jpg")
    lost = Path("lost")  # a run that lost its config.json: only pictures and weights
    shutil.copytree(run.path, lost)
    (lost / "config.json").unlink()
    Path("empty").mkdir()
    Path("weights.pt").write_bytes(b"x")
    for first in (str(run.path.parent), "lost", "empty", "weights.pt", str(run.last), str(run.path / "config.json")):
        assert main(["predict", first, photo]) == 2, first
        streams = capsys.readouterr()
        assert not streams.out and "Traceback" not in streams.err
    shutil.copytree(tiny_data / "box", "photos")
    for words in (["photos", photo], [photo]):
        assert main(["predict", *words, "--csv"]) == 0
        assert "released_random" in capsys.readouterr().err
    assert main(["predict", "released_random", "photos"]) == 0
    assert "No run was named" not in capsys.readouterr().err


def test_a_checkpoint_predicts_wherever_it_lies(
    run: Run, folder: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = str(tiny_data / "ball" / "image_0001.jpg")
    shutil.copy(run.best, "moved.safetensors")
    said = []
    for network in (str(run.path), str(run.best), "moved.safetensors"):
        assert main(["predict", network, photo, "--csv"]) == 0
        streams = capsys.readouterr()
        said.append(streams.out)
        assert "not calibrated" not in streams.err
    assert said[0] == said[1]
    probabilities = [float(out.splitlines()[1].split(",")[2]) for out in said]
    assert probabilities[2] == pytest.approx(probabilities[0], abs=0.02)  # its number format is not known any more


@pytest.mark.caltech101
@pytest.mark.slow
@pytest.mark.parametrize("name", released_files.available())
def test_what_is_released(name: str, caltech101: Path) -> None:
    file = released_files.FOLDER / f"{released_files.RELEASED[name]}.safetensors"
    assert file.stat().st_size < (400_000 if name == "released_probe" else 10_000_000)
    with open(RESULTS / EVIDENCE[name] / "predictions.csv", newline="", encoding="utf-8") as lines:
        published = {str(caltech101 / row["path"]): row["prediction"] for row in list(csv.DictReader(lines))[::12]}
    inputs = image_inputs(published)
    predictions = list(predict_files(released.open_released(name)[0], inputs, top_k=1))
    same = sum(one.label == published[one.source] for one in predictions)
    assert len(predictions) == 148 and not inputs.failed
    assert same >= 146  # half precision, another machine


@pytest.mark.parametrize("name", released_files.available())
def test_the_released_probe_has_a_frozen_backbone(name: str) -> None:
    assert released.open_released(name)[0].frozen_backbone == (name == "released_probe")


@pytest.mark.parametrize("name", released_files.available())
def test_a_card_has_the_accuracy_of_the_published_run(name: str) -> None:
    card = (released_files.FOLDER / f"{released_files.RELEASED[name]}.md").read_text(encoding="utf-8")
    promised = float(re.findall(r"test accuracy \| ([\d.]+) %", card)[0])
    assert promised == pytest.approx(Run(RESULTS / EVIDENCE[name]).read_json("test.json")["top1"], abs=0.12)
