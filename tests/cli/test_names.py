"""Names, folders and defaults of the command line: whose folder it is, what a name means, what a recipe becomes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SMALL, refused

from finetune101.cli.main import main
from finetune101.config import TrainConfig, validate
from finetune101.recipes import usual_scratch
from finetune101.run import Run

# folders and names


def test_a_run_a_search_and_a_study_do_not_share_a_folder(
    runs: Path, tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(tiny_data), "--no-pretrain", *SMALL]
    shutil.copytree(runs / "a", here / "runs" / "a")
    for folder, file in {"s": "search.json", "j": "optuna.journal", "d": "study.json"}.items():
        (here / "runs" / folder).mkdir()
        (here / "runs" / folder / file).write_text("{}")
    study = ["study", "--data", str(tiny_data), "--models", "squeezenet1_1", "--size", "32", "--dry-run"]
    for words in (
        ["search", "--exp", "a", *common, "--grid", "lr=0.01"],
        ["search", "--exp", "d", *common, "--grid", "lr=0.01", "--dry-run"],
        ["train", "--exp", "s", *common],
        ["train", "--exp", "j", *common, "--overwrite"],
        ["train", "--exp", "d", *common],
        [*study, "--exp", "a"],
        [*study, "--exp", "s"],
    ):
        before = sorted(here.rglob("*"))
        assert "another --exp" in refused(capsys, *words)
        assert sorted(here.rglob("*")) == before


def test_no_advice_leads_from_a_search_to_the_test_images(
    runs: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b", "s/0123", "a/trial"):  # a search, and trials in the folder of a run, as 0.1.0 left them
        shutil.copytree(runs / "b", here / "runs" / name)
    shutil.copytree(runs / "a", here / "runs" / "a", dirs_exist_ok=True)
    for name in ("s/0123", "a/trial"):
        (here / "runs" / name / "predictions.csv").unlink()
    (here / "runs" / "s" / "search.json").write_text("{}")
    assert main(["compare", "a", "b"]) == 0  # the trial in the run's folder is not looked at
    for word in ("s", "runs/s", "s/0123", "runs/s/*"):
        said = refused(capsys, "compare", word, "b")
        assert "winner.yaml" in said and "finetune101 evaluate" not in said
    shutil.copytree(runs / "b", here / "runs" / "all" / "b")
    shutil.copytree(here / "runs" / "s", here / "runs" / "all" / "s")
    assert main(["compare", "a", "all"]) == 0


def test_a_run_is_told_from_another_programs_folder(
    runs: Path, tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "a", here / "runs" / "a")
    for folder in (here / "a", here / "runs" / "theirs"):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architectures": ["ResNet"], "model_type": "resnet"}))
    assert main(["train", "--exp", "a", "--resume"]) == 0  # not ./a
    assert main(["evaluate", "a", "--subset", "val"]) == 0
    assert "no run" in refused(capsys, "evaluate", "theirs")
    words = ["train", "--exp", "theirs", "--data", str(tiny_data), "--no-pretrain", *SMALL]
    for flags in ([], ["--overwrite"]):
        assert "another program" in refused(capsys, *words, *flags)
    assert [file.name for file in (here / "runs" / "theirs").iterdir()] == ["config.json"]


def test_hints_can_be_pasted(
    tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--exp", "my run's", "--runs", "my runs", "--data", str(tiny_data), "--no-pretrain", *SMALL]
    assert main(words) == 0
    hint = shlex.split(capsys.readouterr().out.splitlines()[-1].partition(": ")[2])
    assert hint[:2] == ["finetune101", "evaluate"] and main(hint[1:]) == 0
    assert Run(here / "my runs" / "my run's").resume_command().count("'") >= 4
    hint = shlex.split(Run(here / "my runs" / "my run's").resume_command())
    assert main(hint[1:]) == 0


@pytest.mark.parametrize("exp", ["a" * 300, "é" * 150, "~/x", "~nobody/x", "a\x1b[31mb", "a\nb", "..", "a/../b", ""])
@pytest.mark.parametrize("verb", ["train", "search", "study"])
def test_names_that_no_folder_can_have(verb: str, exp: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--exp" in refused(capsys, verb, "--exp", exp)
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "words", [["evaluate", "NAME"], ["predict", "NAME"], ["report", "NAME"], ["compare", "NAME", "b"]]
)
@pytest.mark.parametrize("name", ["a" * 300, "~nobody-here/x"], ids=["long", "nobody"])
def test_long_names_and_unknown_homes(
    words: list[str], name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *(word.replace("NAME", name) for word in words))
    assert name[:20] in said
    for flags in (["data", "verify", f"--data={name}"], ["train", "--exp", "x", f"--runs={name}/x"]):
        refused(capsys, *flags)
    assert not list(here.iterdir())


def test_a_home_folder_is_known_behind_an_equals_sign(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune101.cli.console import expanded

    monkeypatch.setenv("HOME", str(here))
    assert expanded(["--runs=~/x", "~/y", "--exp", "~/z", "a~b"]) == [
        f"--runs={here}/x",
        f"{here}/y",
        "--exp",
        "~/z",
        "a~b",
    ]


# defaults


def test_the_scratch_recipe_suits_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune101.cli.one_run import training_settings

    def recipe(*words: str, **more: str) -> str | None:
        config: TrainConfig = training_settings(["--exp", "x", *words], **more)
        return config.recipe

    assert recipe("--no-pretrain", "--device", "cpu") == "scratch_fast"
    assert recipe("--no_pretrain", "--device=cuda") == "scratch_long"
    monkeypatch.setattr("finetune101.recipes.has_gpu", lambda: True)
    assert recipe("--no-pretrain") == "scratch_long"
    assert recipe("--no-pretrain", "--device", "mps") == "scratch_fast"
    assert recipe("--no-pretrain", "--model", "vit_b_16") == "original"
    assert recipe("--no-pretrain", "--recipe", "scratch") == "scratch"
    assert recipe("--no-pretrain", model="resnet18") == recipe(model="resnet18") == "original"  # train.py


def test_a_recipe_fits_the_epochs_and_the_size_given() -> None:
    from finetune101.cli.one_run import training_settings

    words = ["--exp", "x", "--no-pretrain", "--device", "cpu", "--epochs", "1", "--size", "48"]
    config = training_settings(words)
    validate(config)
    assert config.optim.warmup_epochs == 0 and set(config.augment.train_sizes) == {48}
    config = training_settings([*words, "--warmup-epochs", "2", "--train-sizes", "96"])
    assert config.optim.warmup_epochs == 2 and config.augment.train_sizes == (96,)


@pytest.mark.parametrize(
    "words", [["--no-pretrain"], ["--recipe", "original"], ["--no-pretrain", "--recipe", "scratch"]]
)
def test_no_epochs_are_told_as_such(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--epochs" in refused(capsys, "train", "--exp", "x", *words, "--epochs", "0")


def test_lists_of_a_study_may_have_commas_and_equals_signs() -> None:
    from finetune101.cli.main import split_lists

    words = ["--train-per-class=1,2", "--models", "a,b", "c", "--arms=probe", "--exp", "x,y", "--train_per_class", "3"]
    wanted = "--train-per-class 1 2 --models a b c --arms probe --exp x,y --train_per_class 3"
    assert split_lists(words) == wanted.split()


def test_a_study_keeps_the_scratch_recipe_it_began_with(here: Path) -> None:
    from finetune101.experiments.plan import scratch_recipe
    from finetune101.experiments.settings import StudyConfig

    (here / "study.json").write_text(json.dumps({"settings": {"scratch_recipe": "scratch"}, "cells": []}))
    assert scratch_recipe(StudyConfig(exp="s"), here) == "scratch"
    assert scratch_recipe(StudyConfig(exp="s", scratch_recipe="original"), here) == "original"
    assert scratch_recipe(StudyConfig(exp="s"), here / "new") == usual_scratch()


def test_training_does_not_ask_for_a_notebooks_backend(tiny_data: Path, here: Path) -> None:
    code = "import sys\nfrom finetune101.cli.main import main\nassert main(sys.argv[1:]) == 0\n"
    code += "import finetune101.reports.search_page, finetune101.experiments.point_run\n"
    code += "assert 'matplotlib.pyplot' not in sys.modules"
    words = ["train", "--exp", "x", "--data", str(tiny_data), "--no-pretrain", *SMALL]
    for backend in ("module://matplotlib_inline.backend_inline", "nonsense"):
        env = {**os.environ, "MPLBACKEND": backend}
        done = subprocess.run(
            [sys.executable, "-c", code, *words, "--overwrite"], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert (here / "runs" / "x" / "curves.png").is_file()
