"""The runner: tasks in, events out; a killed worker costs the current epoch, a fault its own run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from experiments.in_process import InProcess

from finetune101.config import TrainConfig, change, to_dict
from finetune101.experiments import runner
from finetune101.experiments.runner import MAX_LOSSES, Ended, Epoch, Event, Failed, LocalWorkers, Task, run_tasks
from finetune101.files import claim
from finetune101.training.job import LOCK
from finetune101.training.loop import fit


def tasks_of(base: TrainConfig, *names: str, **changes: Any) -> list[Task]:
    return [Task(change(dataclasses.replace(base, exp=name), changes)) for name in names]


def events_of(tasks: list[Task], workers: Any = None, **how: Any) -> list[Event]:
    return [event for event in run_tasks(tasks, workers or InProcess(), **how) if event]


def numbers(events: list[Event], name: str, is_new: bool | None = None) -> list[int]:
    """The epochs of a run that arrived, in order."""
    epochs = [event for event in events if isinstance(event, Epoch) and event.task.config.exp == name]
    return [epoch.record["epoch"] for epoch in epochs if is_new in (None, epoch.is_new)]


def test_every_epoch_arrives_once_and_then_the_end(base: TrainConfig) -> None:
    tasks = tasks_of(base, "a", "b")
    events = events_of(tasks, InProcess(jobs=2))
    assert [numbers(events, name, is_new=True) for name in "ab"] == [[1, 2]] * 2
    assert [event for event in events if isinstance(event, Ended)] == [Ended(task) for task in tasks]
    assert all(task.is_done() and not task.run.last.exists() for task in tasks)
    again = events_of(tasks)  # nothing is trained: the records arrive from the files
    assert [numbers(again, name, is_new=False) for name in "ab"] == [[1, 2]] * 2 and len(again) == 6


def test_a_run_that_is_told_to_stop_stands_at_that_epoch(base: TrainConfig) -> None:
    (task,) = tasks_of(base, "a", epochs=3)
    events = events_of([task], goes_on=lambda epoch: epoch.record["epoch"] < 2)
    assert numbers(events, "a") == [1, 2] and events[-1] == Ended(task, is_stopped=True)
    assert not task.is_done() and len(task.run.metrics()) == 2 and task.run.last.is_file()
    events = events_of([task])
    assert (numbers(events, "a", is_new=False), numbers(events, "a", is_new=True)) == ([1, 2], [3])


def test_an_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(base: TrainConfig) -> None:
    first, second = tasks_of(base, "a", "b", epochs=3)
    with contextlib.closing(run_tasks([first], InProcess())) as events:
        next(event for event in events if isinstance(event, Epoch) and event.record["epoch"] == 2)
    events_of([first, second])
    for one, other in zip(first.run.metrics(), second.run.metrics(), strict=True):
        assert all(one[key] == other[key] for key in ("epoch", "step", "train_loss", "val_loss", "val_top1"))


def test_a_task_may_have_to_wait_for_another(base: TrainConfig) -> None:
    first, second = tasks_of(base, "a", "b", epochs=1)

    def todo() -> Any:
        yield first
        while not first.is_done():
            yield None
        yield second

    assert [event.task for event in events_of(todo(), InProcess(jobs=2)) if isinstance(event, Ended)] == [first, second]


def test_a_tested_run_is_tested_and_not_again(base: TrainConfig) -> None:
    task = Task(change(base, {"epochs": 1}), is_tested=True)
    assert isinstance(events_of([task])[-1], Ended) and task.run.has("test.json") and task.is_done()
    before = (task.run.path / "test.json").stat().st_mtime_ns
    events_of([task])
    assert (task.run.path / "test.json").stat().st_mtime_ns == before
    (task.run.path / "test.json").unlink()  # trained, and killed before the test
    events = events_of([task])
    assert numbers(events, task.config.exp, is_new=True) == [] and task.is_done()


def test_a_fault_is_one_failed_run_with_its_traceback(base: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(job: Any, **how: Any) -> Any:
        if job.config.exp == "bad":
            raise MemoryError("no room\nfor more")
        return fit(job, **how)

    monkeypatch.setattr(runner, "fit", failing)
    bad, good = tasks_of(base, "bad", "good", epochs=1)
    events = events_of([bad, good])
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert (failed.task, failed.kind, failed.message, failed.begun) == (
        bad,
        "MemoryError",
        "MemoryError: no room",
        True,
    )
    assert failed.trace and "Traceback" in Path(failed.trace).read_text() and good.is_done()
    monkeypatch.undo()
    assert isinstance(events_of([bad])[-1], Ended) and not Path(failed.trace).exists()


def test_a_mistake_of_the_user_is_one_sentence_without_a_traceback(base: TrainConfig) -> None:
    (task,) = tasks_of(base, "a", model="alexnet")  # cannot take 32 px
    (failed,) = events_of([task])
    assert isinstance(failed, Failed) and failed.trace is None and not failed.begun
    assert failed.kind == "Refused" and "32" in str(failed)


def test_a_worker_that_dies_is_replaced_and_five_deaths_without_an_epoch_are_a_failure(base: TrainConfig) -> None:
    first, second = tasks_of(base, "a", "b", epochs=1)
    workers = InProcess(deaths=["a"] * (MAX_LOSSES - 1) + ["b"] * MAX_LOSSES)
    events = events_of([first, second], workers)
    assert numbers(events, "a") == [1] and first.is_done()
    assert [(e.task, e.kind, e.begun) for e in events if isinstance(e, Failed)] == [(second, "Killed", False)]
    assert [task.config.exp for task in workers.started] == ["a"] * MAX_LOSSES + ["b"] * MAX_LOSSES


def test_a_run_that_gains_epochs_may_lose_any_number_of_workers(base: TrainConfig) -> None:
    (task,) = tasks_of(base, "a", epochs=6)
    workers = InProcess()

    def lose(epoch: Epoch) -> bool:
        workers.deaths.append("a")
        return True

    events = events_of([task], workers, goes_on=lose)
    assert numbers(events, "a") == [1, 2, 3, 4, 5, 6] and isinstance(events[-1], Ended)
    assert len(workers.started) > MAX_LOSSES and numbers(events, "a", is_new=True) == [1, 2, 3, 4, 5, 6]


def test_a_worker_waits_for_the_process_that_still_has_the_run(
    base: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = tasks_of(base, "a", epochs=1)
    task.run.path.mkdir(parents=True)
    with claim(task.run.path / LOCK), monkeypatch.context() as patch:
        patch.setattr(runner, "PATIENCE", 0.0)
        (failed,) = events_of([task])
        assert isinstance(failed, Failed) and "is being trained by" in failed.message and not failed.begun
    with contextlib.ExitStack() as claimed:
        claimed.enter_context(claim(task.run.path / LOCK))
        monkeypatch.setattr(runner.time, "sleep", lambda seconds: claimed.close())
        assert isinstance(events_of([task])[-1], Ended)


# processes


def test_a_killed_worker_is_replaced_and_the_run_goes_on(base: TrainConfig) -> None:
    (task,) = tasks_of(base, "a", epochs=3)
    workers = LocalWorkers()
    pids: list[int] = []
    events: list[Event] = []
    for event in run_tasks([task], workers):
        events += [event] if event else []
        if isinstance(event, Epoch) and event.record["epoch"] == 1:
            ((process, _),) = workers._busy.values()
            pids.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)
    assert numbers(events, "a", is_new=True) == [1, 2, 3] and isinstance(events[-1], Ended) and len(pids) == 1
    assert len(task.run.metrics()) == 3


def test_workers_end_with_the_events(base: TrainConfig) -> None:
    workers = LocalWorkers(2)
    with contextlib.closing(run_tasks(tasks_of(base, "a", "b", "c", epochs=500), workers)) as events:
        next(event for event in events if isinstance(event, Epoch))
        processes = [process for process, _ in workers._busy.values()]
    assert len(processes) == 2 and not any(process.is_alive() for process in processes) and not workers.is_busy()
    until = time.monotonic() + 5
    while time.monotonic() < until and any(Path(f"/proc/{process.pid}").exists() for process in processes):
        time.sleep(0.1)


SCRIPT = """
import json
from finetune101.config import from_dict
from finetune101.experiments.runner import LocalWorkers, Task, run_tasks

config = from_dict(json.load(open("config.json")), "config.json")
print([type(event).__name__ for event in run_tasks([Task(config)], LocalWorkers()) if event])
"""


def test_a_script_that_guards_nothing_is_not_run_by_its_workers(base: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_dict(base)))
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines()[-1] == "['Epoch', 'Epoch', 'Ended']", done.stderr
