"""A small study, trained for real: its runs, its splits, and what a second call does."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import claims
import publish
import publish_study
import pytest

from finetune101 import experiment
from finetune101.analysis import groups, report
from finetune101.config import StudyConfig
from finetune101.data import dataset, splits
from finetune101.evaluation.evaluate import evaluate
from finetune101.runs import Run
from finetune101.training.loop import fit
from finetune101.training.prepare import prepare
from finetune101.training.recipes import scratch


@pytest.fixture(scope="module")
def index(tiny_data: Path) -> dataset.Index:
    return dataset.index(tiny_data)


@pytest.fixture(scope="module")
def study(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    return StudyConfig(
        exp="s",
        runs=str(tmp_path_factory.mktemp("study")),
        data=str(tiny_data),
        arms=("probe", "scratch"),
        seeds=1,
        train_per_class=(2, 4),
        epochs=1,
        batch_size=6,
        size=32,
        threads=1,
    )


@pytest.fixture(scope="module")
def folder(study: StudyConfig, index: dataset.Index) -> Path:
    experiment.run(study, index, experiment.plan(study, index))
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


def test_sizes_are_nested_and_share_test_images_and_steps(folder: Path) -> None:
    small, large = (splits.read(folder / "splits" / f"split42_{size}_per_class.json") for size in (2, 4))
    assert small.subsets["test"] == large.subsets["test"] and len(small.subsets["test"]) == 3 * 8
    assert set(small.subsets["train"]) < set(large.subsets["train"])
    assert (len(small.subsets["train"]), small.subsets["val"]) == (6, ())
    runs = [Run(folder / "efficientnet_lite0" / "scratch" / f"{n}_per_class" / "split42_seed0") for n in (2, 4)]
    assert [len(run.metrics()) for run in runs] == [2, 1]
    assert [run.metrics()[-1]["step"] for run in runs] == [2, 2]
    assert runs[0].config().optim.step_size == 2 * runs[1].config().optim.step_size


def test_a_second_call_trains_nothing(folder: Path, study: StudyConfig, index: dataset.Index) -> None:
    times = {file: file.stat().st_mtime_ns for file in folder.glob("**/test.json")}
    cells = experiment.plan(study, index)
    assert all(experiment.is_done(config) for cell in cells for config in cell.runs)
    experiment.run(study, index, cells)
    assert times == {file: file.stat().st_mtime_ns for file in folder.glob("**/test.json")} and len(times) == 4


def test_the_estimate_comes_from_recorded_runs(folder: Path, study: StudyConfig, index: dataset.Index) -> None:
    more = dataclasses.replace(study, seeds=3)
    assert "minute" in experiment.estimate(more, index, experiment.plan(more, index))
    other = dataclasses.replace(study, exp="t", models=("squeezenet1_1",), arms=("scratch",))
    said = experiment.estimate(other, index, experiment.plan(other, index))
    assert said.startswith("how long they take is not known")
    said = experiment.estimate(other, index, experiment.plan(other, index), measured=True)
    assert re.fullmatch(r"(about \d+ minutes|less than a minute), one run at a time", said)
    both = dataclasses.replace(more, models=(*more.models, "squeezenet1_1"), arms=("scratch",))
    said = experiment.estimate(both, index, experiment.plan(both, index))
    assert said.endswith("without scratch with squeezenet1_1, of which no run is recorded")


def test_other_settings_are_another_study(folder: Path, study: StudyConfig, index: dataset.Index) -> None:
    other = dataclasses.replace(study, epochs=2)
    with pytest.raises(ValueError, match="give the study another --exp"):
        experiment.run(other, index, experiment.plan(other, index))


def test_settings_that_cannot_work_are_refused(study: StudyConfig, index: dataset.Index) -> None:
    for change, message in (
        ({"seeds": 0}, "--seeds is 0"),
        ({"arms": ()}, "--arms names nothing"),
        ({"models": ()}, "--models names nothing"),
        ({"exp": "../x"}, "--exp '../x' cannot name a folder"),
        ({"train_per_class": (0, 1)}, "--train-per-class is 0"),
        ({"train_per_class": (1, 500)}, "--train-per-class 500 leaves none to test"),
        ({"scratch_recipe": "probe"}, "--scratch-recipe probe trains the output layer only"),
        ({"probe_recipe": "finetune"}, "--probe-recipe finetune trains every layer"),
        ({"scratch_recipe": "none"}, "there is no recipe none"),
        ({"epochs": 0}, "--epochs is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            experiment.plan(dataclasses.replace(study, **change), index)


def test_an_arm_may_take_a_recipe_file_or_a_recipe_with_sizes_of_its_own(
    study: StudyConfig, index: dataset.Index, tmp_path: Path
) -> None:
    file = tmp_path / "winner.yaml"
    file.write_text("optim: {epochs: 5, lr: 0.02}\nmodel: {name: alexnet, size: 64, pretrain: true}\n")
    own = dataclasses.replace(study, arms=("scratch",), size=None, epochs=None, train_per_class=())
    found = experiment.plan(dataclasses.replace(own, scratch_recipe=str(file)), index)[0].runs[0]
    assert (found.model.name, found.model.size, found.model.pretrain) == ("efficientnet_lite0", 64, False)
    assert (found.optim.epochs, found.optim.lr) == (5, 0.02)
    recipe = dataclasses.replace(own, scratch_recipe="scratch")
    found = experiment.plan(recipe, index)[0].runs[0]
    assert (found.model.size, found.augment.train_sizes) == (160, scratch("x").augment.train_sizes)
    found = experiment.plan(dataclasses.replace(recipe, size=96), index)[0].runs[0]
    assert (found.model.size, found.model.cache_size, max(found.augment.train_sizes)) == (96, None, 96)
    both = dataclasses.replace(own, arms=("finetune", "scratch"), epochs=3, scratch_epochs=7)
    assert [cell.runs[0].optim.epochs for cell in experiment.plan(both, index)] == [3, 7]


def test_a_study_has_a_picture_and_a_report(folder: Path, tmp_path: Path) -> None:
    assert [picture.name for picture in report.draw_study(folder)] == ["efficientnet_lite0.png"]
    page = report.report(str(folder), tmp_path / "report").read_text(encoding="utf-8")
    assert "Accuracy against training images per class" in page
    assert "Training images per class: 4. probe is right on" in page and "Test, side by side" in page
    assert (tmp_path / "report" / "report.md").is_file()
    found = report.study_groups(folder)
    assert [(group.name, len(group.runs)) for group in found] == [("probe", 1), ("scratch", 1)]


def test_the_page_of_an_unfinished_study_says_so(
    folder: Path, study: StudyConfig, index: dataset.Index, tmp_path: Path
) -> None:
    copy = tmp_path / "s"
    shutil.copytree(folder, copy)
    summary = experiment.summarise(study, experiment.plan(dataclasses.replace(study, seeds=2), index), {})
    Run(copy).write_json("study.json", summary)
    page = report.report(str(copy), tmp_path / "report").read_text(encoding="utf-8")
    assert "4 of 8 runs are done. Training images per class: 4." in page and ">1 / 2</td>" in page


def test_a_run_that_is_tested_before_its_end_is_not_done(
    study: StudyConfig, index: dataset.Index, tmp_path: Path
) -> None:
    own = dataclasses.replace(study, runs=str(tmp_path), arms=("scratch",), train_per_class=(), epochs=2)
    cells = experiment.plan(own, index)
    job = prepare(cells[0].runs[0])
    next(fit(job, quiet=True))
    with pytest.raises(ValueError, match=r"stands at epoch 1 of 2; go on with: finetune101 train --exp .* --resume"):
        groups.read(job.run)
    evaluate(job.run)
    assert not experiment.is_done(cells[0].runs[0])
    assert experiment.run(own, index, cells)["cells"][0]["n"] == 1
    assert experiment.is_done(cells[0].runs[0]) and job.run.stopped() == "" and len(job.run.metrics()) == 2


def test_the_page_of_several_networks_compares_the_arms_of_each(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "s"
    shutil.copytree(folder, copy)
    saved = json.loads((copy / "study.json").read_text())
    saved["cells"] += [{**cell, "model": "another"} for cell in saved["cells"]]
    (copy / "study.json").write_text(json.dumps(saved))
    text = (report.report(str(copy), tmp_path / "report").parent / "report.md").read_text(encoding="utf-8")
    for network in ("efficientnet_lite0", "another"):
        assert f"{network}: Training images per class: 4. probe is right on" in text
    assert "## Accuracy and cost – another" in text


def test_sizes_that_would_change_the_test_images_are_refused(tmp_path: Path, study: StudyConfig) -> None:
    few = dataclasses.replace(study, runs=str(tmp_path))
    index = dataset.index(Path(str(study.data)))
    experiment.write_splits(few, index)
    before = {file.name: file.read_bytes() for file in (tmp_path / "s" / "splits").iterdir()}
    more = dataclasses.replace(few, train_per_class=(2, 4, 6))
    with pytest.raises(ValueError, match="is another split than these sizes need; give the study another --exp"):
        experiment.write_splits(more, index)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "s" / "splits").iterdir()}


def test_a_run_that_failed_does_not_stop_the_page(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "s"
    shutil.copytree(folder, copy)
    broken = copy / "efficientnet_lite0" / "scratch" / "4_per_class" / "split42_seed1"
    shutil.copytree(broken.parent / "split42_seed0", broken)
    for name in ("test.json", "best.safetensors"):
        (broken / name).unlink()
    assert [len(group.runs) for group in report.study_groups(copy)] == [1, 1]


def test_a_study_is_published_and_put_back(
    folder: Path, study: StudyConfig, index: dataset.Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert claims.check(tmp_path)[1] == []
    back = dataclasses.replace(study, runs=str(tmp_path / "runs"))
    experiment.write_splits(back, index)
    publish_study.restore(tmp_path / "runs" / "s")
    assert all(experiment.is_done(config) for cell in experiment.plan(back, index) for config in cell.runs)


def test_an_ensemble_is_published_with_the_names_of_its_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, out = tmp_path / "results", tmp_path / "ensemble"
    monkeypatch.setattr(publish, "RESULTS", results)
    members = [results / name for name in ("a", "b")]
    for folder in members:
        Run(folder).write_json("test.json", {"manifest_hash": "sha256:1", "manifest": "reference_seed42"})
    Run(results).write_json("claims.json", [])
    test = {"manifest_hash": "sha256:1", "runs": ["runs/a", "runs/b"], "mirror": False, "top1": 98.123}
    Run(out).write_json("test.json", {**test, "top1_interval": [97.4, 98.7]})
    (out / "predictions.csv").write_text("path,label,prediction,confidence\n")
    publish.publish([out], "best.finetune.any.reference.top1", "finetune101 ensemble a b", members)
    (claim,) = Run(results).read_json("claims.json")
    assert (claim["value"], claim["evidence"]) == (98.12, "ensemble")
    assert Run(results / "ensemble").read_json("config.json") == {"members": ["a", "b"], "mirror": False}
    with pytest.raises(ValueError, match="is not an ensemble of these 1 members"):
        publish.keep_ensemble(out, results / "ensemble", members[:1])


def test_a_curve_claims_how_few_images_reach_random_initialisation_with_the_most() -> None:
    values = {("finetune", 1): 20.0, ("finetune", 2): 40.0, ("finetune", 4): 60.0, ("scratch", 2): 10.0}
    cells = [
        {"model": "resnet18", "arm": arm, "size": size, "mean_per_class": value, "n": 3}
        for (arm, size), value in (values | {("scratch", 4): 30.0}).items()
    ]
    found = list(publish_study.curve(cells))
    assert [(claim["id"], claim["value"], claim["n"]) for claim in found] == [("compare.curve", 2, 3)]
    assert "reaches what random initialisation has with 4" in found[0]["unit"]
    assert not list(
        publish_study.curve([{**cell, "mean_per_class": 1.0 + (cell["arm"] == "scratch")} for cell in cells])
    )
