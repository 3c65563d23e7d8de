"""Files are written whole, claimed by one process and read by their types; caches have a place; cores are counted."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import filelock
import msgspec
import pytest

from finetune101 import host
from finetune101.errors import Refused, escaped, must_be, shown
from finetune101.files import (
    FORMAT,
    as_json,
    atomic,
    cache_dir,
    claim,
    claimed_by,
    parse_json,
    process_space,
    read_json,
    read_settings,
    remove_abandoned,
    write_json,
)

POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes, signals and file names")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# written


@POSIX
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_new_file_has_the_mode_of_any_other(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "other").write_text("")
        with atomic(tmp_path / "file") as part:
            part.unlink()  # as a library that writes through a private file of its own
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "other")]
    assert modes[0] == modes[1] == 0o666 & ~umask


def test_writers_with_one_process_id_do_not_meet(tmp_path: Path) -> None:
    """Containers that share a folder have the same host name and ids."""
    with atomic(tmp_path / "file") as one, atomic(tmp_path / "file") as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "file").read_text() == "one" and names(tmp_path) == ["file"]


@POSIX
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        write_json(tmp_path / "file.json", [1])
        with pytest.raises(Refused, match="free some space"):
            write_json(tmp_path / "file.json", list(range(100_000)))
        assert read_json(tmp_path / "file.json", remedy="") == [1] and names(tmp_path) == ["file.json"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@POSIX
def test_only_what_nobody_writes_any_more_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, old = process_space(), time.time() - 2 * 86400
    kept = [f".a.{here}.{os.getpid()}.00000000.part", ".a.b.elsewhere.1.00000000.part", "a.part", ".hidden"]
    removed = [f".a.{here}.{gone.pid}.00000000.part", ".x.elsewhere.1.00000000.part", ".old.part"]
    for name in kept + removed:
        (tmp_path / name).write_text("")
    for name in removed[1:]:
        os.utime(tmp_path / name, (old, old))
    remove_abandoned(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_names_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    value = {"a\udcff.jpg": ["\udc80", "ü", "\n"]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", remedy="") == {"format": FORMAT, **value}
    assert json.loads(as_json(value).encode()) == value
    assert escaped("a\udcff\x1b[1m\u202e") == "a\\xff\\x1b[1m\\u202e" and escaped("lauf ü") == "lauf ü"


# claimed


def _hold(lock: Path, said: Any, stay: Any) -> None:
    with claim(lock) as ours:
        said.put(ours)
        stay.wait(60)


@pytest.mark.parametrize("locks", [True, False], ids=["of the system", "a file"])
def test_one_process_holds_a_claim(tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not locks:  # as on a file system without them

        def refuse(self: Any, *_: Any, **__: Any) -> None:
            raise NotImplementedError

        monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    lock = tmp_path / "a" / "lock"
    with claim(lock) as first, claim(lock) as second:
        assert (first, second) == (True, False) and str(os.getpid()) in claimed_by(lock)
    with claim(lock) as again:
        assert again
    assert claimed_by(lock) == "another process"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no files from anybody, not even from root")
def test_where_no_lock_can_be_made_nobody_waits_for_it() -> None:
    with pytest.raises(OSError), claim(Path("/proc/lock")):
        raise AssertionError("it cannot be claimed")


@POSIX
@pytest.mark.slow
def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    said, stay = context.Queue(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "lock", said, stay))
    process.start()
    assert said.get(timeout=60)
    with claim(tmp_path / "lock") as ours:
        assert not ours and str(process.pid) in claimed_by(tmp_path / "lock")
    process.kill()
    process.join()
    with claim(tmp_path / "lock") as ours:
        assert ours


# places


@POSIX
def test_caches_have_a_place_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody(*_: Any) -> Any:
        raise KeyError("no such user")

    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("FINETUNE101_CACHE", "~nobody_of_this_name/x")
    with pytest.raises(Refused, match="FINETUNE101_CACHE"):
        cache_dir()
    monkeypatch.delenv("FINETUNE101_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert cache_dir().is_dir() and cache_dir() == cache_dir()
    assert stat.S_IMODE(cache_dir().stat().st_mode) == 0o700


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A process that may use 16 cores of a machine, in a cgroup whose folder is ``tmp_path``."""
    for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    yield monkeypatch


@pytest.mark.parametrize(
    ("name", "value", "count"),
    [
        ("SLURM_CPUS_PER_TASK", "4", 4), ("SLURM_CPUS_PER_TASK", "64", 16), ("OMP_NUM_THREADS", "2", 2),
        ("OMP_NUM_THREADS", "3,2", 3), ("OMP_NUM_THREADS", "0", 16), ("OMP_NUM_THREADS", "many", 16),
        ("OMP_NUM_THREADS", "", 16), ("OMP_NUM_THREADS", "²", 16),
    ],
)  # fmt: skip
def test_the_environment_limits_cores(cores: pytest.MonkeyPatch, name: str, value: str, count: int) -> None:
    cores.setenv(name, value)
    assert host.usable_cores() == count


@pytest.mark.parametrize(
    ("file", "text", "count"),
    [
        ("cpu.max", "max 100000\n", 16), ("cpu.max", "250000 100000\n", 3), ("cpu.max", "10000 100000\n", 1),
        ("cpu.max", "damaged", 16), ("cpu.max", "", 16), ("cpu.max", "100 0", 16),
        ("cpu/cpu.cfs_quota_us", "-1\n", 16), ("cpu/cpu.cfs_quota_us", "200000\n", 2),
    ],
)  # fmt: skip
def test_the_quota_of_a_cgroup_limits_cores(
    cores: pytest.MonkeyPatch, tmp_path: Path, file: str, text: str, count: int
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    (tmp_path / "cpu.cfs_period_us").write_text("")
    if file.startswith("cpu/"):
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert host.usable_cores() == count


# read


class Inner(TypedDict):
    n: Annotated[int, msgspec.Meta(ge=1)]
    word: NotRequired[str]


class Outer(TypedDict):
    many: dict[str, Inner]
    pair: Annotated[list[float], msgspec.Meta(min_length=2, max_length=2)]


GOOD: dict[str, Any] = {"many": {"a": {"n": 1}, "b": {"n": 2, "word": "x"}}, "pair": [1, 2.5], "more": None}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([], "is not a table"),
        ({**GOOD, "many": {**GOOD["many"], "b": {"n": 0}}}, "many.b.n = 0, not a whole number of at least 1"),
        ({**GOOD, "many": {**GOOD["many"], "b": {}}}, "lacks many.b.n"),
        ({**GOOD, "many": {**GOOD["many"], "b": {"n": 1, "word": 2}}}, "many.b.word = 2, not text"),
        ({**GOOD, "pair": [1]}, r"pair = \[1\], not a list of 2 values"),
        ({**GOOD, "pair": [1, "\ud800"]}, r"pair.1 = '\\ud800', not a number"),
        ({**GOOD, "pair": [1, True]}, "pair.1 = True, not a number"),
        ({**GOOD, "format": 99}, "format 99.* newer version"),
        ({**GOOD, "format": "1"}, "format"),
        ({**GOOD, "format": True}, "format"),
        ({**GOOD, "\ud800": 1}, "not Unicode"),
    ],
)
def test_the_place_of_a_fault_is_named(tmp_path: Path, bad: Any, said: str) -> None:
    (tmp_path / "x.json").write_text(as_json(bad))
    with pytest.raises(Refused, match=rf"x\.json.*{said}") as refusal:
        read_json(tmp_path / "x.json", Outer, remedy="make it anew")
    assert "\n" not in str(refusal.value)


def test_what_is_right_is_returned_as_it_is(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {**GOOD, "format": 1})
    value = read_json(tmp_path / "x.json", Outer, remedy="")
    assert value == {**GOOD, "format": 1} and isinstance(value["pair"][0], int)
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + as_json(GOOD).encode())
    assert read_json(tmp_path / "x.json", Outer, remedy="") == GOOD


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}', "NaN", "[Infinity]", "[1e999]", "[" * 51 + "]" * 51, "[" * 10**6,
        '{"a":' * 60 + "1" + "}" * 60, "1" * 5000, "", '"\x00"', "[1,]", "{'a': 1}",
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(Refused, match=r"^the file .*; mend it$"):
        parse_json(text, "the file", "mend it")


def test_nesting_up_to_the_limit_is_read() -> None:
    for value in (json.loads("[" * 50 + "]" * 50), {"a": [{}]}, 1, None):
        assert parse_json(json.dumps(value), "the file", "") == value


@POSIX
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json", "none.json", "a" * 300 + ".json", "\0.json"):
        for read in (lambda file: read_json(file, remedy="look for it"), read_settings):
            with pytest.raises(Refused, match="json"):
                read(tmp_path / name)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]" + " " * 2000)
    with pytest.raises(Refused, match="has more than 1 KB"):
        read_json(tmp_path / "x.json", remedy="make it anew", most=2**10)


def test_words_of_types_and_values() -> None:
    assert must_be(int | None) == "a whole number, or none"
    assert must_be(tuple[float, float, float]) == "a list of 3 values in which each is a number"
    assert shown(10**5000) == "a very long number" and len(shown(["x" * 10**6] * 10**6)) < 500
    deep: Any = []
    for _ in range(10**5):
        deep = [deep]
    assert len(shown(deep)) < 50


# settings


def settings_in(folder: Path, text: str, suffix: str = ".yaml") -> dict[str, Any]:
    (folder / f"x{suffix}").write_bytes(text.encode())
    return read_settings(folder / f"x{suffix}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"), ("on", "on"), ("no", "no"), ("true", True), ("False", False), ("~", None), ("", None),
        ("null", None), ("1e-3", 0.001), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-3", -3), ("+3", 3), ("017", 17.0),
        ("0o17", "0o17"), ("0x1F", "0x1F"), ("1_000", "1_000"), ("1:30", "1:30"), ("2001-01-01", "2001-01-01"),
        ("'1'", "1"), ("1e-4..1e-1:log", "1e-4..1e-1:log"), ("[1, a]", [1, "a"]), ("{b: {c: 1}}", {"b": {"c": 1}}),
        ("=", "="), ("1.2.3", "1.2.3"), ("e5", "e5"), (".", "."), ("-", ["x"]),
    ],
)  # fmt: skip
def test_yaml_has_no_traps(tmp_path: Path, text: str, value: Any) -> None:
    text = "\n- x" if text == "-" else f" {text}"
    assert settings_in(tmp_path, f"a:{text}\r\n") == {"a": value}


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2", "a: &x 1\nb: *x", "a: !!int ''", "a: !!timestamp abc", "a: !!python/object:os.system x",
        "a: !x 1", "\ta: 1", "a: [1", "a: 1\n---\nb: 2", "a: \0", "[1]: 2", "1: 2", "[1]", "text", "", "#",
        "a: " + "[" * 60 + "]" * 60, "a: " + "[" * 9_000, "a: " + "9" * 5000, "format: 99", "format: x",
        "a: " + "x" * 2**17,
    ],
)  # fmt: skip
def test_what_is_no_plain_yaml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(Refused, match=r"x\.yaml ") as refusal:
        settings_in(tmp_path, text)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


@pytest.mark.parametrize("text", ["a." * 60_000 + "b = 1", "[" + "a." * 60_000 + "b]", "a = " + "[" * 60_000])
def test_deep_toml_is_refused_at_once(tmp_path: Path, text: str) -> None:
    with pytest.raises(Refused, match="nested"):
        settings_in(tmp_path, text, ".toml")


def test_aliases_do_not_fill_the_memory(tmp_path: Path) -> None:
    rows = ["&a0 [x, x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))]
    with pytest.raises(Refused, match="alias"):
        settings_in(tmp_path, f"lr: [[{', '.join(rows)}]]")


def test_settings_in_each_language(tmp_path: Path) -> None:
    assert settings_in(tmp_path, "format = 1\n[a]\nb = 1e-3\n", ".toml") == {"a": {"b": 0.001}}
    assert settings_in(tmp_path, '\ufeff{"format": 1, "a": {"b": 1e-3}}', ".json") == {"a": {"b": 0.001}}
    assert settings_in(tmp_path, "\ufeffformat: 1\na: {b: 1e-3}", ".YML") == {"a": {"b": 0.001}}
    for suffix, text in ((".toml", "a = 1\na = 2"), (".json", '{"a": 1, "a": 2}'), (".txt", "a: 1"), ("", "a: 1")):
        with pytest.raises(Refused):
            settings_in(tmp_path, text, suffix)
    (tmp_path / "y.yaml").write_bytes("a: 1".encode("utf-16"))
    with pytest.raises(Refused, match="UTF-8"):
        read_settings(tmp_path / "y.yaml")


def test_a_lock_that_may_not_be_opened_is_no_free_lock(tmp_path: Path) -> None:
    lock = tmp_path / "train.lock"
    lock.mkdir()  # cannot be opened as a file, whoever asks
    with pytest.raises(OSError), claim(lock):
        pass
    assert not (tmp_path / "train.lock.soft").exists()
