"""evidence/gpu_runs.py: every run of every plan can be trained, and what the time cuts off goes on."""

from __future__ import annotations

import tarfile
from pathlib import Path

import gpu_runs
import pytest

from finetune101.cli.one_run import training_settings
from finetune101.config import validate
from finetune101.evaluation.checkpoint import load_file
from finetune101.run import Run

TINY = "--recipe original --no-pretrain --model squeezenet1_1 --size 32 --batch-size 8 --threads 1 --device cpu"


def test_every_run_has_settings_that_work_and_teachers_that_come_before() -> None:
    for plan, stages in gpu_runs.PLANS.items():
        earlier: set[str] = set()
        for stage in stages:
            for name, flags in stage.runs.items():
                for extra in ("", gpu_runs.TINY):
                    config = training_settings([*f"{flags} {extra}".split(), "--exp", name])
                    validate(config)
                    assert {Path(teacher).name for teacher in config.optim.teacher} <= earlier, (plan, name)
                    assert all(Path(teacher).parent == gpu_runs.RUNS for teacher in config.optim.teacher)
            earlier |= stage.runs.keys()


def test_a_plan_goes_on_where_the_time_cut_it_off(
    tiny_data: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = gpu_runs.Stage({"a": f"{TINY} --epochs 2", "b": f"{TINY} --epochs 2 --seed 1"}, jobs=1)
    monkeypatch.setattr(gpu_runs, "PLANS", {"plan": (stage,)})
    monkeypatch.setattr(gpu_runs, "PIECE", 1_000_000)
    gpu_runs.main(["pack", str(tiny_data), "--size", "48", "--out", "packed"])
    packed = sorted(map(str, Path("packed").iterdir()))
    capsys.readouterr()

    command = ["train", "plan", "--images", *packed, "--out", "out"]
    gpu_runs.main([*command, "--minutes", "0"])
    assert "The time is over" in capsys.readouterr().out and not (gpu_runs.RUNS / "a").exists()
    gpu_runs.main([*command, "--only", "a"])
    assert gpu_runs.is_done("a") and not gpu_runs.is_done("b")
    with tarfile.open("out/records.tar.gz") as tar:
        assert {"a/metrics.jsonl", "a/split.json"} <= {member.name for member in tar.getmembers()}
    pieces = sorted(path.name for path in Path("out").glob("a.*"))
    assert len(pieces) == 2 and all(path.stat().st_size <= 1_000_000 for path in Path("out").iterdir())

    from finetune101.cli.main import main

    original = ["--exp", "original", "--data", str(tiny_data), *TINY.split(), "--epochs", "1"]
    assert main(["train", *original]) == 0
    split = "runs/original/split.json"
    gpu_runs.main(["collect", "out", "--split", split])
    run = Run(Path("runs/collected/a"))
    assert run.read_json("split.json") == Run(Path("runs/original")).read_json("split.json")
    model, _ = load_file(run.best)
    trained, _ = load_file(Run(gpu_runs.RUNS / "a").best)
    for (name, value), other in zip(model.state_dict().items(), trained.state_dict().values(), strict=True):
        assert value.dtype == other.dtype and float((value - other).abs().max()) < 1e-2, name
    assert main(["evaluate", str(run.path), "--data", str(tiny_data)]) == 0  # on the original images


def test_runs_of_other_files_are_not_collected(here: Path) -> None:
    split = {"protocol": "reference", "seed": 1, "options": {}, "classes": ["x"], "content_hash": "sha256:1"}
    subsets = {"train": ["x/1.jpg"], "val": [], "test": ["x/2.jpg"]}
    Run(here / "a").path.mkdir()
    Run(here / "a").write_json("split.json", {**split, "subsets": {**subsets, "test": ["x/3.jpg"]}})
    Run(here).write_json("split.json", {**split, "subsets": subsets})
    with tarfile.open("records.tar.gz", "w:gz") as tar:
        tar.add("a/split.json")
    with pytest.raises(ValueError, match="a was trained on other files"):
        gpu_runs.collect([here], here / "split.json", here / "into")
