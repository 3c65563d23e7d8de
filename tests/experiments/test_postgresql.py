"""Several commands on one real PostgreSQL; one of them is killed, and its trial is taken up by another."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest

from finetune101.experiments import queue
from finetune101.experiments.queue import Plan

pytest.importorskip("psycopg", reason="needs psycopg: pip install 'finetune101[postgresql]'")
COMMAND = """
import pickle, sys
from finetune101.experiments.workers import run_workers as run
if __name__ == "__main__":
    plan = pickle.loads(bytes.fromhex(sys.argv[1]))
    print("ready", flush=True)
    run(plan, lambda study, record: print(record, flush=True) if record else None)
"""


def binaries() -> Path | None:
    """The newest folder with PostgreSQL's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


@pytest.fixture
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a private server on a loopback port."""
    programs = binaries()
    if programs is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    root = getattr(os, "geteuid", lambda: 1)() == 0
    if root and not shutil.which("runuser"):
        pytest.skip("PostgreSQL does not run as root, and there is no runuser to become another user")
    prefix = ["runuser", "-u", "postgres", "--"] if root else []
    user = "postgres" if root else getpass.getuser()
    folder = Path(subprocess.run([*prefix, "mktemp", "-d"], check=True, capture_output=True, text=True).stdout.strip())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    try:
        subprocess.run([*prefix, programs / "initdb", "-D", folder / "data", "-A", "trust", "-U", user], **quiet)  # type: ignore[call-overload]
        control = [*prefix, programs / "pg_ctl", "-D", folder / "data"]
        subprocess.run([*control, "-w", "-o", options, "-l", folder / "log", "start"], **quiet)  # type: ignore[call-overload]
        yield f"postgresql://{user}@127.0.0.1:{port}/postgres"
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet)  # type: ignore[call-overload]
    finally:
        subprocess.run([*prefix, "rm", "-rf", folder], check=False)


@pytest.mark.slow
def test_four_commands_share_a_grid_and_one_is_killed(database: str, plan: Callable[..., Plan]) -> None:
    import pickle

    one = plan({"lr": [0.01, 0.02, 0.03, 0.05], "gamma": [0.1, 0.5, 1]}, storage=database, heartbeat=1)
    one.folder.mkdir(parents=True)
    words = [sys.executable, "-c", COMMAND, pickle.dumps(one).hex()]
    commands = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    victim = commands[0]
    assert victim.stdout is not None
    for line in victim.stdout:  # until it is in the middle of a trial
        if line.startswith("{'epoch': 1"):
            break
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 240
    assert [command.wait(max(1, deadline - time.monotonic())) for command in commands[1:]] == [0, 0, 0]
    for command in commands:
        assert command.stdout is not None
        command.stdout.close()

    found = queue.open_study(one)
    entries = queue.results(one, found)
    assert len(entries) == 12 and {entry["epochs"] for entry in entries} == {2}
    complete = [
        t for t in found.trials if t.state == optuna.trial.TrialState.COMPLETE and "same_as" not in t.user_attrs
    ]
    assert set(Counter(trial.user_attrs["run"] for trial in complete).values()) == {1}
    assert any(trial.system_attrs.get("retry_history") for trial in found.trials)
