"""A search whose code, files, folder or file system is at fault."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from experiments.in_process import InProcess, do_search

from finetune101.errors import Refused
from finetune101.experiments.folders import alone
from finetune101.experiments.runner import MAX_LOSSES
from finetune101.experiments.search import run_search
from finetune101.experiments.search_plan import Plan
from finetune101.files import atomic
from finetune101.training.loop import fit

MakePlan = Callable[..., Plan]


def test_a_fault_of_ours_is_kept_and_the_other_points_go_on(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(job: Any, **how: Any) -> Any:
        if job.config.optim.lr == 0.05:
            raise ZeroDivisionError("a fault")
        return fit(job, **how)

    monkeypatch.setattr("finetune101.experiments.runner.fit", failing)
    one = plan(epochs=1)
    good, bad = do_search(one).entries
    assert (good["state"], bad["state"], bad["error"]) == ("complete", "failed", "ZeroDivisionError: a fault")
    assert "Traceback" in Path(bad["trace"]).read_text() and Path(bad["trace"]).parent == Path(bad["run"])
    trace, draw = Path(bad["trace"]), lambda *arguments: None
    assert run_search(one, one.folder / "table.json", one.folder / "plots", draw, InProcess()) == 1  # tried again
    assert trace.read_text().count("Traceback") == 2
    monkeypatch.undo()
    assert run_search(one, one.folder / "table.json", one.folder / "plots", draw, InProcess()) == 0
    done = do_search(one)
    assert {entry["state"] for entry in done.entries} == {"complete"} and not trace.exists() and done.epochs == []


def test_a_run_that_kills_its_workers_fails_alone_and_is_tried_again(plan: MakePlan) -> None:
    one = plan(epochs=1)
    name = do_search(one).entries[0]["run"]
    workers = InProcess(deaths=[f"s/{Path(name).name}"] * MAX_LOSSES)
    for file in one.folder.glob("*.journal"):
        file.unlink()
    for file in Path(name).iterdir():
        file.unlink()
    good, bad = do_search(one, workers).entries
    assert (good["state"], bad["state"], bad["run"]) == ("complete", "failed", name) and "Killed" in bad["error"]
    again = do_search(one)
    assert len(again.runs) == 1 and {entry["state"] for entry in again.entries} == {"complete"}


@pytest.mark.skipif(os.name != "posix", reason="Windows locks files by other means")
def test_a_file_system_without_locks_is_enough(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # as on Lustre and some NFS

    monkeypatch.setattr(fcntl, "flock", flock)
    one = plan({"lr": [0.01]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock says that it takes another way
        assert len(do_search(one).entries) == 1
        with alone(one.folder, "search"), pytest.raises(Refused, match="another search"):
            do_search(one)


def test_processes_of_one_number_write_files_of_one_name(tmp_path: Path) -> None:
    """As in two containers that share a folder: both have process number 1."""
    file = tmp_path / "metrics.jsonl"
    with atomic(file) as first:
        with atomic(file) as second:
            assert first != second
            second.write_text("second")
        assert file.read_text() == "second"
        first.write_text("first")
    assert file.read_text() == "first" and [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_folder_of_something_else_is_refused(plan: MakePlan) -> None:
    one = plan()
    one.folder.mkdir(parents=True)
    for name in ("config.json", "study.json"):
        (one.folder / name).write_text('{"optim": {}}')
        with pytest.raises(Refused, match="is the folder of a"):
            do_search(one)
        (one.folder / name).unlink()
    one.folder.rmdir()
    one.folder.write_text("a file")
    with pytest.raises(Refused, match="--exp"):
        do_search(one)
