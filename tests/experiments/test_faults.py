"""A search whose code, files, folder or file system is at fault."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from finetune101.errors import Refused
from finetune101.experiments import queue
from finetune101.experiments.queue import Plan
from finetune101.experiments.workers import alone, run_workers
from finetune101.files import atomic
from finetune101.training.loop import fit

MakePlan = Callable[..., Plan]


def search(plan: Plan) -> optuna.Study:
    """The study of ``plan`` after it was run."""
    with alone(plan):
        return run_workers(plan, lambda study, record: None)


def test_a_fault_of_ours_is_kept_and_the_other_points_go_on(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(job: Any, **how: Any) -> Any:
        if job.config.optim.lr == 0.05:
            raise ZeroDivisionError("a fault")
        return fit(job, **how)

    monkeypatch.setattr("finetune101.experiments.trial.fit", failing)
    one = plan()
    good, bad = queue.results(one, search(one))
    assert (good["state"], bad["state"], bad["error"]) == ("complete", "failed", "ZeroDivisionError: a fault")
    assert "Traceback" in Path(bad["trace"]).read_text() and Path(bad["trace"]).parent == Path(bad["run"])


@pytest.mark.skipif(os.name != "posix", reason="Windows locks files by other means")
def test_a_file_system_without_locks_is_enough(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # as on Lustre and some NFS

    monkeypatch.setattr(fcntl, "flock", flock)
    one = plan({"lr": [0.01]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock says that it takes another way
        assert len(queue.results(one, search(one))) == 1
        with alone(one), pytest.raises(Refused, match="another search"):
            search(one)


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


def test_a_damaged_journal_is_one_sentence(plan: MakePlan) -> None:
    one = plan({"lr": [0.01]})
    search(one)
    journal = one.folder / "optuna.journal"
    for damage in (b"nonsense\n", b"[]\n", b'{"op_code": 99}\n', b'{"op_code": 4, "worker_id": 3}\n', b"\xff\xfe\n"):
        whole = journal.read_bytes()
        journal.write_bytes(damage + whole)
        with pytest.raises(Refused, match=r"optuna\.journal is damaged"):
            search(one)
        journal.write_bytes(whole)
    journal.unlink()
    assert not any(trial.user_attrs.get("trained") for trial in search(one).trials)


def test_the_folder_of_something_else_is_refused(plan: MakePlan) -> None:
    one = plan()
    one.folder.mkdir(parents=True)
    for name in ("config.json", "study.json"):
        (one.folder / name).write_text('{"optim": {}}')
        with pytest.raises(Refused, match="is the folder of a"):
            search(one)
        (one.folder / name).unlink()
    one.folder.rmdir()
    one.folder.write_text("a file")
    with pytest.raises(Refused, match="--exp"):
        search(one)
