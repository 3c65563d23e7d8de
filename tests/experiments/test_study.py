"""A small study, trained for real: its runs, its splits, and what a second call does."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import claims
import publish
import publish_study
import pytest
from experiments.in_process import InProcess

from finetune101.cli.main import main
from finetune101.data import splits
from finetune101.data.images import Index, index_images
from finetune101.errors import Refused
from finetune101.evaluation.evaluate import evaluate
from finetune101.experiments import runner, workers
from finetune101.experiments import study as experiment
from finetune101.experiments.folders import alone
from finetune101.experiments.plan import plan_study, write_splits
from finetune101.experiments.runner import MAX_LOSSES, Ended, LocalWorkers, Task
from finetune101.experiments.settings import StudyConfig
from finetune101.recipes import scratch
from finetune101.reports import groups, pages
from finetune101.run import Run
from finetune101.training.job import prepare
from finetune101.training.loop import fit


@pytest.fixture(scope="module")
def index(tiny_data: Path) -> Index:
    return index_images(tiny_data)


@pytest.fixture(scope="module")
def study(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    return StudyConfig(
        exp="s",
        runs=str(tmp_path_factory.mktemp("study")),
        data=str(tiny_data),
        arms=("probe", "scratch"),
        scratch_recipe="original",
        seeds=1,
        train_per_class=(2, 4),
        epochs=1,
        batch_size=6,
        size=32,
        threads=1,
    )


@pytest.fixture(scope="module")
def folder(study: StudyConfig, index: Index) -> Path:
    experiment.run_study(study, index, plan_study(study, index), InProcess())
    return Path(study.runs) / "s"


def test_every_cell_is_trained_and_tested(folder: Path) -> None:
    cells = json.loads((folder / "study.json").read_text())["cells"]
    assert [(c["arm"], c["size"], c["n"]) for c in cells] == [
        (arm, size, 1) for size in (2, 4) for arm in ("probe", "scratch")
    ]
    for cell in cells:
        run = Run(folder / cell["folder"] / "split42_seed0")
        assert run.has("test.json") and run.best.is_file() and not run.last.exists()
        assert cell["top1"] == run.read_json("test.json")["top1"] and cell["seconds"] > 0
        assert cell["frozen"] == (cell["arm"] == "probe")


def test_a_study_says_where_only_the_output_layer_was_trained(folder: Path) -> None:
    table = experiment.study_text(json.loads((folder / "study.json").read_text())).splitlines()
    assert ["frozen backbone in 1" in line for line in table[1:5]] == [True, False, True, False]
    for arm in ("probe", "scratch"):
        config = Run(folder / "efficientnet_lite0" / arm / "2_per_class" / "split42_seed0").config()
        assert ("frozen backbone" in experiment._result_text(Ended(Task(config)))) == (arm == "probe")


def test_sizes_are_nested_and_share_test_images_and_steps(folder: Path) -> None:
    small, large = (splits.read_split(folder / "splits" / f"split42_{size}_per_class.json") for size in (2, 4))
    assert small.subsets["test"] == large.subsets["test"] and len(small.subsets["test"]) == 3 * 8
    assert set(small.subsets["train"]) < set(large.subsets["train"])
    assert (len(small.subsets["train"]), small.subsets["val"]) == (6, ())
    runs = [Run(folder / "efficientnet_lite0" / "scratch" / f"{n}_per_class" / "split42_seed0") for n in (2, 4)]
    assert [len(run.metrics()) for run in runs] == [2, 1]
    assert [run.metrics()[-1]["step"] for run in runs] == [2, 2]
    assert runs[0].config().optim.step_size == 2 * runs[1].config().optim.step_size


def test_a_second_call_trains_nothing(folder: Path, study: StudyConfig, index: Index) -> None:
    times = {file: file.stat().st_mtime_ns for file in folder.glob("**/test.json")}
    cells = plan_study(study, index)
    assert all(experiment.is_done(config) for cell in cells for config in cell.runs)
    experiment.run_study(study, index, cells, InProcess())
    assert times == {file: file.stat().st_mtime_ns for file in folder.glob("**/test.json")} and len(times) == 4


def test_the_estimate_counts_every_run_that_is_left(
    folder: Path, study: StudyConfig, index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment.estimate(index, plan_study(study, index)) == "4 runs, 0 to do."
    more = dataclasses.replace(study, seeds=3, models=(*study.models, "squeezenet1_1"), arms=("scratch",))
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    said = experiment.estimate(index, plan_study(more, index), budget=0)
    assert said.startswith("12 runs, 10 to do. This takes about ") and said.endswith("1 more are guessed.")
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_other_settings_are_another_study(folder: Path, study: StudyConfig, index: Index) -> None:
    other = dataclasses.replace(study, epochs=2)
    with pytest.raises(ValueError, match="give the study another --exp"):
        experiment.run_study(other, index, plan_study(other, index), InProcess())


def test_settings_that_cannot_work_are_refused(study: StudyConfig, index: Index) -> None:
    for change, message in (
        ({"seeds": 0}, "--seeds is 0"),
        ({"arms": ()}, "--arms names nothing"),
        ({"models": ()}, "--models names nothing"),
        ({"exp": "../x"}, "--exp '../x' cannot name a folder"),
        ({"train_per_class": (0, 1)}, "--train-per-class is 0 1"),
        ({"split_seed": -1}, "--split-seed is -1"),
        ({"exp": "a" * 300}, "too long"),
        ({"train_per_class": (1, 500)}, "too few images for --train-per-class 500 and a test"),
        ({"scratch_recipe": "probe"}, "--scratch-recipe probe trains the output layer only"),
        ({"probe_recipe": "finetune"}, "--probe-recipe finetune trains every layer"),
        ({"scratch_recipe": "none"}, "there is no recipe none"),
        ({"epochs": 0}, "--epochs is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_study(dataclasses.replace(study, **change), index)


def test_an_arm_may_take_a_recipe_file_or_a_recipe_with_sizes_of_its_own(
    study: StudyConfig, index: Index, tmp_path: Path
) -> None:
    file = tmp_path / "winner.yaml"
    file.write_text("optim: {epochs: 5, lr: 0.02}\nmodel: {name: alexnet, size: 64, pretrain: true}\n")
    own = dataclasses.replace(study, arms=("scratch",), size=None, epochs=None, train_per_class=())
    found = plan_study(dataclasses.replace(own, scratch_recipe=str(file)), index)[0].runs[0]
    assert (found.model.name, found.model.size, found.model.pretrain) == ("efficientnet_lite0", 64, False)
    assert (found.optim.epochs, found.optim.lr) == (5, 0.02)
    recipe = dataclasses.replace(own, scratch_recipe="scratch")
    found = plan_study(recipe, index)[0].runs[0]
    assert (found.model.size, found.augment.train_sizes) == (160, scratch("x").augment.train_sizes)
    found = plan_study(dataclasses.replace(recipe, size=96), index)[0].runs[0]
    assert (found.model.size, found.model.cache_size, max(found.augment.train_sizes)) == (96, None, 96)
    both = dataclasses.replace(own, arms=("finetune", "scratch"), epochs=3, scratch_epochs=7)
    assert [cell.runs[0].optim.epochs for cell in plan_study(both, index)] == [3, 7]


def test_a_study_has_a_picture_and_a_report(folder: Path, tmp_path: Path) -> None:
    assert [picture.name for picture in pages.draw_study(folder)] == ["efficientnet_lite0.png"]
    page = pages.write_report(str(folder), tmp_path / "report").read_text(encoding="utf-8")
    assert "Accuracy against training images per class" in page
    assert "Training images per class: 4. Test accuracy: probe " in page and "Test accuracy of the arms" in page
    assert (tmp_path / "report" / "report.md").is_file()
    found = pages.study_groups(folder)
    assert [(group.name, len(group.runs)) for group in found] == [("probe", 1), ("scratch", 1)]


def test_the_page_of_an_unfinished_study_says_so(
    folder: Path, study: StudyConfig, index: Index, tmp_path: Path
) -> None:
    copy = tmp_path / "s"
    shutil.copytree(folder, copy)
    summary = experiment.summarise(study, plan_study(dataclasses.replace(study, seeds=2), index), {})
    Run(copy).write_json("study.json", summary)
    page = pages.write_report(str(copy), tmp_path / "report").read_text(encoding="utf-8")
    assert "4 of 8 runs are done. Training images per class: 4." in page and ">1 / 2</td>" in page


def test_a_run_that_is_tested_before_its_end_is_not_done(study: StudyConfig, index: Index, tmp_path: Path) -> None:
    own = dataclasses.replace(study, runs=str(tmp_path), arms=("scratch",), train_per_class=(), epochs=2)
    cells = plan_study(own, index)
    job = prepare(cells[0].runs[0])
    next(fit(job, quiet=True))
    with pytest.raises(ValueError, match=r"stands at epoch 1 of 2; go on with: finetune101 train --exp .* --resume"):
        groups.read_tested(job.run)
    evaluate(job.run)
    assert not experiment.is_done(cells[0].runs[0])
    assert experiment.run_study(own, index, cells, InProcess())["cells"][0]["n"] == 1
    assert experiment.is_done(cells[0].runs[0]) and job.run.stopped() == "" and len(job.run.metrics()) == 2


def test_the_page_of_several_networks_compares_the_arms_of_each(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "s"
    shutil.copytree(folder, copy)
    saved = json.loads((copy / "study.json").read_text())
    saved["cells"] += [{**cell, "model": "another"} for cell in saved["cells"]]
    (copy / "study.json").write_text(json.dumps(saved))
    text = (pages.write_report(str(copy), tmp_path / "report").parent / "report.md").read_text(encoding="utf-8")
    for network in ("efficientnet_lite0", "another"):
        assert f"{network}: Training images per class: 4. Test accuracy: probe " in text
    assert "## Accuracy and cost – another" in text


def test_sizes_that_would_change_the_test_images_are_refused(tmp_path: Path, study: StudyConfig) -> None:
    few = dataclasses.replace(study, runs=str(tmp_path))
    index = index_images(Path(str(study.data)))
    write_splits(few, index)
    before = {file.name: file.read_bytes() for file in (tmp_path / "s" / "splits").iterdir()}
    more = dataclasses.replace(few, train_per_class=(2, 4, 6))
    with pytest.raises(ValueError, match="is another split than these sizes need; give the study another --exp"):
        write_splits(more, index)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "s" / "splits").iterdir()}


def test_a_run_that_failed_does_not_stop_the_page(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "s"
    shutil.copytree(folder, copy)
    broken = copy / "efficientnet_lite0" / "scratch" / "4_per_class" / "split42_seed1"
    shutil.copytree(broken.parent / "split42_seed0", broken)
    for name in ("test.json", "best.safetensors"):
        (broken / name).unlink()
    assert [len(group.runs) for group in pages.study_groups(copy)] == [1, 1]


def test_a_study_is_published_and_put_back(
    folder: Path, study: StudyConfig, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "claims.json").write_text("[]")
    for module in (publish, publish_study):
        monkeypatch.setattr(module, "RESULTS", results)
    publish_study.publish(folder, "finetune101 study --exp s", ["probe"])
    found = {claim["id"] for claim in json.loads((results / "claims.json").read_text())}
    assert "study.scratch.efficientnet_lite0.per_class_4.top1" in found
    assert "best.probe.efficientnet_lite0.per_class_4.top1" in found
    assert not any(name.startswith("compare.gain") for name in found)  # no arm was fine-tuned
    assert claims.check_claims(tmp_path)[1] == []
    back = dataclasses.replace(study, runs=str(tmp_path / "runs"))
    write_splits(back, index)
    publish_study.restore(tmp_path / "runs" / "s")
    assert all(experiment.is_done(config) for cell in plan_study(back, index) for config in cell.runs)


def test_a_study_that_was_moved_or_named_by_an_absolute_path_goes_on(
    folder: Path, study: StudyConfig, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "new" / "renamed")
    monkeypatch.chdir(tmp_path)
    for runs in ("new", str(tmp_path / "new")):
        moved = dataclasses.replace(study, exp="renamed", runs=runs)
        cells = plan_study(moved, index)
        assert all(experiment.is_done(config) for cell in cells for config in cell.runs)
        assert [cell["n"] for cell in experiment.run_study(moved, index, cells, InProcess())["cells"]] == [1] * 4
    other = tmp_path / "new/renamed/splits/split42_2_per_class.json"
    other.write_bytes((tmp_path / "new/renamed/splits/split42_4_per_class.json").read_bytes())
    with pytest.raises(Refused, match=r"data\.split"):
        experiment.is_done(cells[0].runs[0])


@pytest.fixture
def short(study: StudyConfig, tmp_path: Path) -> StudyConfig:
    """Two runs of a small network from random initialisation."""
    return dataclasses.replace(
        study, runs=str(tmp_path), arms=("scratch",), models=("squeezenet1_1",), train_per_class=(), seeds=2
    )


def test_a_run_that_dies_of_a_fault_is_kept_and_the_others_go_on(
    short: StudyConfig, index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cells = plan_study(short, index)
    first = cells[0].runs[0]

    def failing(job: Any, **how: Any) -> Any:
        if job.config.exp == first.exp:
            raise MemoryError("no room\nfor more")
        return fit(job, **how)

    monkeypatch.setattr(runner, "fit", failing)
    (cell,) = experiment.run_study(short, index, cells, InProcess())["cells"]
    assert cell["n"] == 1 and [(f["run"], f["type"]) for f in cell["failed"]] == [(first.exp, "MemoryError")]
    log = tmp_path / first.exp / "error.log"
    assert "Traceback" in log.read_text() and "MemoryError: no room" in cell["errors"][0]
    assert json.loads((tmp_path / "s" / "study.json").read_text())["cells"] == [cell]
    monkeypatch.undo()
    (cell,) = experiment.run_study(short, index, cells, InProcess())["cells"]  # the same command tries it again
    assert (cell["n"], cell["errors"], log.exists()) == (2, [], False)


@pytest.mark.slow
def test_with_two_jobs_a_killed_worker_costs_no_run(
    short: StudyConfig, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = dataclasses.replace(short, models=("squeezenet1_1", "alexnet"), epochs=3)  # alexnet cannot take 32 px
    cells = plan_study(mixed, index)
    victims: list[int] = []

    def kill_one(process: Any) -> None:
        real_start(process)
        if not victims:
            victims.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    real_start = BaseProcess.start
    monkeypatch.setattr(BaseProcess, "start", kill_one)
    trained, impossible = experiment.run_study(mixed, index, cells, LocalWorkers(2))["cells"]
    assert (trained["n"], trained["errors"], impossible["n"]) == (2, [], 0) and victims
    assert [f["type"] for f in impossible["failed"]] == ["Refused"] * 2 and "32" in impossible["errors"][0]
    one = dataclasses.replace(short, exp="one", epochs=3, seeds=1)
    experiment.run_study(one, index, plan_study(one, index), InProcess())
    scores = [Run(tmp_path / exp / cells[0].folder / "split42_seed0").read_json("test.json") for exp in ("s", "one")]
    assert scores[0]["loss"] == scores[1]["loss"]


def test_a_run_that_kills_its_workers_fails_alone(short: StudyConfig, index: Index) -> None:
    cells = plan_study(short, index)
    exp = cells[0].runs[0].exp
    (cell,) = experiment.run_study(short, index, cells, InProcess(deaths=[exp] * MAX_LOSSES))["cells"]
    assert cell["n"] == 1 and [(f["run"], f["type"]) for f in cell["failed"]] == [(exp, "Killed")]
    assert experiment.run_study(short, index, cells, InProcess())["cells"][0]["n"] == 2


def test_a_second_study_in_the_folder_is_refused(short: StudyConfig, index: Index, tmp_path: Path) -> None:
    with alone(tmp_path / "s", "study"), pytest.raises(Refused, match=rf"another study \(process {os.getpid()}"):
        experiment.run_study(short, index, plan_study(short, index), InProcess())
    assert (tmp_path / "s" / "study.lock").exists() and not (tmp_path / "s" / "study.json").exists()


def test_a_study_of_which_nothing_can_begin_is_one_sentence(short: StudyConfig, index: Index) -> None:
    small = dataclasses.replace(short, models=("alexnet",))
    with pytest.raises(Refused, match="32"):
        experiment.run_study(small, index, plan_study(small, index), InProcess())


def test_a_folder_of_something_else_is_refused(short: StudyConfig, index: Index, tmp_path: Path) -> None:
    for name in ("config.json", "search.json", "optuna.journal"):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / name).write_text('{"optim": {}}')
        with pytest.raises(Refused, match="is the folder of a"):
            plan_study(short, index)
        (tmp_path / "s" / name).unlink()
    (tmp_path / "file").write_text("")
    unwritable = dataclasses.replace(short, runs=str(tmp_path / "file"))
    with pytest.raises(Refused, match="--runs"):
        experiment.run_study(unwritable, index, plan_study(unwritable, index), InProcess())


def test_what_is_listed_twice_is_trained_once(short: StudyConfig, index: Index) -> None:
    twice = dataclasses.replace(short, models=short.models * 2, arms=("scratch", "scratch"), train_per_class=(2, 2))
    assert len(plan_study(twice, index)) == 1


def test_the_command_says_how_long_and_ends_with_1_where_a_run_failed(
    short: StudyConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [
        "study", "--exp", "my study", "--runs", short.runs, "--data", str(short.data), "--arms", "scratch",
        "--seeds", "1", "--models", "squeezenet1_1", "alexnet", "--epochs", "1", "--size", "32", "--threads", "1",
    ]  # fmt: skip
    assert main([*words, "--dry-run"]) == 0
    assert re.search("2 to do. This takes about .* second", capsys.readouterr().out) and not any(tmp_path.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "make_workers", lambda *how: InProcess())
        patch.setattr(runner, "fit", lambda job, **how: 1 / 0)
        assert main([*words[:2], "all fail", *words[3:]]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "failed: " in said and "'" + str(tmp_path / "my study") + "'" in said
    saved = json.loads((tmp_path / "my study" / "study.json").read_text())
    assert [cell["n"] for cell in saved["cells"]] == [1, 0]
