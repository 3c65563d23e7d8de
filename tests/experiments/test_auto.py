"""``auto``: a network that can be used at any time, within the budget, and every decision on its page."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import finetune101
from finetune101.cli.main import main
from finetune101.config import DataConfig
from finetune101.data.images import index_images
from finetune101.data.verify import verify
from finetune101.experiments import auto_data
from finetune101.experiments.auto import Auto
from finetune101.run import Run

LITE = "efficientnet_lite0"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_interrupted_it_leaves_a_network_and_the_same_command_ends_within_the_budget_with_a_page_that_says_why(
    tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Auto, config: Any) -> None:
        raise KeyboardInterrupt

    command = ["auto", str(tiny_data), "--budget", "45s", "--models", LITE, "--lang", "zh"]
    with monkeypatch.context() as patch:
        patch.setattr(Auto, "_chosen", interrupt)
        assert main(command) == 130
    assert "runs/auto is the best network so far and can be used" in capsys.readouterr().err
    run = Run(here / "runs" / "auto")
    assert list(finetune101.load(run).classes) == ["ball", "box", "stripes"] and not run.has("test.json")
    started = time.monotonic()
    assert main(command) == 0
    assert time.monotonic() - started < 2 * 45
    saved = json.loads((run.path / "auto.json").read_text())
    decided = [decision["about"] for decision in saved["decisions"]]
    assert decided[:5] == ["images", "classes", "duplicates", "split", "probe"]
    assert {"network", "winner", "test"} <= set(decided) and saved["is_done"]
    assert run.read_json("test.json")["times_scored"] == 1 and run.config().exp == "auto"
    page = (run.path / "report" / "report.html").read_text(encoding="utf-8")
    assert "为什么" in page and all(decision["value"] in page for decision in saved["decisions"])
    assert main(["report", "auto", "--out", "en"]) == 0
    assert "What auto decided, and why" in (here / "en" / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(command) == 0 and "is there and tested" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 2 and run.has("test.json")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere"], "nowhere"),
        (["DATA", "--budget", "soon"], "--budget soon is no time"),
        (["DATA", "--budget", "2s"], "--budget is too short"),
        (["DATA", "--models", "resnet19"], "no model 'resnet19'"),
        (["DATA", "--exp", "a/../b"], "exp"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    words: list[str], reason: str, tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_data) if word == "DATA" else word for word in words]
    assert main(["auto", *words]) == 2
    assert reason in capsys.readouterr().err
    assert not (here / "runs").exists() or not any((here / "runs").iterdir())


def test_a_folder_that_is_not_of_this_auto_is_left_alone(
    tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "runs" / "auto").mkdir(parents=True)
    (here / "runs" / "auto" / "thesis.txt").write_text("mine")
    assert main(["auto", str(tiny_data)]) == 2
    assert "choose another --exp" in capsys.readouterr().err
    assert (here / "runs" / "auto" / "thesis.txt").read_text() == "mine"


def split_of(data: Path) -> Any:
    return auto_data.split_for(index_images(data), verify(data), DataConfig(root=str(data)))


def test_near_duplicates_are_on_one_side_and_unreadable_images_left_out(tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for path in sorted((data / "ball").iterdir())[:6]:
        Image.open(path).save(path.with_name(f"again_{path.name}"), quality=80)
    (data / "box" / "image_0003.jpg").write_bytes(b"no image")
    report = verify(data)
    manifest, decision, is_usual = split_of(data)
    places = {path: subset for subset, paths in manifest.subsets.items() for path in paths}
    pairs = [(path, path.replace("again_", "")) for path in places if "again_" in path]
    assert len(pairs) == 6 and all(places[a] == places[b] for a, b in pairs)
    assert "box/image_0003.jpg" not in places and manifest.skipped == ("box/image_0003.jpg",)
    assert decision.why == "split_groups" and not is_usual
    assert [one.why for one in auto_data.looked_at(report)] == ["images_bad", "classes_fine", "duplicates_some"]


def test_own_folders_stay_and_what_they_lack_is_held_out(tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data / "train")
    for name in ("ball", "box", "stripes"):
        (data / "test" / name).mkdir(parents=True)
        (data / "train" / name / "image_0001.jpg").rename(data / "test" / name / "image_0001.jpg")
    manifest, decision, _ = split_of(data)
    assert decision.why == "split_filled" and manifest.subsets["test"] == tuple(
        f"test/{name}/image_0001.jpg" for name in ("ball", "box", "stripes")
    )
    assert len(manifest.subsets["val"]) == 6 and len(manifest.subsets["train"]) == 27
