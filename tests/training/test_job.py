"""One process trains a run; a run is its settings and its split; what cannot be trained is refused before it begins."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from finetune101.cli.main import main
from finetune101.config import TrainConfig
from finetune101.demo.dataset import draw
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import read_checkpoint
from finetune101.files import process_space
from finetune101.models.build import build
from finetune101.run import Run
from finetune101.training import job as preparing
from finetune101.training.job import LOCK, elsewhere, prepare
from finetune101.training.log import log_records
from finetune101.training.loop import Diverged, Trainer, fit
from finetune101.training.resume import changed_settings, check_same, differences, is_same, split_of


def change(config: TrainConfig, part: str, **values: Any) -> TrainConfig:
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})


def train(config: TrainConfig, **how: bool) -> Run:
    job = prepare(config, **how)
    list(fit(job, quiet=True))
    return job.run


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of one epoch; copy it to change it."""
    folder = tmp_path_factory.mktemp("trained")
    words = "--exp one --no-pretrain --recipe original --model squeezenet1_1 --size 32 --epochs 1 --threads 1"
    assert main(["train", *words.split(), "--runs", str(folder), "--data", str(tiny_data), "--batch-size", "8"]) == 0
    return Run(folder / "one")


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    shutil.copytree(trained.path, tmp_path / "runs/one")
    return Run(tmp_path / "runs/one")


def moved(run: Run) -> TrainConfig:
    """The settings of ``run`` with the name and folder that it has now."""
    return dataclasses.replace(run.config(), exp=run.name, runs=str(run.path.parent))


# one process


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}, {}])
def test_a_run_at_work_is_left_alone(small: TrainConfig, how: dict[str, bool]) -> None:
    """Its epochs go on and end as if nothing had been tried."""
    alone = train(dataclasses.replace(small, exp="alone"))
    epochs = fit(prepare(small), quiet=True)
    next(epochs)
    before = files(Path(small.runs) / "small")
    with pytest.raises(Refused, match=f"process {os.getpid()} on" if how else "exists"):
        prepare(change(small, "system", seed=3) if not how.get("resume") else small, **how)
    assert files(Path(small.runs) / "small") == before
    list(epochs)
    records, expected = (Run(Path(small.runs) / name).metrics() for name in ("small", "alone"))
    assert [r["train_loss"] for r in records] == [r["train_loss"] for r in expected]
    assert not (Path(small.runs) / "small" / LOCK).exists() and alone.last.is_file()
    list(fit(prepare(small, resume=True), quiet=True))  # and now it is free


@pytest.mark.parametrize("how", ["closed", "dropped", "refused"])
def test_a_run_is_free_again_when_its_training_ends_early(small: TrainConfig, how: str) -> None:
    if how == "refused":
        train(small)
        with pytest.raises(Refused, match=r"optim\.lr"):
            prepare(change(small, "optim", lr=0.3), resume=True)
    else:
        job = prepare(small)
        epochs = fit(job, quiet=True)
        next(epochs)
        if how == "closed":
            epochs.close()
        else:
            del epochs, job
    prepare(small, resume=True)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no files from anybody, not even from root")
def test_where_no_run_can_be_written_no_image_is_decoded(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    with pytest.raises(Refused, match=r"cannot write /proc/x/\S+: .*; choose another --runs$"):
        prepare(dataclasses.replace(small, runs="/proc/x"))
    assert not (tmp_path / "cache").exists() and "Decoding" not in capsys.readouterr().out


def test_a_dead_owner_is_taken_over_at_once(run: Run) -> None:
    code = "import sys, time; from finetune101.files import claim; from pathlib import Path\n"
    code += "with claim(Path(sys.argv[1])) as claimed: print(claimed, flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(run.path / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout and owner.stdout.readline() == "True\n"
        with pytest.raises(Refused, match=f"process {owner.pid} on {socket.gethostname()}"):
            prepare(moved(run), overwrite=True)
        owner.kill()
    assert (run.path / LOCK).exists()
    prepare(moved(run), overwrite=True)


def test_a_run_that_another_process_made_meanwhile(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both saw no run; the one that was slower finds the other's."""
    build_network = preparing.build_network

    def slowly(*words: Any, **named: Any) -> Any:
        monkeypatch.setattr(preparing, "build_network", build_network)
        train(small)
        return build_network(*words, **named)

    monkeypatch.setattr(preparing, "build_network", slowly)
    with pytest.raises(Refused, match="exists"):
        prepare(change(small, "system", seed=3))
    assert Run(Path(small.runs) / "small").config().system.seed == 0


def test_leftovers_of_killed_processes_are_removed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    mark = f"{process_space()}.{{}}.0123abcd.part"
    left = [folder / f".x.{mark.format(dead.stdout.strip())}" for folder in (run.path, tmp_path / "cache")]
    kept = run.path / f".x.{mark.format(os.getpid())}"
    for file in (*left, kept):
        file.write_bytes(b"half")
    prepare(moved(run), resume=True)
    assert not any(file.exists() for file in left) and kept.exists()


# its identity


def test_a_renamed_and_moved_run_goes_on(small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(dataclasses.replace(small, exp="whole"))
    epochs = fit(prepare(small), quiet=True)
    next(epochs)
    epochs.close()
    monkeypatch.chdir(tmp_path)
    shutil.move(Path(small.runs) / "small", tmp_path / "elsewhere/new")
    shutil.copytree(str(small.data.root), tmp_path / "photos")
    assert "--exp new --runs" in Run(tmp_path / "elsewhere/new").stopped()
    words = ["train", "--exp", "new", "--runs", "elsewhere", "--data", "photos", "--resume"]
    assert main(words) == 0
    records, expected = Run(tmp_path / "elsewhere/new").metrics(), whole.metrics()
    assert [r["train_loss"] for r in records] == [r["train_loss"] for r in expected]


def test_what_makes_two_runs_the_same(small: TrainConfig) -> None:
    same = dataclasses.replace(small, exp="other", runs="/elsewhere", recipe="file.yaml")
    for values in ({"root": "/photos"}, {"split": "split.json"}, {"cache": "off"}, {"download": True}):
        assert differences(small, change(same, "data", **values)) == []
    for part, values in (("optim", {"lr": 0.3}), ("data", {"split_seed": 7}), ("system", {"seed": 1})):
        assert differences(small, change(same, part, **values)) == [f"{part}.{next(iter(values))}"]


def test_the_file_of_another_split_is_refused(run: Run, tmp_path: Path) -> None:
    shutil.copyfile(run.path / "split.json", tmp_path / "same.json")
    prepare(change(moved(run), "data", split=str(tmp_path / "same.json")), resume=True)
    other = train(change(dataclasses.replace(moved(run), exp="other"), "data", split_seed=7))
    with pytest.raises(Refused, match="split"):
        prepare(change(moved(run), "data", split=str(other.path / "split.json")), resume=True)


def test_weights_and_teachers_count_by_their_content(run: Run, small: TrainConfig, tmp_path: Path) -> None:
    """Moved files make no other run, changed ones do."""
    shutil.copytree(run.path, tmp_path / "moved/teacher")
    weights = [tmp_path / name for name in ("first.pth", "second.safetensors", "other.pth")]
    state = build("squeezenet1_1", 1000, pretrain=False, size=32).model.state_dict()
    torch.save(state, weights[0])
    save_file(state, weights[1])
    torch.save({name: value + 1 for name, value in state.items()}, weights[2])
    base = change(small, "model", pretrain=True, weights=str(weights[0]))
    student = prepare(change(base, "optim", teacher=(str(run.path),))).run
    teachers = student.read_json("env.json")["teachers"]
    assert teachers == ["sha256:" + hashlib.sha256(run.best.read_bytes()).hexdigest()]

    def again(start: Path, teacher: Path) -> TrainConfig:
        return change(change(base, "model", weights=str(start)), "optim", teacher=(str(teacher),))

    same = again(weights[1], tmp_path / "moved/teacher")
    assert changed_settings(student, same) == [] and is_same(student, same, split_of(student))
    assert prepare(same, resume=True).config == dataclasses.replace(same, data=student.config().data)
    assert changed_settings(student, again(weights[2], run.path)) == ["model.weights"]
    with pytest.raises(Refused, match="there is no weights file"):
        check_same(student, again(tmp_path / "none.pth", run.path))
    tensors, info = read_checkpoint(run.best)
    save_file({name: value * 2 for name, value in tensors.items()}, tmp_path / "moved/teacher/best.safetensors", info)
    with pytest.raises(Refused, match=r"--resume cannot change model\.weights, optim\.teacher of small"):
        check_same(student, again(weights[2], tmp_path / "moved/teacher"))
    shutil.copyfile(tmp_path / "moved/teacher/best.safetensors", run.best)
    with pytest.raises(Refused, match=r"the weights of a teacher of .* have changed"):
        prepare(again(weights[0], run.path), resume=True)
    recorded = student.read_json("env.json")
    student.write_json("env.json", {key: value for key, value in recorded.items() if key != "teachers"})
    assert changed_settings(student, same) == ["optim.teacher"]  # runs of before: by the name
    prepare(again(weights[0], run.path), resume=True)


def test_a_run_elsewhere_finds_its_teachers(run: Run, tmp_path: Path) -> None:
    config = change(moved(run), "optim", teacher=(run.name,))
    job = prepare(elsewhere(dataclasses.replace(config, exp="student"), str(tmp_path / "temporary")))
    assert job.teachers and len(job.teachers.networks) == 1
    assert job.run.path == tmp_path / "temporary/student"


# its files


def test_checkpoints_of_equal_runs_are_equal_bytes(small: TrainConfig) -> None:
    one, two = (train(dataclasses.replace(small, exp=name)) for name in ("one", "two"))
    assert one.best.read_bytes() == two.best.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="needs modes of files")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask(run: Run, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        train(moved(run), overwrite=True)
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in (run.best, run.last)} == {
        "best.safetensors": mode, "last.pt": mode
    }  # fmt: skip


@pytest.mark.parametrize("loss", ["deleted", "renamed", "config.json", "a file instead"])
def test_a_folder_that_disappears_ends_the_training(small: TrainConfig, loss: str) -> None:
    job = prepare(small)
    epochs = log_records(job.run, fit(job, quiet=True))
    next(epochs)
    folder = job.run.path
    if loss == "config.json":
        (folder / "config.json").unlink()
    elif loss == "renamed":
        folder.rename(folder.with_name("renamed"))
    else:
        shutil.rmtree(folder)
        if loss == "a file instead":
            folder.write_text("")
    before = files(folder) if folder.is_dir() else {}
    with pytest.raises(Refused, match="moved or removed"):
        next(epochs)
    assert (files(folder) if folder.is_dir() else {}) == {k: v for k, v in before.items() if not k.startswith(LOCK)}


@pytest.mark.parametrize("content", [b"x", b"", b"PK\x03\x04" + bytes(50), "a list", "other tensors", "no records"])
def test_a_last_checkpoint_that_cannot_be_read(run: Run, content: bytes | str) -> None:
    if isinstance(content, bytes):
        run.last.write_bytes(content)
    else:
        state = torch.load(run.last, weights_only=True)
        torch.save(
            {"a list": [1], "other tensors": {**state, "model": {}}, "no records": {**state, "records": "[1]"}}[
                content
            ],
            run.last,
        )
    with pytest.raises(Refused, match=r"last\.pt") as error:
        next(fit(prepare(moved(run), resume=True), quiet=True))
    assert "--overwrite" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_events_that_cannot_be_written_are_told_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    records = [dict(record) for record in run.metrics()] * 3
    assert list(log_records(Run(Path("/dev/null/none")), records)) == records
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="other systems bound no files")
def test_a_disk_that_fills_up_under_the_events_is_told_once(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard writes in a thread of its own, whose traceback nobody needs; pytest would warn of it."""
    import resource

    records = [dict(record) for record in run.metrics()] * 3
    logged = log_records(Run(tmp_path), iter(records))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = next(logged) and next(tmp_path.glob("events.*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, hard))
    try:
        assert list(logged) == records[1:]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "cannot be written" in told


def test_a_run_goes_on_without_the_kernels_it_began_with(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = run.read_json("env.json")
    kernels = recorded["machine"]["kernels"]
    prepare(moved(run), resume=True)
    assert capsys.readouterr().err == ""
    run.write_json("env.json", {**recorded, "machine": {**recorded["machine"], "kernels": not kernels}})
    for lines in (1, 0):
        prepare(moved(run), resume=True)
        assert len(capsys.readouterr().err.splitlines()) == lines
    assert run.read_json("env.json")["machine"]["kernels"] == "in part"


def test_a_process_without_validation_images(small: TrainConfig) -> None:
    """6 images validate and the seventh process has none: it adds nothing to the sums, and waits for nobody."""
    job = prepare(small)
    worlds = [dataclasses.replace(job.world, rank=rank, size=8) for rank in (0, 7)]
    trainers = [Trainer(dataclasses.replace(job, world=world)) for world in worlds]
    shares = [trainer.source.val_logits(trainer.model) for trainer in trainers]
    assert [(tuple(output.shape), tuple(labels.shape)) for output, labels in shares] == [((1, 3), (1,)), ((0, 3), (0,))]
    assert float(torch.nn.functional.cross_entropy(*shares[1], reduction="sum")) == 0


# what the user is told


def test_what_a_split_lacks_is_said_once_whoever_made_it(small: TrainConfig, tiny_data: Path, tmp_path: Path) -> None:
    for subset, numbers in (("train", range(1, 7)), ("val", range(7, 10)), ("test", range(10, 13))):
        for name in ("ball", "box"):
            (tmp_path / "data" / subset / name).mkdir(parents=True)
            for number in numbers:
                file = f"{name}/image_{number:04d}.jpg"
                shutil.copy(tiny_data / file, tmp_path / "data" / subset / file)

    def notes(**data: Any) -> str:
        config = change(change(small, "data", root=str(tmp_path / "data"), **data), "optim", epochs=1)
        return "\n".join(prepare(config, overwrite=True).notes)

    assert "12, 6 and 6 images" in notes() and "No validation" not in notes()
    manifest = Run(Path(small.runs) / small.exp).read_json("split.json")
    manifest["subsets"] |= {"train": manifest["subsets"]["train"] + manifest["subsets"]["val"], "val": []}
    (tmp_path / "split.json").write_text(json.dumps(manifest))
    assert notes(split=str(tmp_path / "split.json")).count("No validation images") == 1
    for file in (tmp_path / "data" / "val").glob("*/*.jpg"):
        file.write_bytes(b"broken")
    assert notes(skip_bad_images=True).count("No validation images") == 1


# what cannot be trained


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pictures of 2 classes, of which 17 train with 70 % of one class and 7 of the other."""
    root = draw(tmp_path_factory.mktemp("odd") / "images", 2, 15)
    for file in sorted(root.glob("*/*"))[-3:]:
        file.unlink()
    return root


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_a_last_batch_of_one_image_joins_the_one_before(small: TrainConfig, odd: Path, name: str) -> None:
    config = change(change(small, "data", root=str(odd)), "model", name=name)
    job = prepare(change(config, "optim", epochs=1, batch_size=8))
    assert len(job.manifest.subsets["train"]) == 17
    (record,) = fit(job, quiet=True)
    assert record["step"] == 2  # 8 and 9 images


def test_batches_of_one_image(small: TrainConfig) -> None:
    one = change(change(small, "model", name="resnet18"), "optim", batch_size=1, epochs=1)
    with pytest.raises(Refused, match="--batch-size"):
        prepare(one)
    assert not (Path(small.runs) / "small").exists()
    for part, values in (("freeze_norm", True), ("freeze", True), ("size", 96), ("name", "squeezenet1_1")):
        prepare(change(one, "model", **{part: values}), overwrite=True)


@pytest.mark.parametrize("words", [("--seed", "1732743000000"), ("--seed", "-1"), ("--split-seed", "-1")])
def test_seeds_are_refused_before_anything_is_written(
    words: tuple[str, str], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    assert main(["train", "--exp", "s", "--runs", str(runs), "--data", str(tiny_data), *words]) == 2
    assert words[0] in capsys.readouterr().err and not runs.exists()


def test_rates_beyond_what_numbers_hold_diverge(small: TrainConfig) -> None:
    config = change(small, "optim", lr=1e30, backbone_lr_ratio=1e6, weight_decay=1e6)
    with pytest.raises(Diverged):
        next(fit(prepare(config), quiet=True))
    assert main(["train", "--exp", "x", "--runs", small.runs, "--data", str(small.data.root), "--lr", "1e308"]) == 2
