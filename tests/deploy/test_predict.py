"""Predictions of a small real network, from a run directory on disk."""

import csv
import io
import json
import os
import shutil
import threading

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from finetune101.cli.main import main
from finetune101.config import TrainConfig, to_dict
from finetune101.data.batches import to_input
from finetune101.data.decode import decode
from finetune101.deploy import predict
from finetune101.evaluation.checkpoint import FROZEN, open_network
from finetune101.evaluation.predictions import name_in_cell
from finetune101.machine import World
from finetune101.models.build import build
from finetune101.run import Run

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
def folder(tiny_data, tmp_path):
    """Six good images in two folders, one that is cut off and one that is text."""
    for name in ("ball", "box"):
        (tmp_path / name).mkdir()
        for i in (1, 2, 3):
            shutil.copy(tiny_data / name / f"image_{i:04d}.jpg", tmp_path / name)
    whole = (tiny_data / "box" / "image_0004.jpg").read_bytes()
    (tmp_path / "box" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "box" / "text.PNG").write_text("not an image")
    (tmp_path / "box" / "notes.txt").write_text("left alone")
    for junk in (".hidden", "@eaDir"):  # what train ignores without a word
        (tmp_path / junk).mkdir()
        (tmp_path / junk / "x.jpg").write_bytes(whole)
    return tmp_path


def test_probabilities_are_those_of_the_network(run, built, tiny_data):
    file = str(tiny_data / "ball" / "image_0001.jpg")
    pixels = torch.tensor(decode(file, built.preprocessing.cache_size, built.preprocessing.interpolation))
    x = to_input(pixels.permute(2, 0, 1)[None], built.preprocessing, World(torch.device("cpu"), "fp32", False))
    with torch.inference_mode():
        expected = built.model.eval()(x).softmax(1)[0]
    rows, failed = predict.predict_files(open_network(run), [file])
    assert not failed
    assert rows[0]["path"] == file
    assert sorted(name for name, _ in rows[0]["predictions"]) == CLASSES
    for name, probability in rows[0]["predictions"]:
        assert probability == pytest.approx(float(expected[CLASSES.index(name)]), abs=1e-5)
    probabilities = [probability for _, probability in rows[0]["predictions"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)


def test_a_frozen_backbone_is_told_once_and_beside_the_output(run, tiny_data, capsys):
    words = ["predict", str(run.path), str(tiny_data / "ball" / "image_0001.jpg"), "--json"]
    settings = run.read_json("config.json")
    assert main(words) == 0 and "rozen" not in capsys.readouterr().err
    run.write_json("config.json", {**settings, "model": {**settings["model"], "freeze": True}})
    try:
        assert main(words) == 0
    finally:
        run.write_json("config.json", settings)
    printed = capsys.readouterr()
    assert printed.err.count(FROZEN) == 1 and json.loads(printed.out)["predictions"]


def test_a_folder_with_bad_files_is_finished(run, folder):
    rows, failed = predict.predict_files(open_network(run), [str(folder)], top_k=1, batch_size=2)
    expected = [folder / name / f"image_{i:04d}.jpg" for name in ("ball", "box") for i in (1, 2, 3)]
    assert [row["path"] for row in rows] == [str(path) for path in expected]
    assert all(len(row["predictions"]) == 1 for row in rows)
    assert [path for path, _ in failed] == [str(folder / "box" / "cut.jpg"), str(folder / "box" / "text.PNG")]
    assert "truncated" in failed[0][1]


def test_batch_size_changes_nothing(run, folder):
    one, _ = predict.predict_files(open_network(run), [str(folder)], batch_size=1)
    many, _ = predict.predict_files(open_network(run), [str(folder)], batch_size=64)
    for a, b in zip(one, many, strict=True):
        assert a == b


def test_only_bad_files(run, folder):
    rows, failed = predict.predict_files(
        open_network(run), [str(folder / "box" / "cut.jpg"), str(folder / "missing.jpg")]
    )
    assert rows == []
    assert dict(failed)[str(folder / "missing.jpg")] == "no such file or folder"
    assert len(failed) == 2


def test_inputs_may_be_files_folders_and_patterns(folder):
    def names(*inputs):
        files, failed = predict.expand([str(folder / given) for given in inputs])
        return [os.path.relpath(file, folder).replace(os.sep, "/") for file in files], [reason for _, reason in failed]

    assert names("ball/*_000[12].jpg") == (["ball/image_0001.jpg", "ball/image_0002.jpg"], [])
    assert names("b*")[0] == names("ball", "box")[0] == names("**")[0] == names("")[0]
    assert len(names("ball", "ball/image_0001.jpg")[0]) == 3
    assert names("box/notes.txt") == (["box/notes.txt"], [])
    assert names("box/*.txt")[0] == names("none/*.jpg")[0] == []
    assert "no image there" in names("box/*.txt")[1][0]
    assert names("none/*.jpg")[1] == ["no such file or folder"]
    (folder / "empty").mkdir()
    assert "no image there" in names("empty")[1][0]


def test_a_name_that_looks_like_a_pattern(folder):
    odd = folder / "photo[1].jpg"
    shutil.copy(folder / "ball" / "image_0001.jpg", odd)
    assert predict.expand([str(odd)]) == ([str(odd)], [])


def test_unusual_images_are_read(run, tmp_path):
    picture = Image.new("RGB", (40, 30), (200, 30, 30))
    picture.convert("L").save(tmp_path / "gray.png")
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    picture.convert("P").save(tmp_path / "palette.png", transparency=0)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.save(tmp_path / "pixels.webp")
    picture.resize((1, 1)).save(tmp_path / "one.bmp")
    rows, failed = predict.predict_files(open_network(run), [str(tmp_path)])
    assert (len(rows), failed) == (6, [])


def test_what_is_no_file_is_named_at_once(run, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "nowhere.jpg")
    given = [str(tmp_path / "pipe.png"), str(tmp_path / "dead.jpg"), "/dev/null", str(tmp_path / "*.png"), "a\0b.jpg"]
    results = []
    thread = threading.Thread(target=lambda: results.append(predict.expand(given)), daemon=True)
    thread.start()
    thread.join(20)  # opening a pipe that nobody writes to waits for ever
    files, failed = results[0]
    assert files == [] and [path for path, _ in failed] == given


@pytest.mark.parametrize("numbers", [{"top_k": 0}, {"batch_size": 0}])
def test_impossible_numbers_are_a_value_error(run, numbers):
    with pytest.raises(ValueError, match="give at least 1"):
        predict.predict_files(open_network(run), ["x.jpg"], **numbers)


def test_a_run_without_checkpoint_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match=r"best\.safetensors"):
        open_network(Run(tmp_path))


ROWS = [
    {"path": "a, b.jpg", "predictions": [("ball", 0.75), ("box", 0.25)]},
    {"path": "贝.jpg", "predictions": [("box", 1.0), ("ball", 0.0)]},
]


def test_text():
    lines = predict.as_text(ROWS).splitlines()
    assert lines == ["a, b.jpg", "   75.0 %  ball", "   25.0 %  box", "贝.jpg", "  100.0 %  box", "    0.0 %  ball"]


def test_csv():
    table = list(csv.DictReader(io.StringIO(predict.as_csv(ROWS))))
    assert table[0] == {
        "path": "a, b.jpg",
        "class_1": "ball",
        "probability_1": "0.750000",
        "class_2": "box",
        "probability_2": "0.250000",
    }
    assert predict.as_csv([]) == "path,class_1,probability_1"


STRANGE = [{"path": "d/\x1b[2Jphoto\udce9.jpg", "predictions": [("=cmd|' /C calc'!A1", 0.5), ("猫\u202e", 0.5)]}]


def test_names_are_printed_without_control_characters_or_bytes():
    text = predict.as_text(STRANGE)
    assert "\\x1b[2Jphoto\\xe9.jpg" in text and "猫" in text and text.isprintable() is False  # newlines alone
    assert all(line.isprintable() for line in text.splitlines())
    table = predict.as_csv(STRANGE)
    assert "\x1b" not in table and table.encode("utf-8")
    row = next(csv.DictReader(io.StringIO(table)))
    assert row["class_1"].startswith("'=") and name_in_cell(row["class_1"]) == STRANGE[0]["predictions"][0][0]
    assert name_in_cell(row["path"]) == STRANGE[0]["path"]
    assert json.loads(predict.as_json(STRANGE, []))["predictions"][0]["path"] == STRANGE[0]["path"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_json_fits_any_console(encoding):
    assert json.loads(predict.as_json(ROWS, []).encode(encoding))["predictions"][1]["path"] == "贝.jpg"


def test_json():
    value = json.loads(predict.as_json(ROWS, [("x.jpg", "no such file or folder")]))
    assert value["predictions"][1]["classes"][0] == {"class": "box", "probability": 1.0}
    assert value["failed"] == [{"path": "x.jpg", "reason": "no such file or folder"}]
