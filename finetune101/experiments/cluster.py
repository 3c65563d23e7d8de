"""Trains many runs on a Ray cluster: a streaming task for each run, whose items are the events of ``train_task``.

A node trains right in the folder of the runs where the node shares that folder with the driver. Elsewhere it trains in
a temporary folder, and the files of the run come back with its last event.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path, PurePosixPath
from typing import Any

from finetune101 import __version__
from finetune101.config import TrainConfig, to_dict
from finetune101.data.images import find_data
from finetune101.errors import Refused, escaped, shortened
from finetune101.experiments.point_run import split_hash
from finetune101.experiments.runner import Ended, Epoch, Event, Failed, Task, first_line, train_task
from finetune101.files import atomic, process_space, remove_abandoned
from finetune101.training.job import LOCK, elsewhere

ANSWERED = 20.0  # seconds in which the head of a cluster answers
CHECKED = 300.0  # seconds in which a node hashes its images
COUNTED = 5.0  # seconds between two looks at the size of the cluster
CLEANED = 15.0  # seconds in which cancelled tasks remove their temporary folders
SMALL = 2**22  # bytes of a file that comes back from a run that was stopped: records and pictures, no weights
FINAL = ("metrics.jsonl", "test.json")

Files = list[tuple[str, bytes]]
"""(path below the folder of a run, content)"""


@dataclasses.dataclass(frozen=True)
class Driver:
    """What a node needs to know of the machine that the command runs on."""

    split: str
    """Hash of the split that this machine makes of its images."""
    token: Path
    """A file in the folder of the runs; a node that reads ``secret`` in it shares that folder."""
    secret: str
    version: str = __version__
    words: tuple[str, ...] = ()
    """The command line, which the run records."""

    def shares_folder(self) -> bool:
        """Whether the machine that asks shares the folder of the runs."""
        try:
            return self.token.read_text(encoding="utf-8") == self.secret
        except OSError:
            return False


@dataclasses.dataclass(frozen=True)
class Item:
    """What a task streams: an event, or None between two epochs; and files of the run where no folder is shared."""

    event: Event | None
    files: Files | None = None


def fault_of_node(task: Task, driver: Driver) -> str | None:
    """Why this node cannot train ``task``; None where it can."""
    if __version__ != driver.version:
        return f"has finetune101 {__version__}, not {driver.version}; install the same version on every node"
    try:
        split = split_hash(task.config.data)
    except Refused as error:
        return f"lacks the images: {error}"
    if split != driver.split:
        return f"has other images in {task.config.data.root}; copy the images of this machine to the same path there"
    if task.config.optim.teacher and not driver.shares_folder():
        return f"does not share the folder {driver.token.parent} with the teachers; share it, or train without teachers"
    return None


def train_on_node(task: Task, driver: Driver, begun: list[Any]) -> Generator[Item, None, None]:
    """A task of the cluster: the events of ``train_task``, an item without event after each epoch, then the end.

    Ray lets the task run on when the driver takes an item. So the run waits after each epoch until the driver takes the
    item without event. ``begun`` holds a reference to the files of a run that was begun before, or nothing.
    """
    import ray

    sys.argv = list(driver.words)
    if fault := fault_of_node(task, driver):  # of a node that joined later
        yield Item(Failed(task, "Refused", f"the node {socket.gethostname()} {fault}", begun=bool(begun)))
    elif driver.shares_folder():
        for event in train_task(task):
            yield Item(event)
            if isinstance(event, Epoch):
                yield Item(None)
    else:
        yield from _train_elsewhere(task, [file for files in ray.get(begun) for file in files])


def _train_elsewhere(task: Task, begun: Files) -> Generator[Item, None, None]:
    """Trains in a temporary folder, which is gone before the driver hears of the end."""
    end: Item | None = None
    with tempfile.TemporaryDirectory(prefix="finetune101-", ignore_cleanup_errors=True) as runs:
        here = Task(dataclasses.replace(task.config, runs=runs), task.is_tested)
        write_files(here.run.path, begun)
        for event in train_task(here):
            if isinstance(event, Epoch):
                yield Item(event, files=[])
                yield Item(None, files_of(here.run.path, most=SMALL))
            else:
                end = Item(event, files_of(here.run.path))
    assert end
    yield end


def files_of(folder: Path, most: int | None = None) -> Files:
    """The files below ``folder`` of at most ``most`` bytes each, without locks, temporary files and links."""
    files = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.is_symlink() and not file.name.startswith((".", LOCK)):
            content = file.read_bytes() if most is None or file.stat().st_size <= most else None
            files += [(file.relative_to(folder).as_posix(), content)] if content is not None else []
    return files


def write_files(folder: Path, files: Files) -> None:
    """Writes ``files`` below ``folder``, each whole or not at all, and last those that say that the run is finished.

    Raises Refused for a path that leads out of the folder, and where a file cannot be written.
    """
    for name, content in sorted(files, key=lambda file: FINAL.index(file[0]) if file[0] in FINAL else -1):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise Refused(f"a node sent the file {shortened(escaped(name))}, which is not in a run; look at that node")
        with atomic(folder / path) as part:
            part.write_bytes(content)


@dataclasses.dataclass(eq=False)
class _Training:
    """A run that is being trained on the cluster."""

    task: Task
    items: Any
    """Of ``train_on_node``: a ray.ObjectRefGenerator."""
    sends_files: bool = False


class RayWorkers:
    """Tasks of a Ray cluster, ``jobs`` at most; without ``jobs`` as many as its nodes have CPUs and GPUs for.

    A run takes a CPU for each of its threads, one where its settings name no number, and ``gpus_per_run`` GPUs.
    """

    def __init__(self, address: str, jobs: int | None = None, gpus_per_run: float = 0.0) -> None:
        """Connects to the cluster at ``address``: "auto" for the one of this machine, or host:port.

        Raises Refused without Ray, and for a cluster that does not answer.
        """
        if gpus_per_run < 0 or (gpus_per_run > 1 and gpus_per_run % 1):
            raise Refused(f"--gpus-per-run is {gpus_per_run:g}; give a share of one GPU, or a whole number")
        self._ray, self._is_ours = connect(address)
        self.jobs, self.gpus_per_run = jobs, gpus_per_run
        self._running: list[_Training] = []
        self._stopped: list[Task] = []  # whose ends the next wait tells
        self._cancelled: list[Any] = []  # generators: one that is dropped would let its run go on
        self._secret = secrets.token_hex(16)
        self._tokens: set[Path] = set()
        self._is_checked = False
        self._threads, self._room, self._counted = 1, 0, 0.0

    def is_free(self) -> bool:
        return len(self._running) < (self.jobs or self._count_room())

    def is_busy(self) -> bool:
        return bool(self._running or self._stopped)

    def start(self, task: Task) -> None:
        """Begins or resumes a run. Raises Refused where a node of the cluster cannot train the first one."""
        config = absolute(task.config)
        if self._threads != (threads := config.system.threads or 1):
            self._threads, self._counted = threads, 0.0
        ready = Task(config, task.is_tested)
        driver = Driver(split_hash(config.data), self._token(Path(config.runs)), self._secret, words=tuple(sys.argv))
        if not self._is_checked:
            self._check_nodes(ready, driver)
            self._note_what_is_missing(config)
            self._is_checked = True
        begun = [self._ray.put(files_of(task.run.path))] if task.run.has("config.json") else []
        train = self._ray.remote(train_on_node).options(
            num_cpus=self._threads, num_gpus=self.gpus_per_run, max_retries=0, num_returns="streaming",
            _generator_backpressure_num_objects=1, **_environment(),
        )  # fmt: skip
        self._running.append(_Training(task, train.remote(ready, driver, begun)))

    def wait(self, seconds: float) -> list[tuple[Task, Event | None]]:
        until = time.monotonic() + seconds
        events: list[tuple[Task, Event | None]] = [(task, Ended(task, is_stopped=True)) for task in self._stopped]
        self._stopped = []
        while self._running and not events:
            generators = [training.items for training in self._running]
            left = max(0.0, until - time.monotonic())
            if not self._ray.wait(generators, num_returns=1, timeout=left, fetch_local=False)[0]:
                break
            ready, _ = self._ray.wait(generators, num_returns=len(generators), timeout=0, fetch_local=False)
            for training in [training for training in self._running if training.items in ready]:
                item = self._take(training)
                if item is None or item.event is not None:
                    events.append((training.task, item.event if item else None))
        return events

    def _take(self, training: _Training) -> Item | None:
        """The next item of a run; None where the run lost its worker or its node."""
        errors, task = self._ray.exceptions, training.task
        try:
            item: Item = self._ray.get(next(training.items))
            training.sends_files = item.files is not None
            if isinstance(item.event, Epoch) or item.event is None:
                return Item(item.event and dataclasses.replace(item.event, task=task))
            write_files(task.run.path, item.files or [])
            if item.files and task.run.has("config.json"):  # which names the folder of the node
                own = dataclasses.replace(task.run.config(), runs=task.config.runs)
                task.run.write_json("config.json", to_dict(own))
            event = dataclasses.replace(item.event, task=task)
            if isinstance(event, Failed) and event.trace:
                event = dataclasses.replace(event, trace=str(task.run.path / Path(event.trace).name))
            end: Item | None = Item(event)
        except Refused as error:
            end = Item(Failed(task, "Refused", str(error), begun=True))
        except (errors.RayTaskError, errors.RuntimeEnvSetupError) as error:  # no fault of training, which is an event
            cause = getattr(error, "cause", None) or error
            end = Item(Failed(task, type(cause).__name__, first_line(cause), task.run.has("config.json")))
        except (errors.RayError, StopIteration):
            end = None
        self._running.remove(training)
        return end

    def answer(self, task: Task, go_on: bool) -> None:
        if go_on:
            return  # the next wait takes the item for which the run waits
        training = next(training for training in self._running if training.task == task)
        if training.sends_files:
            with contextlib.suppress(self._ray.exceptions.RayError, StopIteration):
                write_files(task.run.path, self._ray.get(next(training.items)).files)
        self._cancel(training)
        self._stopped.append(task)

    def close(self) -> None:
        for training in list(self._running):
            self._cancel(training)
        ends = [items.completed() for items in self._cancelled]
        if ends:  # the tasks remove their temporary folders
            self._ray.wait(ends, num_returns=len(ends), timeout=CLEANED, fetch_local=False)
        for token in self._tokens:
            with contextlib.suppress(OSError):
                token.unlink()
        self._cancelled, self._stopped, self._tokens = [], [], set()
        if self._is_ours:
            self._ray.shutdown()

    def _cancel(self, training: _Training) -> None:
        self._running.remove(training)
        self._cancelled.append(training.items)
        self._ray.cancel(training.items)

    def _token(self, runs: Path) -> Path:
        """The file in the folder ``runs`` by which nodes that share the folder recognise it."""
        token = runs / f".shared.{process_space()}.{os.getpid()}.{self._secret[:8]}.part"  # named as a temporary file
        if token not in self._tokens:
            with atomic(token) as part:
                part.write_text(self._secret, encoding="utf-8")
            self._tokens.add(token)
            remove_abandoned(runs)  # of a killed driver
        return token

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _count_room(self) -> int:
        """How many runs the cluster has room for, at least 1: an autoscaler adds nodes for a run that waits."""
        if time.monotonic() - self._counted > COUNTED:
            self._counted = time.monotonic()
            self._room = sum(self._room_on(node["Resources"]) for node in self._nodes())
        return max(1, self._room)

    def _room_on(self, resources: dict[str, float]) -> int:
        runs = resources.get("CPU", 0) // self._threads
        if self.gpus_per_run:
            runs = min(runs, resources.get("GPU", 0) / self.gpus_per_run + 1e-6)
        return int(runs)

    def _check_nodes(self, task: Task, driver: Driver) -> None:
        """Raises Refused naming a node that cannot train ``task``, as where the images are missing."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look = self._ray.remote(fault_of_node)
        looks = []
        for node in self._nodes():
            if not self._room_on(node["Resources"]):
                continue  # no run goes there, as to a head that only manages
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = look.options(num_cpus=0, max_retries=1, scheduling_strategy=here, **_environment())
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            looks.append((name, options.remote(task, driver)))
        for name, reference in looks:
            try:
                fault = self._ray.get(reference, timeout=CHECKED)
            except self._ray.exceptions.GetTimeoutError:
                fault = f"did not answer within {CHECKED:.0f} s; restart Ray there, or take the node out of the cluster"
            except (self._ray.exceptions.RayTaskError, self._ray.exceptions.RuntimeEnvSetupError) as error:
                reason = shortened(escaped(str(error).strip().splitlines()[-1]))
                fault = f"cannot run finetune101 {__version__} ({reason}); install the same version there"
            except self._ray.exceptions.RayError:
                continue  # the node is gone; should it come back, the task looks at it
            if fault:
                raise Refused(f"the node {name} {fault}")

    def _note_what_is_missing(self, config: TrainConfig) -> None:
        """Says that runs wait for a larger node, or that GPUs stay unused."""
        resources = [node["Resources"] for node in self._nodes()]
        if not any(map(self._room_on, resources)):
            gpus = f" and {self.gpus_per_run:g} GPUs" if self.gpus_per_run else ""
            line = f"No node has {self._threads} CPUs{gpus} for a run: the runs wait until such a node joins"
        elif not self.gpus_per_run and config.system.device == "auto" and any(r.get("GPU") for r in resources):
            line = "The runs train on CPUs; --gpus-per-run 1 trains them on the GPUs of the cluster"
        else:
            return
        print(line, file=sys.stderr, flush=True)


def connect(address: str) -> tuple[Any, bool]:
    """The module ray, connected to the cluster at ``address``, and whether this call made the connection.

    A program that is connected to a cluster stays with that. Ray's own messages are silenced. Raises Refused without
    Ray, and for a cluster that does not answer within some 20 seconds.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray._private import services, worker
    except ImportError as error:
        raise Refused("--cluster needs Ray; install it with pip install 'finetune101[cluster]'") from error
    if ray.is_initialized():
        return ray, False
    if address.startswith("ray://"):
        raise Refused(f"a Ray client ({address}) cannot follow runs; give --cluster auto on a machine of the cluster")
    start = "start one with ray start --head, and join it from each other machine with ray start --address=HOST:6379"
    try:
        place = services.canonicalize_bootstrap_address(address)
    except ConnectionError as error:
        raise Refused(f"no Ray cluster runs on this machine; {start}") from error
    except Exception as error:
        raise Refused(f"{address} is no address of a Ray cluster; give auto, or one such as 10.0.0.1:6379") from error
    if place:  # asked here, as Ray itself tries for minutes
        host, _, port = place.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERED).close()
        except (OSError, ValueError) as error:
            raise Refused(f"no Ray cluster answers at {place}; {start}") from error
    worker.print_to_stdstream = lambda *lines, **options: None  # the end of a node would print its log
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=place or "auto", log_to_driver=False, logging_level=logging.CRITICAL)
    except (Exception, SystemExit) as error:
        reason = shortened(escaped((str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")))
        raise Refused(f"the Ray cluster {address} cannot be joined ({reason}); {start}") from error
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)  # Ray ends the program by its own
    return ray, True


def _environment() -> dict[str, Any]:
    """Option of a task: the environment variables by which this machine finds weights and images."""
    names = ("FINETUNE101_WEIGHTS", "FINETUNE101_DATA", "FINETUNE101_CACHE")
    variables = {name: os.path.abspath(os.environ[name]) for name in names if os.environ.get(name)}
    return {"runtime_env": {"env_vars": variables}} if variables else {}


def absolute(config: TrainConfig) -> TrainConfig:
    """``config`` for another machine: absolute paths, and one thread where it names no number.

    Raises Refused where the images or a teacher are not found here.
    """
    config = elsewhere(config, os.path.abspath(config.runs))
    split, weights = (path and os.path.abspath(path) for path in (config.data.split, config.model.weights))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, root=os.path.abspath(find_data(config.data.root)), split=split),
        model=dataclasses.replace(config.model, weights=weights),
        system=dataclasses.replace(config.system, threads=config.system.threads or 1),
    )
