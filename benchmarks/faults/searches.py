"""Searches and studies whose workers and drivers are killed at random moments.

A small search and a small study over drawn images, with two workers, run in turns again and again; four kills of five
hit a worker, one the driver, all with SIGKILL, and the same command is given again where the driver died. Each finished
one is compared with one that nobody disturbed: every run once, no epoch trained twice, the same metrics.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recorded import learned

from faults.bench import Bench, Case

GRID = ["--grid", "lr=0.01,0.02,0.03,0.05", "--grid", "gamma=0.1,0.5", "--grid", "batch_size=8,16"]
POINTS = 16
IN_VAIN = 5  # searches in a row that ended before a kill
SMALL = ["--size", "32", "--epochs", "3", "--threads", "1"]
SEARCH = ["search", *SMALL, "--model", "squeezenet1_1", "--no-pretrain"]
STUDY = ["study", *SMALL, "--models", "squeezenet1_1", "--arms", "scratch", "--scratch-recipe", "original"]
STUDY += ["--seeds", "4", "--splits", "4", "--batch-size", "8"]


Popen = subprocess.Popen[str]


@dataclass
class Tally:
    """What the kills cost, over all searches and studies."""

    kills: int = 0
    of_drivers: int = 0
    searches: int = 0
    studies: int = 0
    lost: int = 0
    repeated: int = 0
    different: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def failures(self) -> int:
        """Runs that are not as they would be without kills."""
        return self.lost + self.repeated + self.different


def start(folder: Path, data: Path, jobs: int = 2, grid: list[str] = GRID, study: bool = False) -> Popen:
    """The command of the search, or of the study, in a session of its own."""
    command = [sys.executable, "-m", "finetune101", *(STUDY if study else [*SEARCH, *grid])]
    return subprocess.Popen(
        [*command, "--exp", "s", "--runs", str(folder), "--data", str(data), "--jobs", str(jobs)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in what they start behind
    )


def children(pid: int) -> list[int]:
    """Process numbers of the children of ``pid``."""
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


def workers(pid: int) -> list[int]:
    """The worker processes of the search ``pid``: the children of its fork server."""
    processes = []
    for child in children(pid):
        try:
            server = "forkserver" in Path(f"/proc/{child}/cmdline").read_text()
        except OSError:
            continue
        processes += children(child) if server else []
    return processes


def kill_one(search: Popen, rng: random.Random, tally: Tally) -> None:
    """Kills a worker or, one time in five, the driver."""
    victims = workers(search.pid)
    driver = rng.random() < 0.2
    if not driver and not victims:
        return
    try:
        os.kill(search.pid if driver else rng.choice(victims), signal.SIGKILL)
    except ProcessLookupError:
        return
    tally.kills += 1
    tally.of_drivers += driver


def disturbed(folder: Path, data: Path, kills: int, rng: random.Random, tally: Tally, study: bool) -> None:
    """One search or study, given again until it is finished; it is killed at until the tally has ``kills``."""
    while True:
        with start(folder, data, study=study) as search:
            while search.poll() is None:
                try:
                    search.wait(rng.uniform(0.05, 2.5))
                except subprocess.TimeoutExpired:
                    if tally.kills < kills and workers(search.pid):  # before that it has not begun
                        kill_one(search, rng, tally)
            assert search.stderr is not None
            errors = search.stderr.read()
        if search.returncode == 0:
            return
        if search.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the command ended with {search.returncode}: {errors[-2000:]}")


def events_twice(run: Path) -> list[int]:
    """The epochs whose validation accuracy is in the run's TensorBoard events more than once."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    counts: Counter[int] = Counter()
    for file in run.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(file)).Load():
            counts.update(event.step for value in event.summary.value if value.tag == "accuracy/val")
    return [step for step, count in counts.items() if count > 1]


def times_finished(folder: Path) -> Counter[str]:
    """How often each run of the finished search or study in ``folder`` came to its end."""
    if (folder / "study.json").is_file():
        return Counter(path.parent.relative_to(folder).as_posix() for path in folder.rglob("test.json"))
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    (name,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    finished = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE and "same_as" not in t.user_attrs]
    return Counter(trial.user_attrs["run"] for trial in finished)


Metrics = dict[str, list[list[Any]]]


def judge(folder: Path, truth: Metrics, tally: Tally) -> None:
    """Adds to the tally what the finished search or study in ``folder`` lost, repeated or changed."""
    times = times_finished(folder / "s")
    for run in truth:
        path = folder / "s" / run
        if times[run] == 0 or not (path / "metrics.jsonl").is_file():
            tally.lost += 1
        elif times[run] > 1 or events_twice(path):
            tally.repeated += 1
            tally.notes.append(f"{run}: finished {times[run]} times, epochs {events_twice(path)} trained twice")
        elif learned(path) != truth[run]:
            tally.different += 1
            tally.notes.append(f"{run}: {learned(path)} rather than {truth[run]}")


def undisturbed(folder: Path, data: Path, study: bool) -> Metrics:
    """Run -> its metrics, of a search or a study that nobody kills."""
    command = start(folder, data, jobs=1, study=study)
    _, errors = command.communicate()
    if command.returncode != 0:
        raise RuntimeError(f"the undisturbed command failed: {errors[-2000:]}")
    files = (folder / "s").rglob("metrics.jsonl")
    truth = {file.parent.relative_to(folder / "s").as_posix(): learned(file.parent) for file in files}
    assert len(truth) == POINTS
    return truth


def searches(count: int, bench: Bench) -> Iterator[Case]:
    """Kills until there were ``count``, and judges every search and study: a case for each kill."""
    folder, truths = bench.new_folder("searches"), dict[bool, Metrics]()
    tally, in_vain = Tally(), 0
    while tally.kills < count:
        study = tally.searches > tally.studies
        if study not in truths:
            truths[study] = undisturbed(folder / f"truth_{'study' if study else 'search'}", bench.data, study)
        name = f"{'study' if study else 'search'}_{tally.searches}"
        before, failures = tally.kills, tally.failures
        disturbed(folder / name, bench.data, count, bench.rng, tally, study)
        tally.searches, tally.studies = tally.searches + (not study), tally.studies + study
        judge(folder / name, truths[study], tally)
        fault = f"{tally.notes[-3:]} {tally}" if tally.failures > failures else ""
        in_vain = 0 if tally.kills > before else in_vain + 1
        if in_vain == IN_VAIN:
            raise RuntimeError(f"{IN_VAIN} searches in a row ended before anything was killed")
        yield from [(name, "")] * (tally.kills - before - 1)
        if fault or not in_vain:  # what nothing was done to is no case
            yield name, fault
        kept = {"kills of drivers": tally.of_drivers, "searches": tally.searches, "studies": tally.studies}
        bench.notes.update(Counter(kept) - bench.notes)
