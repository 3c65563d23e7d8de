"""Folders that are another user's or read-only, and odd environments and names: it works, or there is one sentence."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from faults.bench import SMALL, Bench, Case, answer_of
from faults.disk import arm
from faults.process import Changes, Ended, Fresh, Process, command, module

NOBODY = 12345  # a user that no list of users has
FEW = 10  # below so many cases, those that start interpreters of their own are left out
EPOCHS = ["--epochs", "2", "--no-fast-kernels"]
TRAIN = ["train", *SMALL, *EPOCHS, "--data", "d", "--exp"]
VERBS = {
    "train": [*TRAIN, "new"],
    "train --resume": [*TRAIN, "a", "--resume"],
    "train --overwrite": [*TRAIN, "a", "--overwrite"],
    "evaluate": ["evaluate", "a", "--data", "d"],
    "evaluate --as-test": ["evaluate", "a", "--data", "d", "--as-test"],
    "predict": ["predict", "a", "d"],
    "predict --out": ["predict", "a", "d", "--out", "labels.csv"],
    "predict --into": ["predict", "a", "d", "--into", "sorted"],
    "card": ["card", "a", "--overwrite"],
    "explain": ["explain", "a", "d", "--out", "explained"],
    "embed": ["embed", "a", "d", "--out", "features.npz"],
    "export": ["export", "a"],
    "ensemble": ["ensemble", "a", "b", "--data", "d"],
    "compare": ["compare", "a", "b"],
    "report": ["report", "a", "--data", "d", "--no-explain"],
    "study": ["study", "--exp", "st", "--models", "timm:test_efficientnet", "--arms", "scratch", "--data", "d",
              "--scratch-recipe", "original", "--size", "32", "--seeds", "1", *EPOCHS],
    "search": ["search", *SMALL, *EPOCHS, "--data", "d", "--exp", "s", "--grid", "lr=0.01,0.02"],
    "lr-find": ["lr-find", *SMALL, *EPOCHS, "--exp", "l", "--data", "d", "--steps", "5"],
    "data verify": ["data", "verify", "--data", "d"],
    "data show": ["data", "show", "--data", "d"],
    "cache clear": ["cache", "clear"],
    "recipes": ["recipes"],
}  # fmt: skip
USUAL = [[*TRAIN, "new"], ["evaluate", "new", "--data", "d"], ["predict", "new", "d"]]


@dataclass(frozen=True)
class Odd:
    """An odd environment: what is changed before the commands run, in their process or in their folder."""

    name: str
    environment: Changes = field(default_factory=dict)
    setup: Callable[[], object] = lambda: None
    """Called in the process of the commands."""
    commands: tuple[list[str], ...] = tuple(USUAL)
    prepare: Callable[[Path], None] = lambda folder: None
    """Called with the folder of the commands before."""
    fresh: bool = False
    """Whether the interpreter itself must see the change."""
    same: bool = True
    """Whether the numbers are those of the usual environment where the commands succeed."""


def folders(count: int, bench: Bench) -> Iterator[Case]:
    """22 commands in two kinds of folders of another user, and 57 odd environments and names, in any order."""
    home = _home(bench)
    usual = _here(bench, home, Odd("usual"))
    if isinstance(usual, str):
        raise RuntimeError(usual)
    odd = [*_odd_environments(), *_odd_names()]
    foreign = [_foreign(verb, words, hidden) for hidden in (False, True) for verb, words in VERBS.items()]
    cases = [*foreign, *odd]
    if count < FEW:
        cases = [case for case in cases if not (case.fresh or case.name.startswith(("study", "search")))]
    bench.rng.shuffle(cases)
    for case in [cases[i % len(cases)] for i in range(count)]:
        result = _here(bench, home, case)
        if isinstance(result, str):
            yield case.name, result
            continue
        ended, folder = result
        fault = ""
        if case.same and ended.code == 0 and (folder / "runs/new/test.json").is_file():
            fault = answer_of(usual[1] / "runs/new").difference(answer_of(folder / "runs/new"))
        bench.notes["worked" if ended.code == 0 else "one sentence"] += 1
        yield case.name, fault
        if not fault:
            shutil.rmtree(folder.parent, ignore_errors=True)


def _home(bench: Bench) -> Path:
    """A folder with images d and the tested runs a and b, of which every case gets a copy."""
    home = bench.new_folder("home")
    shutil.copytree(bench.data, home / "d")
    words = [[*TRAIN, "a"], ["evaluate", "a", "--data", "d"], [*TRAIN, "b", "--seed", "1"]]
    ended = Process(command(*words, ["evaluate", "b", "--data", "d"]), cwd=home).wait()
    if ended.code:
        raise RuntimeError(f"the runs could not be made: {ended.err[-2000:]}")
    return home


def _here(bench: Bench, home: Path, odd: Odd) -> tuple[Ended, Path] | str:
    """The commands of ``odd`` in a copy of ``home``: how they ended, and where; or what is wrong with that."""
    above = bench.new_folder("odd")
    folder = above / "here"
    shutil.copytree(home, folder, symlinks=True)
    bench.cache(above)
    odd.prepare(folder)
    environment = {"FINETUNE101_CACHE": str(above / "cache"), **odd.environment}

    def call() -> int:
        odd.setup()
        return command(*odd.commands)()

    if odd.fresh:
        process: Process = Fresh(module(*odd.commands[0]), environment, folder)
    else:
        process = Process(call, environment, folder)
    ended = process.wait()
    return ended.fault() or (ended, folder)


def _foreign(verb: str, words: list[str], hidden: bool) -> Odd:
    """``verb`` by another user (where this is root), in a folder that it may not write, or not even read."""

    def prepare(folder: Path) -> None:
        for path in (folder, *folder.rglob("*")):
            if os.geteuid() == 0:
                os.chown(path, NOBODY, NOBODY)
            else:
                path.chmod(0o555)
        if hidden:
            for name in ("runs/a", "d"):
                (folder / name).chmod(0o700 if os.geteuid() == 0 else 0)

    def setup() -> None:
        if os.geteuid() == 0:
            _without_rights()

    name = f"{verb} in a {'hidden' if hidden else 'read-only'} folder of another user"
    return Odd(name, {"HOME": "/nonexistent"}, setup, (words,), prepare, same=False)


def _without_rights() -> None:
    """Takes from this process what root may do beyond other users: it stays root, which owns Python's files."""
    words = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable rights, twice 32
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if ctypes.CDLL(None, use_errno=True).capset(head, words):
        raise OSError(ctypes.get_errno(), "capset")


def _odd_environments() -> list[Odd]:
    clock = ctypes.CDLL(None)
    day = 86400
    cases = [Odd(f"HOME is {home!r}", {"HOME": home, "FINETUNE101_CACHE": None}) for home in
             ("/nonexistent", "/proc", "", "relative")]  # fmt: skip
    if all(folder.stat().st_mode & 1 for folder in Path(os.__file__).parents):  # others can read Python's own files
        cases.append(Odd("a user without home and entry", {"HOME": None, "FINETUNE101_CACHE": None}, _be_nobody))
    for cache in ("", "relative", "~nouser/x", "d", "a_file", "a_file/below", "/proc"):
        cases.append(Odd(f"the cache is {cache!r}", {"FINETUNE101_CACHE": cache}, prepare=_a_file))
    cases += [Odd(f"TMPDIR is {name}", {"TMPDIR": name}, prepare=_a_file) for name in ("/nonexistent", "a_file")]
    cases += [Odd(f"umask {mask:03o}", setup=partial(os.umask, mask)) for mask in (0, 0o077, 0o777)]
    cases += [
        Odd(f"the clock {words}", setup=partial(clock.fault_clock, ctypes.c_long(seconds)))
        for words, seconds in (("30 days back", -30 * day), ("20 years ahead", 7300 * day), ("in 1970", -20500 * day))
    ]
    cases += [
        Odd("PATH is empty", {"PATH": ""}, same=False),
        Odd("the locale is C", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, fresh=True),
        Odd("no threads", {"OMP_NUM_THREADS": "0"}, fresh=True),
        Odd("WORLD_SIZE is no number", {"WORLD_SIZE": "abc"}),
        Odd("RANK without WORLD_SIZE", {"RANK": "x"}),
        Odd("standard output is full", setup=lambda: _stream(1, "/dev/full")),
        Odd("standard error is full", setup=lambda: _stream(2, "/dev/full")),
        Odd("standard output is closed", setup=_closed),
        Odd("the reader has gone", setup=_no_reader),
        Odd("few open files", setup=_few_files, same=False),
        Odd("little room for files", setup=_small_files, same=False),
        Odd("a full disk from the first call on", setup=lambda: arm(Path.cwd(), 1)),
    ]
    return cases


def _odd_names() -> list[Odd]:
    classes = {"emoji": "🦊 ё 猫", "not UTF-8": "caf\udce9", "a line": "two\nlines", "commas": 'a,"b";c',
               "dots": "...a", "a formula": "=1+1", "markup": "<b>&amp;", "255 bytes": "n" * 255}  # fmt: skip
    cases = [Odd(f"a class is named by {what}", prepare=_renamed_class(name), same=False)
             for what, name in classes.items()]  # fmt: skip
    for what, name in {**classes, "255 bytes": "n" * 251}.items():
        cases.append(Odd(f"an image is named by {what}", prepare=_renamed_image(f"{name}.jpg"), same=False))
    for exp in ("🦊", "x" * 200, "x" * 256, "a b", "../x", "-", "con", "a/b/c/d"):
        words = [[*TRAIN, exp], ["evaluate", f"runs/{exp}", "--data", "d"]]
        cases.append(Odd(f"--exp {exp[:20]} ({len(exp.encode())} bytes)", commands=tuple(words), same=False))
    deep = "/".join(["y" * 250] * 15)
    cases.append(Odd("a path of 3,765 bytes", commands=([*TRAIN, "new", "--runs", deep],), same=False))
    return cases


def _be_nobody() -> None:
    if os.geteuid() == 0:
        for folder in (".", "runs"):
            os.chmod(folder, 0o777)
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _a_file(folder: Path) -> None:
    (folder / "a_file").write_text("x")


def _stream(number: int, name: str) -> None:
    opened = os.open(name, os.O_WRONLY)
    os.dup2(opened, number)
    os.close(opened)


def _closed() -> None:
    sys.stdout.close()
    sys.stdout = None  # as Python has it
    os.close(1)


def _no_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def _few_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))


def _small_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def _renamed_class(name: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        with contextlib.suppress(OSError):  # a file system that allows no such name
            os.rename(min((folder / "d").iterdir()), folder / "d" / name)

    return prepare


def _renamed_image(name: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        image = min((folder / "d").glob("*/*"))
        with contextlib.suppress(OSError):
            os.rename(image, image.with_name(name))

    return prepare
