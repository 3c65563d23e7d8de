"""Training is repeatable, resumable, and keeps the last good checkpoint whatever happens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune101.config import AugmentConfig, OptimConfig, TrainConfig
from finetune101.run import Run
from finetune101.training.job import prepare
from finetune101.training.loop import average_decay, fit, interleaved
from finetune101.training.optim import Average

TIMING = ("seconds", "val_seconds", "images_per_s")


@pytest.fixture
def base(small: TrainConfig) -> TrainConfig:
    """Three epochs of a small network with dropout; the rate drops after the second."""
    optim = OptimConfig(epochs=3, batch_size=8, lr=0.01, step_size=2, gamma=0.1)
    return dataclasses.replace(small, exp="one", augment=AugmentConfig(crop_scale=0.5), optim=optim)


def change(config: TrainConfig, part: str = "optim", **values: Any) -> TrainConfig:
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})


def train(config: TrainConfig, **how: bool) -> Run:
    job = prepare(config, **how)
    for _ in fit(job, quiet=True):
        pass
    return job.run


def interrupted(config: TrainConfig, after: int) -> Run:
    """A run that was stopped when ``after`` epochs had finished."""
    job = prepare(config)
    epochs = fit(job, quiet=True)
    for _ in range(after):
        next(epochs)
    epochs.close()
    return job.run


def numbers(run: Run) -> list[dict[str, Any]]:
    """metrics.jsonl without its timing."""
    return [{key: value for key, value in record.items() if key not in TIMING} for record in run.metrics()]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def assert_same_weights(a: Run, b: Run) -> None:
    first, second = load_file(a.best), load_file(b.best)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


def test_validation_now_and_then(base: TrainConfig) -> None:
    records = train(change(base, epochs=5, val_every=2)).metrics()
    assert [r["epoch"] for r in records if r["val_top1"] is not None] == [2, 4, 5]
    assert not records[0]["best"] and records[1]["best"]
    every = train(dataclasses.replace(change(base, epochs=5), exp="every")).metrics()
    for rarely, often in zip(records, every, strict=True):
        assert rarely["train_loss"] == often["train_loss"]
        assert rarely["val_top1"] in (None, often["val_top1"])


def test_the_records_of_a_run(base: TrainConfig) -> None:
    run = train(base)
    records = run.metrics()
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["step"] for record in records] == [3, 6, 9]  # 21 training images in batches of 8
    assert [record["lr_head"] for record in records] == pytest.approx([0.01, 0.01, 0.001])
    assert [record["lr_backbone"] for record in records] == [record["lr_head"] for record in records]
    for record in records:
        assert 0 <= record["train_top1"] <= 100 and 0 <= record["val_top1"] <= 100
        assert record["train_loss"] > 0 and record["val_loss"] > 0
        assert record["seconds"] > 0 and record["images_per_s"] > 0
    best = max(record["val_top1"] for record in records)
    assert [record["val_top1"] for record in records if record["best"]][-1] == best
    assert run.config() == base
    assert {path.name for path in run.path.iterdir()} == {
        "config.json", "env.json", "split.json", "metrics.jsonl", "best.safetensors", "last.pt"
    }  # fmt: skip
    env = run.read_json("env.json")
    assert env["model"]["init_source"] == "random (seed 0)" and env["model"]["init_hash"].startswith("sha256:")
    assert env["world"]["device"] and env["versions"]["torch"] and env["command"]


def test_the_same_command_twice_gives_the_same_numbers(base: TrainConfig) -> None:
    one, two = train(base), train(dataclasses.replace(base, exp="two"))
    assert numbers(one) == numbers(two)
    assert_same_weights(one, two)


def test_another_seed_gives_other_numbers(base: TrainConfig) -> None:
    base = change(base, epochs=1)
    one, two = train(base), train(change(dataclasses.replace(base, exp="two"), "system", seed=1))
    assert numbers(one)[0]["train_loss"] != numbers(two)[0]["train_loss"]
    assert one.read_json("env.json")["model"]["init_hash"] != two.read_json("env.json")["model"]["init_hash"]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_resumed_run_ends_like_an_uninterrupted_one(base: TrainConfig, after: int) -> None:
    whole = train(base)
    config = dataclasses.replace(base, exp="two")
    interrupted(config, after)
    again = train(config, resume=True)
    assert numbers(again) == numbers(whole)
    assert_same_weights(again, whole)


def test_averaged_weights_and_distortions_resume_as_well(base: TrainConfig) -> None:
    strong = change(change(base, ema=0.9), "augment", policy="trivial", erasing=0.2, mix=0.5)
    whole = train(strong)
    run = interrupted(dataclasses.replace(strong, exp="two"), 2)
    again = train(dataclasses.replace(strong, exp="two"), resume=True)
    assert numbers(again) == numbers(whole)
    assert again.path == run.path
    assert_same_weights(again, whole)


def test_the_average_is_validated_and_kept(base: TrainConfig) -> None:
    run, plain = train(change(base, ema=0.9)), train(dataclasses.replace(base, exp="plain"))
    assert [r["train_loss"] for r in run.metrics()] == [r["train_loss"] for r in plain.metrics()]
    assert run.metrics()[0]["val_loss"] != plain.metrics()[0]["val_loss"]
    last = train(change(dataclasses.replace(change(base, ema=0.9), exp="last"), "data", fit_on="train+val"))
    kept, state = load_file(last.best), torch.load(last.last, weights_only=True)
    assert all(torch.equal(kept[key], state["average"][key]) for key in kept)
    assert not all(torch.equal(kept[key], state["model"][key]) for key in kept)


def test_the_average_forgets_its_start_first_and_then_by_its_decay() -> None:
    layer = torch.nn.BatchNorm1d(1)
    average = Average(layer)
    averaged, expected = average.module, 1.0
    for n, value in enumerate([5.0, 3.0, 1.0, 4.0, 2.0] * 12):
        with torch.no_grad():
            layer.weight.fill_(value)
        layer.running_mean.fill_(-value)
        layer.num_batches_tracked.fill_(n)
        if n == 0:
            averaged.running_mean.fill_(-expected)
        average.update(layer, average_decay(0.8, n))
        keep = min(0.8, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
        assert averaged.weight.item() == pytest.approx(expected, rel=1e-5)
        assert averaged.running_mean.item() == pytest.approx(-expected, rel=1e-5)
        assert averaged.num_batches_tracked.item() == n


def test_the_shares_of_processes_are_put_together_in_order() -> None:
    whole = torch.arange(14).view(7, 2)
    assert torch.equal(interleaved([whole[rank::3] for rank in range(3)]), whole)
    assert torch.equal(interleaved([whole[rank::9] for rank in range(9)]), whole)  # two processes have none


def test_a_run_stopped_within_an_epoch_resumes_from_the_last_whole_one(base: TrainConfig) -> None:
    whole = train(base)
    config = dataclasses.replace(base, exp="two")
    run = interrupted(config, 1)
    torch.rand(100)  # whatever happened to the global random state since
    with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"epoch": 2, "train_lo')  # cut off by the crash
    again = train(config, resume=True)
    assert numbers(again) == numbers(whole)
    assert_same_weights(again, whole)


def test_resuming_a_finished_run_changes_nothing(base: TrainConfig) -> None:
    base = change(base, epochs=1)
    run = train(base)
    before = {path.name: digest(path) for path in run.path.iterdir()}
    assert list(fit(prepare(base, resume=True), quiet=True)) == []
    assert {path.name: digest(path) for path in run.path.iterdir()} == before


def test_resume_keeps_the_recorded_precision(base: TrainConfig) -> None:
    run = interrupted(change(base, "system", precision="bf16", memory_format="contiguous"), 1)
    world = prepare(run.config(), resume=True).world
    assert (world.precision, world.channels_last) == ("bf16", False)
    env = run.read_json("env.json")
    env["world"] |= {"precision": "fp32", "channels_last": True}  # as if written on another machine
    run.write_json("env.json", env)
    world = prepare(run.config(), resume=True).world
    assert (world.precision, world.channels_last) == ("fp32", True)


def test_resume_refuses_other_settings(base: TrainConfig) -> None:
    interrupted(base, 1)
    with pytest.raises(ValueError, match=r"--resume cannot change optim\.lr of one"):
        prepare(change(base, lr=0.1), resume=True)
    prepare(change(base, "data", cache="off"), resume=True)  # where pixels come from changes no number


def test_a_damaged_last_checkpoint_is_named(base: TrainConfig) -> None:
    run = interrupted(base, 1)
    run.last.write_bytes(run.last.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot resume from .*last\.pt .*--overwrite"):
        next(fit(prepare(base, resume=True), quiet=True))


def test_an_existing_run_is_kept_unless_told_otherwise(base: TrainConfig) -> None:
    base = change(base, epochs=1)
    first = train(base)
    with pytest.raises(ValueError, match="exists; add --resume to continue it or --overwrite to start anew"):
        prepare(base)
    (first.path / "notes.txt").write_text("mine")
    again = train(change(base, "system", seed=1), overwrite=True)
    assert again.read_json("env.json")["model"]["init_source"] == "random (seed 1)"
    assert (again.path / "notes.txt").read_text() == "mine"


def test_overwrite_with_a_mistake_keeps_the_old_run(base: TrainConfig) -> None:
    base = change(base, epochs=1)
    run = train(base)
    before = {path.name: digest(path) for path in run.path.iterdir()}
    for part, wrong in (("data", {"root": "/nowhere"}), ("model", {"name": "resnet19"})):
        with pytest.raises(ValueError, match=r"nowhere|resnet1"):
            prepare(change(base, part, **wrong), overwrite=True)
        assert {path.name: digest(path) for path in run.path.iterdir()} == before


def test_a_folder_that_is_no_run_keeps_its_files(base: TrainConfig) -> None:
    file = Path(base.runs) / base.exp / "file.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    prepare(base)
    assert file.read_text() == "{}"


def test_train_and_val_together_keep_the_last_epoch(base: TrainConfig) -> None:
    run = train(change(change(base, epochs=2), "data", fit_on="train+val"))
    records = run.metrics()
    assert [record["best"] for record in records] == [False, True]
    assert [record["val_top1"] for record in records] == [None, None]
    assert records[-1]["step"] == 2 * 4  # 27 images in batches of 8


def test_freeze_trains_the_head_only(base: TrainConfig) -> None:
    config = change(change(base, "model", freeze=True), epochs=1)
    job = prepare(config)
    before = {key: value.clone() for key, value in job.built.model.state_dict().items()}
    for _ in fit(job, quiet=True):
        pass
    moved = {key for key, value in load_file(job.run.best).items() if not torch.equal(value, before[key])}
    assert moved == {"classifier.1.weight", "classifier.1.bias"}


def diverging(base: TrainConfig) -> tuple[TrainConfig, Run]:
    """A run that stands after its first epoch, and whose saved rate is so large that the second cannot go well."""
    run = interrupted(base, 1)
    state = torch.load(run.last, weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group["initial_lr"] = 1e30
    torch.save(state, run.last)
    return base, run


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(base: TrainConfig) -> None:
    config, run = diverging(change(base, "system", precision="fp32"))
    before = {path.name: digest(path) for path in run.path.iterdir()}
    with pytest.raises(ValueError, match=r"the loss is not finite at step [56]; lower --lr"):
        next(fit(prepare(config, resume=True), quiet=True))
    assert {path.name: digest(path) for path in run.path.iterdir()} == before


def test_a_huge_rate_stops_the_first_epoch(base: TrainConfig) -> None:
    job = prepare(change(base, lr=1e30))
    with pytest.raises(ValueError, match=r"the loss is not finite at step [23]; lower --lr"):
        next(fit(job, quiet=True))
    assert not job.run.best.exists() and not job.run.last.exists()


def test_a_loss_that_is_not_finite_in_validation_saves_nothing(base: TrainConfig) -> None:
    job = prepare(change(base, lr=1e30, batch_size=64))  # one step per epoch: its own loss is still fine
    with pytest.raises(ValueError, match=r"loss is not finite after step 1; lower --lr"):
        next(fit(job, quiet=True))
    assert not job.run.best.exists() and not job.run.last.exists()


FULL_DISK = """
import resource, signal, sys
from finetune101.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(["train", "--exp", "one", "--runs", sys.argv[2], "--resume"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes, which Windows does not have")
@pytest.mark.parametrize("limit", [1_000_000, 4_000_000], ids=["best.safetensors", "last.pt"])
def test_a_full_disk_keeps_the_last_good_checkpoint(base: TrainConfig, limit: int) -> None:
    run = interrupted(base, 1)
    before = digest(run.last)
    command = [sys.executable, "-c", FULL_DISK, str(limit), base.runs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "cannot write" in errors[0] and "ulimit -f" in errors[0]
    assert "Traceback" not in done.stderr
    assert digest(run.last) == before and load_file(run.best)
    assert not list(run.path.glob(".*"))  # no half-written file is left behind
    again = train(base, resume=True)
    assert numbers(again) == numbers(train(dataclasses.replace(base, exp="two")))
    assert json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] == 3
