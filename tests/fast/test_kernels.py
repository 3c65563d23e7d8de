"""The compiled kernels: built once, loaded only where nobody else could have written them, given up in a sentence."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune101.fast import kernels

pytestmark = pytest.mark.skipif(kernels.compiled() is None, reason="needs Linux and gcc")


@pytest.fixture
def library() -> Path:
    """The file of the suite's own cache."""
    libraries = kernels._own_folder().glob("kernels_*.so")  # type: ignore[union-attr]
    file = max(libraries, key=lambda library: library.stat().st_mtime)  # others are of earlier versions
    return file


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder; what was loaded before comes back afterwards."""
    loaded = kernels.compiled()
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    kernels.compiled.cache_clear()
    yield tmp_path / "cache"
    kernels.compiled.cache_clear()
    monkeypatch.undo()
    assert loaded is not None


def gcc(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that does ``body``, the first one in PATH."""
    folder.mkdir()
    (folder / "gcc").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_only_this_user_can_write_what_is_loaded(library: Path) -> None:
    for path in (library, library.parent):
        assert path.stat().st_uid == os.geteuid() and not stat.S_IMODE(path.stat().st_mode) & 0o077


@pytest.mark.parametrize("kind", ["writable by others", "of another user", "a link", "cut", "empty", "changed", "good"])
def test_a_library_that_is_not_trusted_or_not_whole(library: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "kernels.so"
    if kind == "a link":
        file.symlink_to(library)
    else:
        shutil.copyfile(library, file)
        file.chmod(0o666 if kind == "writable by others" else 0o600)
    content = file.read_bytes()
    if kind == "of another user":
        if os.geteuid() != 0:
            pytest.skip("needs root")
        os.chown(file, 12345, 12345)
    if kind in ("cut", "empty", "changed"):
        file.write_bytes({"cut": content[:5000], "empty": b"", "changed": b"x" + content[1:]}[kind])
    if kind == "good":
        assert kernels._load(file).moments_fp32.argtypes
        return
    with pytest.raises(OSError):
        kernels._load(file)


def test_a_cache_folder_of_all_users_is_not_used(fresh: Path) -> None:
    before = os.umask(0)
    try:
        folder = kernels._own_folder()
    finally:
        os.umask(before)
    assert folder is not None and stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.is_relative_to(fresh)
    folder.chmod(0o777)
    assert kernels._own_folder() is None
    folder.rmdir()
    (fresh / "elsewhere").mkdir()
    folder.symlink_to(fresh / "elsewhere")
    assert kernels._own_folder() is None


@pytest.mark.slow
def test_what_others_planted_or_damaged_is_built_anew(library: Path, fresh: Path) -> None:
    folder = kernels._own_folder()
    assert folder is not None
    planted = folder / library.name
    planted.write_bytes(b"planted")
    planted.chmod(0o666)
    assert kernels.compiled() is not None
    assert planted.read_bytes() == library.read_bytes() and stat.S_IMODE(planted.stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == [library.name]


def test_a_compiler_that_fails_is_quoted(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = 'case "$*" in *--help=target*) exit 0;; esac\necho "note: x" >&2\necho "error: no licence left" >&2\nexit 3'
    gcc(tmp_path / "bin", body, monkeypatch)
    assert kernels.compiled() is None
    said = capsys.readouterr().err
    assert "no licence left" in said and len(said.splitlines()) == 1
    assert not list(fresh.rglob("*.so")) and not list(fresh.rglob("*.part"))


def test_a_compiler_that_hangs_is_given_up(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gcc(tmp_path / "bin", f"sleep 1000 & echo $! > {tmp_path}/child\nwait", monkeypatch)
    monkeypatch.setattr(kernels, "TIMEOUT", 1.0)
    started = time.monotonic()
    assert kernels.compiled() is None and time.monotonic() - started < 30
    assert "did not end" in capsys.readouterr().err
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":  # what the wrapper started ends as well
        assert time.monotonic() - started < 30


def test_they_are_built_while_something_else_is_done(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gcc(tmp_path / "bin", f"echo called >> {tmp_path}/calls; exit 1", monkeypatch)
    thread = kernels.compile_meanwhile()
    thread.join()
    assert not thread.daemon  # a compiler does not outlive the process
    assert kernels.compiled() is None and (tmp_path / "calls").read_text() == "called\n"
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_missing_compiler_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.without_gcc() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels.without_gcc().startswith("There is no gcc here")
