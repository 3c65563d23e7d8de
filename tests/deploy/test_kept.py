"""The exported network that a run keeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from finetune101.cli.main import main
from finetune101.config import TrainConfig, to_dict
from finetune101.deploy import kept
from finetune101.deploy.bundle import export_bundle
from finetune101.deploy.choose import Chosen, choose
from finetune101.deploy.export import open_source
from finetune101.deploy.kept import answering_network, open_kept
from finetune101.deploy.onnx_network import OnnxNetwork
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.models.build import build
from finetune101.run import KEPT, Run

CLASSES = ["ball", "box", "stripes"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with an untrained SqueezeNet at 64 px."""
    run, built = Run(tmp_path / "runs" / "tiny"), build("squeezenet1_1", len(CLASSES), pretrain=False, size=64)
    run.write_json("config.json", to_dict(TrainConfig(exp="tiny")))
    world = {"device": "cpu", "precision": "fp32", "channels_last": False}
    run.write_json("env.json", {"world": world, "model": {"init_source": "random (seed 0)", "init_hash": "sha256:00"}})
    info = {"classes": json.dumps(CLASSES), "preprocessing": json.dumps(to_dict(built.preprocessing))}
    save_file(built.model.state_dict(), run.best, {"model": "squeezenet1_1", **info})
    return run


def answers(run: Run, photo: Path) -> OnnxNetwork | TrainedNetwork:
    return answering_network(choose([str(run.path), str(photo)]))


def test_it_is_made_once_and_anew_when_the_run_changes(
    run: Run, tiny_data: Path, capsys: pytest.CaptureFixture
) -> None:
    photo = tiny_data / "ball" / "image_0001.jpg"
    assert open_kept(run) is None
    first = answers(run, photo)
    assert isinstance(first, OnnxNetwork) and first.name == str(run.path) and "Exporting" in capsys.readouterr().err
    written = (run.path / KEPT).stat().st_mtime_ns
    again = answers(run, photo)
    assert (run.path / KEPT).stat().st_mtime_ns == written and not capsys.readouterr().err
    assert isinstance(again, OnnxNetwork) and again.temperature is None
    run.write_json("temperature.json", {"weights": answered_hash(run), "temperature": 2.0})
    warm = answers(run, photo)
    assert isinstance(warm, OnnxNetwork) and warm.temperature == 2.0 and "Exporting" in capsys.readouterr().err
    (run.path / KEPT).write_bytes(b"damaged")
    assert isinstance(answers(run, photo), OnnxNetwork)
    run.clear()
    assert not (run.path / KEPT).exists()


def answered_hash(run: Run) -> str:
    return choose([str(run.path), "x.jpg"]).network.checkpoint_hash


def test_where_it_cannot_be_kept_pytorch_answers(run: Run, tiny_data: Path, capsys: pytest.CaptureFixture) -> None:
    photo = str(tiny_data / "ball" / "image_0001.jpg")
    (run.path / KEPT).mkdir()  # in its way
    started = len(os.listdir(run.path))
    assert main(["predict", str(run.path), photo, "--csv"]) == 0
    printed = capsys.readouterr()
    assert photo in printed.out and f"PyTorch answers for {run.path}" in printed.err
    assert len(os.listdir(run.path)) == started
    elsewhere = run.path.parent.parent / "weights.safetensors"
    elsewhere.write_bytes(run.best.read_bytes())
    assert isinstance(answering_network(choose([str(elsewhere), photo])), TrainedNetwork)


def test_why_there_is_none_is_remembered(
    run: Run, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    photo = tiny_data / "ball" / "image_0001.jpg"
    monkeypatch.setattr(kept, "SAME", 0.0)  # no two ways of counting agree so well
    for said in ("Exporting", ""):
        assert isinstance(answers(run, photo), TrainedNetwork)
        printed = capsys.readouterr().err
        assert "differs from it by" in printed and ("Exporting" in printed) == bool(said)
    assert not (run.path / KEPT).exists()


def test_many_photos_need_no_pytorch_where_it_is_missing(run: Run, tiny_data: Path, monkeypatch: Any) -> None:
    assert isinstance(answers(run, tiny_data / "ball" / "image_0001.jpg"), OnnxNetwork)
    monkeypatch.setattr(kept, "find_spec", lambda name: None)
    monkeypatch.setattr(kept, "has_gpu", lambda: pytest.fail("asks PyTorch"))
    assert isinstance(answering_network(choose([str(run.path), "x.jpg"]), images=10_000), OnnxNetwork)


@pytest.mark.parametrize("name", ["released_finetune", "released_random"])
def test_a_released_onnx_file_gives_the_answers_of_its_weights(name: str) -> None:
    chosen = Chosen(name, [])
    answering = answering_network(chosen)
    assert isinstance(answering, OnnxNetwork) and answering.info.weights == chosen.network.checkpoint_hash
    assert chosen.network.unlike and answering.unlike == chosen.network.unlike.threshold
    assert answering.temperature == chosen.network.temperature and answering.classes == chosen.network.classes
    kept.check_same(answering, chosen.network)


def test_a_bundle_holds_the_network_and_the_program(run: Run, tiny_data: Path, tmp_path: Path) -> None:
    source = open_source(str(run.best))
    bundle = export_bundle(source, tmp_path / "bundle", parity=str(tiny_data / "box"))
    names = {file.name for file in bundle.file.iterdir()}
    assert names == {"network.onnx", "predict.py", "requirements.txt"} and "No card" in str(bundle)
    lines = (bundle.file / "requirements.txt").read_text().splitlines()
    assert [line.partition("==")[0] for line in lines] == ["numpy", "pillow", "onnxruntime"]
    assert bundle.parity and bundle.parity.resized.changed == 0
    assert main(["export", str(run.best), "--format", "bundle", "--out", str(bundle.file)]) == 2  # it is there
    with pytest.raises(Refused):
        export_bundle(source, tmp_path / "other", parity=str(tmp_path / "gone"))
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "bundle"}
