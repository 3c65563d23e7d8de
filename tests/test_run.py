"""The run directory: whole files or none, and names that lead to it."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from finetune101.config import TrainConfig, read_recipe, to_dict
from finetune101.data import splits
from finetune101.errors import Refused
from finetune101.files import atomic, read_json, write_json
from finetune101.run import Run, create_run, open_run, save_checkpoint, save_state
from finetune101.schemas import SCHEMAS, Split

RECORD = {
    "train_loss": 1.0, "train_top1": 50.0, "lr_head": 0.01, "lr_backbone": 0.001, "images_per_s": 10.0,
    "val_loss": 1.0, "val_seconds": 0.0, "seconds": 60.0, "best": True,
}  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of which only the configuration is written."""
    config = TrainConfig(exp="one", runs=str(tmp_path / "runs"))
    run = create_run(config, resume=False, overwrite=False)
    run.write_json("config.json", to_dict(config))
    return run


# atomic


def test_atomic_makes_folders_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file"
    for text in ("one", "two"):
        with atomic(file) as part:
            part.write_text(text)
        assert file.read_text() == text and names(file.parent) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_keeps_the_old_file_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(error), atomic(file) as part:
        part.write_text("half")
        raise error
    assert file.read_text() == "old" and names(tmp_path) == ["file"]


def test_atomic_tells_of_an_os_error_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write .*file/x\.json: .*; choose another folder"):
        write_json(tmp_path / "file" / "x.json", {})
    with (
        pytest.raises(ValueError, match=r"cannot write .*: No space left on device; free some space"),
        atomic(tmp_path / "x"),
    ):
        raise OSError(28, "No space left on device")


def test_a_state_is_written_into_an_existing_folder_only(tmp_path: Path) -> None:
    """A run's folder that somebody removed does not come back without its settings."""
    for save in (save_state, lambda path, tensors: save_checkpoint(path, tensors, {"epoch": "1"})):
        with pytest.raises(Refused, match=r"cannot write .*x\.pt"):
            save(tmp_path / "gone" / "x.pt", {"x": torch.zeros(3)})
    assert names(tmp_path) == []


def test_a_checkpoint_is_what_safetensors_reads_and_always_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(7)}
    info = {key: f"ä {key}" for key in "qwertyuiop"}
    for number in (1, 2):
        save_checkpoint(tmp_path / f"{number}.safetensors", tensors, info)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    with safe_open(tmp_path / "1.safetensors", framework="pt") as opened:
        assert opened.metadata() == info
        assert all(torch.equal(opened.get_tensor(key), value) for key, value in tensors.items())


def test_json_that_is_no_json_is_not_written(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ä": [1, 2]})
    assert "ä" in (tmp_path / "x.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert Run(tmp_path).read_json("x.json") == {"ä": [1, 2]} and names(tmp_path) == ["x.json"]


# a run


def test_files_of_a_run(run: Run) -> None:
    assert run.name == "one" and run.best.name == "best.safetensors" and run.last.name == "last.pt"
    assert run.has("config.json") and not run.has("test.json")
    assert run.config().exp == "one"


def test_missing_and_broken_json_are_named(run: Run) -> None:
    with pytest.raises(ValueError, match=r"has no test\.json; is it the folder of a finished run\?"):
        run.read_json("test.json")
    for content in (b"{", b"\xff", b"[]", b"null", b'{"n": "3"}', b"[" * 100_000, b'{"n": NaN}', b'{"format": 99}'):
        (run.path / "test.json").write_bytes(content)
        with pytest.raises(Refused, match=r"test\.json"):
            run.read_json("test.json")


def test_a_damaged_record_is_refused(run: Run) -> None:
    assert run.metrics() == []
    records = [{**RECORD, "epoch": 1, "step": 3, "val_top1": None}, {**RECORD, "epoch": 2, "step": 6, "val_top1": 5.0}]
    run.write_metrics(records)
    assert run.metrics() == records
    for damage in ('{"epoch": 3, "val', '{"epoch": 3}', "[" * 100_000, '{"epoch": NaN}'):
        run.write_metrics(records)
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write(damage)
        with pytest.raises(Refused, match=r"metrics\.jsonl"):
            run.metrics()


def test_clear_removes_only_what_a_run_wrote(run: Run) -> None:
    for name in ("metrics.jsonl", "best.safetensors", "events.out.tfevents.1", "notes.txt", "mine.csv"):
        (run.path / name).write_text("")
    (run.path / "sub").mkdir()
    run.clear()
    assert names(run.path) == ["mine.csv", "notes.txt", "sub"]


# names


def test_create_run_refuses(run: Run, tmp_path: Path) -> None:
    config = run.config()
    with pytest.raises(ValueError, match="one exists; add --resume to continue it or --overwrite to start anew"):
        create_run(config, resume=False, overwrite=False)
    assert create_run(config, resume=True, overwrite=False).has("config.json")
    assert create_run(config, resume=False, overwrite=True).has("config.json")  # nothing is removed yet
    with pytest.raises(ValueError, match=r"there is no run .*two to resume; start it without --resume"):
        create_run(TrainConfig(exp="two", runs=config.runs), resume=True, overwrite=False)
    (Path(config.runs) / "three").write_text("")
    with pytest.raises(ValueError, match="three is a file; choose another --exp or --runs"):
        create_run(TrainConfig(exp="three", runs=config.runs), resume=False, overwrite=False)


def test_open_run_by_name_or_folder(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert open_run("one", str(run.path.parent)).path == run.path
    assert open_run(str(run.path)).path == run.path
    monkeypatch.chdir(tmp_path)
    assert open_run("one").path == Path("runs/one")


def test_open_run_names_those_that_exist(run: Run, tmp_path: Path) -> None:
    Run(run.path.parent / "grid" / "lr=1").write_json("config.json", {})
    with pytest.raises(ValueError, match="no run named other; there are: one, grid/lr=1"):
        open_run("other", str(run.path.parent))
    with pytest.raises(ValueError, match=r"no run named on; did you mean one\?"):
        open_run("on", str(run.path.parent))
    with pytest.raises(ValueError, match=r"grid is no run: it has no config\.json"):
        open_run("grid", str(run.path.parent))
    with pytest.raises(ValueError, match=r"there is none yet in .*; train one first"):
        open_run("on", str(tmp_path / "elsewhere"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such file names")
def test_names_with_spaces_and_letters_of_any_language(tmp_path: Path) -> None:
    config = TrainConfig(exp="lauf ü 1", runs=str(tmp_path))
    create_run(config, resume=False, overwrite=False).write_json("config.json", to_dict(config))
    assert open_run("lauf ü 1", str(tmp_path)).config() == config


# evidence


RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize("name", [*SCHEMAS, "metrics.jsonl", "winner.yaml", "splits"])
def test_published_evidence_is_still_read(name: str) -> None:
    """Files of 0.1.0, which hold no version."""
    files = sorted(RESULTS.glob("splits/*.json") if name == "splits" else RESULTS.rglob(name))
    for file in files:
        run = Run(file.parent)
        if name == "metrics.jsonl":
            assert run.metrics()
        elif name == "winner.yaml":
            assert read_recipe(str(file), "x").optim
        elif name == "splits":
            assert sum(map(len, splits.from_json(read_json(file, Split, remedy="")).subsets.values()))
        elif name == "config.json" and "members" not in run.read_json(name):
            assert run.config().exp
        else:
            assert run.read_json(name)
    assert files or name in ("split.json", "test.json")


@pytest.mark.slow
def test_a_split_of_a_million_images_is_read(tmp_path: Path) -> None:
    paths = [f"class_{i % 1000:04d}/image_{i:07d}.jpg" for i in range(1_000_000)]
    subsets = {"train": paths[:800_000], "val": paths[800_000:900_000], "test": paths[900_000:]}
    split = {
        "protocol": "reference", "seed": 1, "options": {}, "classes": sorted({path[:10] for path in paths}),
        "content_hash": "x", "subsets": subsets,
    }  # fmt: skip
    (tmp_path / "split.json").write_text(json.dumps(split))
    began = time.process_time()
    held = Run(tmp_path).read_json("split.json")
    assert time.process_time() - began < 10 and held["subsets"] == subsets


@pytest.mark.parametrize(
    "change",
    [
        {"subsets": {"train": ["a/1.jpg"], "val": [], "test": ["a/1.jpg"]}}, {"subsets": {"train": [], "val": []}},
        {"subsets": {"train": [1], "val": [], "test": []}}, {"subsets": {"train": ["b/1.jpg"], "val": [], "test": []}},
        {"seed": "x"}, {"classes": None}, {"subsets": []}, {"format": 2}, {"options": [1]},
    ],
)  # fmt: skip
def test_a_wrong_split_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    good = {
        "protocol": "reference", "seed": 1, "options": {}, "classes": ["a"], "content_hash": "x",
        "subsets": {"train": ["a/1.jpg"], "val": [], "test": []},
    }  # fmt: skip
    run = Run(tmp_path)
    run.write_json("split.json", good)
    assert splits.from_json(run.read_json("split.json")).labels("train") == [0]
    run.write_json("split.json", {**good, **change})
    with pytest.raises(Refused, match="split"):
        splits.from_json(run.read_json("split.json"))


def test_no_run_lies_in_the_folder_of_another(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    config = TrainConfig(exp="a", runs=str(tmp_path))
    Run(tmp_path / "a").write_json("config.json", to_dict(config))
    for exp in ("a/b", "a/b/c"):
        with pytest.raises(Refused, match="folder of a run"):
            create_run(dataclasses.replace(config, exp=exp), resume=False, overwrite=True)
    free = dataclasses.replace(config, exp="c/d")
    assert create_run(free, resume=False, overwrite=False).path == tmp_path / "c" / "d"
