"""Standard streams, signals, exit codes and secrets: what a terminal, a full disk or a kill does to a command."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune101 import redaction
from finetune101.cli.console import Terminated, guarded, watched
from finetune101.cli.main import main
from finetune101.errors import Refused
from finetune101.run import Run

TINY = "--no-pretrain --model squeezenet1_1 --size 32 --batch-size 8 --threads 1 --epochs 1".split()  # noqa: SIM905
START = [sys.executable, "-m", "finetune101"]


def raising(error: BaseException) -> Callable[[], int]:
    def call() -> int:
        raise error

    return call


# errors


@pytest.mark.parametrize(
    ("error", "tokens"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), ["No space left", "runs/x", "free some space"]),
        (PermissionError(errno.EACCES, "Permission denied", "a folder"), ["Permission denied", "a folder"]),
        (OSError(errno.EROFS, "Read-only file system", b"x"), ["Read-only", "x"]),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), ["shorter name"]),
        (OSError(errno.EIO, "Input/output error"), ["Input/output error"]),
        (MemoryError(), ["memory", "--batch-size"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), ["memory"]),
        (RuntimeError("Could not determine home directory."), ["~"]),
        (Refused("not this\nbut that"), ["not this but that"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_user_can_mend_is_one_sentence(
    error: BaseException, tokens: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(raising(error)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(token in said for token in ["error:", *tokens]) and len(said) < 400


@pytest.mark.parametrize(
    "error",
    [
        ValueError("zip() argument 2 is longer than argument 1"),
        RecursionError("maximum recursion depth exceeded"),
        ProcessLookupError(errno.ESRCH, "No such process"),
        OSError("an error without a number"),
        KeyError("gpu"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_our_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        guarded(raising(error))


def test_a_missing_file_is_one_sentence_and_its_traceback_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    assert guarded(raising(FileNotFoundError(errno.ENOENT, "No such file or directory", "x"))) == 2
    said, log = capsys.readouterr().err, tmp_path / "cache" / "error.log"
    assert "still there" in said and str(log) in said and said.count("\n") == 1
    assert "Traceback" in log.read_text() and "raise error" in log.read_text()
    assert guarded(raising(OSError(errno.ENOSPC, "No space left on device", "x"))) == 2
    assert "error.log" not in capsys.readouterr().err

    def in_a_run() -> int:
        with watched(tmp_path):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", "y")

    assert guarded(in_a_run) == 2
    assert str(tmp_path / "error.log") in capsys.readouterr().err


def test_a_bug_in_a_run_is_logged_beside_it(tmp_path: Path) -> None:
    bug = ZeroDivisionError("of postgresql://me:hunter22@db/x")
    with pytest.raises(ZeroDivisionError) as caught, watched(tmp_path):
        raise bug
    log = (tmp_path / "error.log").read_text()
    assert "Traceback" in log and "ZeroDivisionError" in log and "raise bug" in log and "hunter22" not in log
    assert any("error.log" in note for note in caught.value.__notes__)
    with pytest.raises(ZeroDivisionError), watched(tmp_path / "missing"):
        raise bug
    assert not (tmp_path / "missing").exists()
    with pytest.raises(Refused), watched(tmp_path):
        raise Refused("the user's")
    assert (tmp_path / "error.log").read_text() == log


# secrets

SECRETS = {
    "url": ["--database", "postgresql://me:hunter22@db/x"],
    "url with =": ["--database=postgresql://me:hunter22@db/x"],
    "odd password": ["--database", "postgresql://me:hunter22@/1@db/x?sslmode=require"],
    "query": ["--database", "postgresql://db/x?user=me&password=hunter22"],
    "dsn": ["--database", "host=db user=me password=hunter22"],
    "mistyped": ["--databas", "postgresql://me:hunter22@db/x"],
    "elsewhere": ["--weights", "https://me:hunter22@host/weights.pth"],
    "named": ["--config", "password=hunter22"],
    "flag": ["--hub-token", "hunter22"],
    "token": ["--data", "hf_hunter22hunter22hunter22"],
}


@pytest.mark.parametrize("name", SECRETS)
def test_no_command_keeps_its_secret(name: str) -> None:
    argv = ["/bin/finetune101", "search", "--exp", "my run", *SECRETS[name]]
    kept = redaction.command_line(argv)
    assert "hunter22" not in kept and "***" in kept.replace("db/x", "***")
    assert kept.replace("'--", "--").startswith("finetune101 search --exp 'my run' --")


def test_commands_without_secrets_stay_as_they_are() -> None:
    words = ["train", "--exp", "token test", "--data", "my passwords/photos", "--lr", "0.01", "--grid", "lr=1e-3,1"]
    assert redaction.command_line(["finetune101", *words]).startswith(
        "finetune101 train --exp 'token test' --data 'my pass"
    )
    assert redaction.command_line(["x/__main__.py", "recipes"]) == "python -m finetune101 recipes"


def test_messages_hide_secrets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune101", "search", "--database", "postgresql://me:p%40hunter22@db/x"])
    monkeypatch.setenv("PGPASSWORD", "swordfish")
    for text in ("login of me with p@hunter22", "postgresql://me:other@db/y", "the word swordfish", "p%40hunter22"):
        assert guarded(raising(Refused(text))) == 2
        said = capsys.readouterr().err
        assert "***" in said and not any(word in said for word in ("hunter22", "other", "swordfish"))
    assert main(["search", "--databas=postgresql://me:hunter22@db/x"]) == 2
    assert "hunter22" not in capsys.readouterr().err


def test_a_long_secret_of_the_environment_is_hidden_as_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "t0ken" * 100)  # longer than the name of a file may be
    assert main(["evaluate", "nosuchrun"]) == 2
    assert "t0ken" not in capsys.readouterr().err
    assert "t0ken" not in redaction.redacted("login " + "t0ken" * 100)


@pytest.mark.parametrize("url", ["u:hunter22@h/db", "postgresql:u:hunter22@h/db", "postgresql://u:hunter22@h/db"])
def test_a_flag_that_is_none_is_told_without_its_value(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--exp", "s", *TINY, "--grid", "lr=0.01", "--database", url]) == 2
    assert "hunter22" not in "".join(capsys.readouterr())


def test_no_file_of_a_run_a_search_or_a_page_holds_the_password(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PGPASSWORD", "swordfish")
    url = "postgresql://me:hunter22@db/x"
    monkeypatch.setattr(sys, "argv", ["finetune101", "search", "--database", url, "--weights", "swordfish.pth"])
    words = ["--data", str(tiny_data), *TINY]
    assert main(["search", "--exp", "s", *words, "--grid", "lr=0.01,0.02"]) == 0
    assert main(["search", "report", "runs/s"]) == 0
    assert main(["train", "--exp", "x", *words]) == 0
    assert main(["evaluate", "x"]) == 0 and main(["report", "x", "--no-gallery"]) == 0
    streams = capsys.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for secret in ("hunter22", "swordfish"):
        assert secret not in streams.out + streams.err
        assert len(files) > 20 and not [path for path in files if secret.encode() in path.read_bytes()]
    for file in (tmp_path / "runs").rglob("env.json"):  # those of the search's workers as well
        assert "postgresql://***@db/x" in json.loads(file.read_text())["command"]


# streams


class Full(io.StringIO):
    """A stream on a full disk."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.EPIPE, 0)])
def test_work_goes_on_without_standard_output(
    number: int, code: int, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdout", Full(number))
    words = ["train", "--exp", "x", "--runs", str(tmp_path), "--data", str(tiny_data), *TINY]
    assert main([*words, "--epochs", "2"]) == code
    assert len(Run(tmp_path / "x").metrics()) == 2
    assert ("No space left" in capsys.readouterr().err) == (code == 2)
    assert main(["recipes"]) == code


def test_closed_streams_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, None)
            assert main(["recipes"]) == 0 and main(["evaluate"]) == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_loses_no_name(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    told = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setattr(sys, "stderr", told)

    def call() -> int:
        for _ in range(3):
            print("猫 and \x1b[31m and caf\udce9")
        return 0

    assert guarded(call) == 0
    text = written.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert text.splitlines() == [r"\u732b and \x1b[31m and caf\xe9"] * 3
    assert told.buffer.getvalue().count(b"note:") == 1  # type: ignore[attr-defined]


def test_a_reader_that_closes_early_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m finetune101 recipes"
    script = f"set -o pipefail; {command} | true && {command} >&- && {command} 2>&- | grep -q original; echo $?"
    script += f"; {command} > /dev/full; echo $?"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["0", "2"] and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def on_a_terminal(words: list[str], **env: str) -> str:
    """What ``words`` print on a terminal, as standard output and error."""
    child, terminal = pty.fork()
    if not child:
        os.environ.update(env, TERM="xterm-256color")
        os.execv(sys.executable, [*START, *words])
    text = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        text += part
    os.waitpid(child, 0)
    os.close(terminal)
    return text.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="terminals of other systems end in other ways")
@pytest.mark.parametrize("words", [["train", "--exp", "x", "--lr", "0,01"], ["train", "--exp", "x", "--device", "gpu"]])
def test_a_mistake_on_a_terminal_is_one_plain_sentence(words: list[str], tmp_path: Path) -> None:
    for env in ({}, {"PYTHONIOENCODING": "ascii"}):
        said = on_a_terminal(words, **env).splitlines()
        assert len(said) == 1 and said[0].startswith("error: ") and "\x1b" not in said[0] and words[-2] in said[0]


# signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_training_says_what_goes_on(number: int, code: int, tiny_data: Path, tmp_path: Path) -> None:
    words = ["train", "--exp", "my run", "--data", str(tiny_data), *TINY[:-1], "5000"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    try:
        process = subprocess.Popen(
            [*START, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    metrics = tmp_path / "runs" / "my run" / "metrics.jsonl"
    while not metrics.is_file() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1].splitlines()[-1]
    assert process.returncode == code and "finetune101 train --exp 'my run' --resume" in said
    assert re.search(r"stands at epoch \d+ of 5000", said)


def test_stopped_before_it_began_there_is_nothing_to_resume(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetune101.api.prepare", raising_from_prepare)
    assert main(["train", "--exp", "x", "--data", str(tiny_data), *TINY]) == 130
    said = capsys.readouterr().err
    assert "nothing of it was begun" in said and "--resume" not in said


def raising_from_prepare(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "values",
    [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "-1"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "x"},
     {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}],
)  # fmt: skip
def test_variables_of_torchrun_are_checked(
    values: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for verb in (["train", "--exp", "x"], ["recipes"]):
        assert main(verb) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "torchrun" in said


@pytest.mark.parametrize("name", ["x" * 200_000, "a_" * 100_000, "a://" * 50_000])
def test_a_name_of_a_damaged_file_is_told_at_once_and_shortened(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.process_time()
    assert guarded(raising(Refused(f"the split manifest has {name}"))) == 2
    assert time.process_time() - started < 2
    assert len(capsys.readouterr().err) < 4000


def test_a_password_in_a_long_address_is_hidden() -> None:
    assert redaction.redacted("x" * 100 + "postgresql://me:hunter22@db/x").endswith("postgresql://***@db/x")


@pytest.mark.parametrize("rank", ["0", "1", "2"])
def test_of_several_processes_two_tell_that_they_were_terminated(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one may be the one that was killed, whereupon torchrun terminates the others; Ctrl-C reaches it."""
    monkeypatch.setenv("RANK", rank)
    assert guarded(raising(Terminated()), verb="train") == 143
    assert ("terminated; give the command again, with --resume" in capsys.readouterr().err) == (rank != "2")
    assert guarded(raising(KeyboardInterrupt())) == 130
    assert ("interrupted" in capsys.readouterr().err) == (rank == "0")
