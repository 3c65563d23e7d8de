"""Predictions of a small real network, from a run directory on disk."""

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from finetune101.cli.main import main
from finetune101.config import TrainConfig, to_dict
from finetune101.data.batches import to_input
from finetune101.data.decode import decode
from finetune101.deploy.inputs import image_inputs
from finetune101.deploy.predict import predict_files
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import open_network, read_checkpoint
from finetune101.evaluation.result import FROZEN
from finetune101.machine import World
from finetune101.models.build import build
from finetune101.run import KEPT, Run

WORLD = {"device": "cpu", "precision": "fp32", "channels_last": False}
START = {"init_source": "random (seed 0)", "init_hash": "sha256:00"}


CLASSES = ["ball", "box", "stripes"]


@pytest.fixture(scope="module")
def built():
    return build("squeezenet1_1", len(CLASSES), pretrain=False, size=64)


@pytest.fixture(scope="module")
def run(built, tmp_path_factory):
    """A run with the best checkpoint of an untrained SqueezeNet at 64 px."""
    run = Run(tmp_path_factory.mktemp("runs") / "tiny")
    run.write_json("config.json", to_dict(TrainConfig(exp="tiny")))
    run.write_json("env.json", {"world": WORLD, "model": START})
    info = {
        "model": "squeezenet1_1",
        "classes": json.dumps(CLASSES),
        "preprocessing": json.dumps(to_dict(built.preprocessing)),
    }
    save_file(built.model.state_dict(), run.best, info)
    return run


@pytest.fixture
def folder(six_images, tiny_data):
    """Six good images in two folders, one that is cut off and one that is text."""
    whole = (tiny_data / "box" / "image_0004.jpg").read_bytes()
    (six_images / "box" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (six_images / "box" / "text.PNG").write_text("not an image")
    return six_images


def labels_of(run, *words, **numbers):
    """The predictions for ``words``, and what failed."""
    inputs = image_inputs(map(str, words))
    return list(predict_files(open_network(run), inputs, **numbers)), inputs.failed


def test_probabilities_are_those_of_the_network(run, built, tiny_data):
    file = str(tiny_data / "ball" / "image_0001.jpg")
    pixels = torch.tensor(decode(file, built.preprocessing.cache_size, built.preprocessing.interpolation))
    x = to_input(pixels.permute(2, 0, 1)[None], built.preprocessing, World(torch.device("cpu"), "fp32", False))
    with torch.inference_mode():
        expected = built.model.eval()(x).softmax(1)[0]
    (one,), failed = labels_of(run, file)
    assert not failed and one.source == file
    assert sorted(name for name, _ in one.classes) == CLASSES
    for name, probability in one.classes:
        assert probability == pytest.approx(float(expected[CLASSES.index(name)]), abs=1e-5)
    probabilities = [probability for _, probability in one.classes]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)


def test_a_frozen_backbone_is_told_once_and_beside_the_output(run, tiny_data, capsys):
    words = ["predict", str(run.path), str(tiny_data / "ball" / "image_0001.jpg"), "--json"]
    settings = run.read_json("config.json")
    assert main(words) == 0 and "rozen" not in capsys.readouterr().err
    (run.path / KEPT).unlink()
    run.write_json("config.json", {**settings, "model": {**settings["model"], "freeze": True}})
    try:
        assert main(words) == 0
    finally:
        run.write_json("config.json", settings)
        (run.path / KEPT).unlink()
    printed = capsys.readouterr()
    assert printed.err.count(FROZEN) == 1 and json.loads(printed.out)["predictions"]


def test_a_folder_with_bad_files_is_finished(run, folder):
    predictions, failed = labels_of(run, folder, top_k=1, batch_size=2)
    expected = [folder / name / f"image_{i:04d}.jpg" for name in ("ball", "box") for i in (1, 2, 3)]
    assert [one.source for one in predictions] == [str(path) for path in expected]
    assert all(len(one.classes) == 1 for one in predictions)
    assert [path for path, _ in failed] == [str(folder / "box" / "cut.jpg"), str(folder / "box" / "text.PNG")]
    assert "truncated" in failed[0][1]


def test_batch_size_changes_nothing(run, folder):
    one, _ = labels_of(run, folder, batch_size=1)
    many, _ = labels_of(run, folder, batch_size=64)
    assert one == many


def test_only_bad_files(run, folder):
    predictions, failed = labels_of(run, folder / "box" / "cut.jpg", folder / "missing.jpg")
    assert predictions == []
    assert dict(failed)[str(folder / "missing.jpg")] == "no such file or folder"
    assert len(failed) == 2


def test_predictions_come_batch_by_batch(run, tiny_data):
    images = image_inputs([str(tiny_data)])
    predictions = predict_files(open_network(run), images, batch_size=4)
    assert [next(predictions).source for _ in range(4)] == list(images.files)[:4]


@pytest.mark.parametrize("numbers", [{"top_k": 0}, {"batch_size": 0}])
def test_impossible_numbers_are_refused_before_an_image_is_read(run, numbers):
    with pytest.raises(Refused, match="of at least 1"):
        predict_files(open_network(run), image_inputs(["x.jpg"]), **numbers)


def test_a_run_without_checkpoint_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match=r"best\.safetensors"):
        open_network(Run(tmp_path))


def predict(run, *words):
    return main(["predict", str(run.path), *map(str, words)])


def test_a_table_is_written_whole_and_never_replaced_unasked(run, folder, tmp_path, capsys):
    out = tmp_path / "labels.csv"
    assert predict(run, folder, "--out", out) == 1  # two images cannot be read
    printed = capsys.readouterr()
    assert len(out.read_text().splitlines()) == 7 and "6 images" in printed.out
    assert "1 files that are no images by their names" in printed.err and "notes.txt" in printed.err
    before = out.read_bytes()
    assert predict(run, folder, "--out", out) == 2 and "--overwrite" in capsys.readouterr().err
    assert predict(run, folder, "--out", out, "--top-k", "1", "--overwrite") == 1
    assert len(before.splitlines()[0]) > len(out.read_bytes().splitlines()[0])


def test_an_output_that_is_no_number_leaves_no_table(run, built, folder, tmp_path, capsys):
    wild = Run(tmp_path / "wild")
    shutil.copytree(run.path, wild.path, ignore=shutil.ignore_patterns(KEPT, "best.safetensors"))
    _, info = read_checkpoint(run.best)
    save_file({name: 1e30 * tensor for name, tensor in built.model.state_dict().items()}, wild.best, info)
    assert predict(wild, folder / "ball", "--out", folder / "labels.json") == 2
    assert "not finite" in capsys.readouterr().err and not (folder / "labels.json").exists()


CONTRADICTIONS = (
    "--csv --json", "--csv --out x.csv", "--link", "--unsure-below 0.1", "--out x.txt", "--into x --unsure-below 2",
)  # fmt: skip


@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_flags_that_contradict_are_refused(run, tiny_data, here, words, capsys):
    assert predict(run, tiny_data, *words.split()) == 2
    assert list(here.iterdir()) == [] and "error:" in capsys.readouterr().err


def test_images_are_sorted_and_the_rows_still_printed(run, folder, tmp_path_factory, capsys):
    into = tmp_path_factory.mktemp("sorted") / "photos"
    assert predict(run, folder, "--into", into, "--unsure-below", "0", "--csv") == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 7 and "6 images copied" in printed.err
    assert len([file for file in into.rglob("*") if file.is_file()]) == 6
    assert predict(run, folder, "--into", into, "--unsure-below", "0") == 1
    assert "0 images copied" in (out := capsys.readouterr().out) and "6 were there already" in out


def test_a_list_of_images_and_standard_input(run, tiny_data, here, monkeypatch, capsys):
    files = [str(tiny_data / "box" / f"image_{i:04d}.jpg") for i in (1, 2)]
    (here / "list.txt").write_text("\n".join(files) + "\n")
    assert predict(run, "@list.txt", "--csv") == 0
    listed = capsys.readouterr().out
    assert [line.split(",")[0] for line in listed.splitlines()[1:]] == files
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\0".join(files).encode())))
    assert predict(run, "-", "--csv") == 0
    assert capsys.readouterr().out == listed
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(files[0].encode())))
    assert main(["predict", "-", "--csv", "--top-k", "1"]) == 0  # without a run


@pytest.mark.slow
def test_an_exported_file_labels_as_its_network(run, folder, here, capsys):
    assert main(["export", str(run.path), "--out", "tiny.onnx", "--parity", str(folder / "ball")]) == 0
    capsys.readouterr()
    assert main(["predict", "tiny.onnx", str(folder), "--json"]) == 1  # two images cannot be read
    exported = json.loads(capsys.readouterr().out)
    assert predict(run, folder, "--json") == 1
    own = json.loads(capsys.readouterr().out)
    assert exported["failed"] == own["failed"] and len(exported["predictions"]) == 6
    for one, other in zip(exported["predictions"], own["predictions"], strict=True):
        assert one["path"] == other["path"]
        probabilities = [{label["class"]: label["probability"] for label in row["classes"]} for row in (one, other)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-4)
    assert main(["predict", "tiny.onnx"]) == 2
