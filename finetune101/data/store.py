"""The folder of caches: arrays that took long to make, whole or not at all, checked when read, within a bound."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from finetune101.errors import Refused, escaped, shortened
from finetune101.files import atomic, cache_dir, claim, claimed_by, remove_abandoned

VARIABLE = "FINETUNE101_CACHE_MAX_GB"
DEFAULT_GB = 20.0
NAMES = re.compile(r"(images|features|thumbnails|kernels|digests)_[\w.-]+\.(npy|npz|so|msgpack)")
KERNELS = "kernels_*"  # folders of compiled kernels, one for each user
"""What the package keeps in the folder; nothing else in it is listed or removed."""
ARRAYS = ("images", "features", "thumbnails")
END = b"ft101\0\0\1"  # the last bytes of a file; before them the length of the note, before that the note
BLOCK = 4 * 2**20  # bytes that one checksum is of
SURE = 64 * 2**20  # bytes that are checked whenever a file is opened; all of it where another program wrote to it
MOST_NOTE = 16 * 2**20

Array = TypeVar("Array", bound=NDArray[Any])


class Note(msgspec.Struct):
    """Facts about an array, written at the end of its file."""

    what: str
    """What the array is, in words."""
    seconds: float
    """How long making the array took."""
    sums: list[int]
    """CRC-32 of each ``BLOCK`` of the array's bytes."""


@dataclass(frozen=True)
class Kept(Generic[Array]):
    """An array of the folder and the seconds that making it took."""

    array: Array
    seconds: float


@dataclass(frozen=True)
class Place:
    """Where an array is kept, and what it must be: ``name`` is a file's, such as images_224px_0123456789abcdef.npy."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.generic]

    @property
    def file(self) -> Path:
        """The file, which need not exist."""
        return cache_dir() / self.name

    @property
    def bytes(self) -> int:
        """Size of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Entry:
    """A file of the folder."""

    file: Path
    bytes: int
    used: float
    """Seconds since 1970 when it was read or written last."""
    note: Note | None

    @property
    def kind(self) -> str:
        """Images, features, thumbnails, kernels or digests."""
        return self.file.name.split("_", 1)[0]


_in_use: set[str] = set()  # names of files that this process has read: they are never removed to make room


def read_array(place: Place, *, mapped: bool = False) -> Kept[NDArray[Any]] | None:
    """The array of ``place``, None without one; ``mapped`` reads from the disk what is used only.

    A damaged file (cut, empty, of another array, changed by another program) is removed; one printed line says so.
    """
    file = place.file
    try:
        if not file.is_file():
            return None
        array, note = _checked(file, place)
    except OSError:  # another user's, or gone meanwhile: not ours to remove
        return None
    except Exception as error:  # numpy and the file system can raise nearly anything for a damaged file
        reason = shortened(" ".join(str(error).split())) or type(error).__name__
        print(f"The cache file {escaped(str(file))} is damaged ({reason}): it is made anew.")
        with contextlib.suppress(OSError):
            file.unlink()
        return None
    _in_use.add(file.name)
    with contextlib.suppress(OSError):
        _mark_used(file)
    return Kept(array if mapped else np.array(array), note.seconds)


def _mark_used(file: Path) -> None:
    """Sets the time of the file to now, in whole seconds: a fraction shows that another program wrote to it."""
    os.utime(file, (int(time.time()),) * 2)


def _checked(file: Path, place: Place) -> tuple[NDArray[Any], Note]:
    """The mapped array of ``file`` and its note. Raises ValueError and whatever damaged files raise."""
    note = _note(file)
    with open(file, "rb") as opened:
        version = np.lib.format.read_magic(opened)
        if version != (1, 0):
            raise ValueError("another version of the format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(opened)
        start = opened.tell()
        unchanged = os.fstat(opened.fileno()).st_mtime_ns % 10**9 == 0
    if (shape, dtype, fortran) != (place.shape, np.dtype(place.dtype), False):
        raise ValueError(f"it holds {dtype} {shape} instead of {np.dtype(place.dtype)} {place.shape}")
    array = np.memmap(file, dtype, "r", start, shape)
    parts = -(-place.bytes // BLOCK)
    if len(note.sums) != parts:
        raise ValueError("it is cut")
    step = max(1, parts * BLOCK // SURE) if unchanged else 1
    content = array.reshape(-1).view(np.uint8).data
    for number in {*range(0, parts, step), parts - 1}:
        if zlib.crc32(content[number * BLOCK : (number + 1) * BLOCK]) != note.sums[number]:
            raise ValueError("its content was changed")
    return array, note


def _note(file: Path) -> Note:
    """What stands at the end of ``file``. Raises ValueError and whatever damaged files raise."""
    with open(file, "rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        if size < len(END) + 8:
            raise ValueError("it is cut" if size else "it is empty")
        opened.seek(size - len(END) - 8)
        length = struct.unpack("<Q", opened.read(8))[0]
        if opened.read() != END or length > min(size, MOST_NOTE):
            raise ValueError("it is cut, or another program's")
        opened.seek(size - len(END) - 8 - length)
        return msgspec.json.decode(opened.read(length), type=Note)


def keep_array(place: Place, rows: Iterable[NDArray[Any]], what: str, seconds: float | None = None) -> None:
    """Writes ``rows``, one after the other the array of ``place``; ``what`` they are is for people.

    ``seconds``: what making them took; None where making and writing are one. Raises Refused when that fails, as on a
    full disk, and what ``rows`` raises; then there is no file.
    """
    started = time.perf_counter()
    with atomic(place.file) as part:
        with open(part, "wb") as out:
            header = {"descr": np.dtype(place.dtype).str, "fortran_order": False, "shape": place.shape}
            np.lib.format.write_array_header_1_0(out, header)
            sums = _write(out, rows)
            took = time.perf_counter() - started if seconds is None else seconds
            words = what.encode("utf-8", "replace").decode()
            note = msgspec.json.encode(Note(words, round(took, 3), sums))
            out.write(note + struct.pack("<Q", len(note)) + END)
        _mark_used(part)
    _in_use.add(place.name)


def _write(out: BinaryIO, rows: Iterable[NDArray[Any]]) -> list[int]:
    """Writes the bytes of ``rows``; returns the checksum of each ``BLOCK`` of them."""
    sums, filled, total = [], 0, 0
    for row in rows:
        content = np.ascontiguousarray(row).reshape(-1).view(np.uint8).data
        out.write(content)  # not by a map: a full disk is an error here, and would end the process there
        while content:
            part = content[: BLOCK - filled]
            total, filled, content = zlib.crc32(part, total), filled + len(part), content[len(part) :]
            if filled == BLOCK:
                sums.append(total)
                total = filled = 0
    return [*sums, total] if filled else sums


@contextlib.contextmanager
def turn(place: Place) -> Iterator[None]:
    """Waits until no other process makes ``place``; then read again, and make it where it is missing."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # where no lock can be made no array can be kept
            stack.enter_context(alone(place.file.with_name(f".{place.name}.lock")))
        yield


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Waits until no other process holds the file ``lock``, named .WHAT.lock; says once that it waits.

    Raises OSError where the lock cannot be made.
    """
    is_first_try = True
    while True:
        with claim(lock) as is_ours:
            if is_ours:
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):
                        lock.unlink()  # a process that waits reads before it makes anything
                return
        if is_first_try:
            where = f"{lock.name[1:-5]} in {escaped(str(lock.parent))}"
            print(f"{claimed_by(lock).capitalize()} makes {where}: waiting for it.")
            is_first_try = False
        time.sleep(0.2)


def cache_limit() -> int:
    """Bytes that the folder may have. Raises Refused when $FINETUNE101_CACHE_MAX_GB is no number."""
    value = os.environ.get(VARIABLE) or f"{DEFAULT_GB}"
    try:
        most = float(value)
    except ValueError:
        most = -1.0
    if not 0 <= most < 1e9:
        raise Refused(f"{VARIABLE} is {value}, not a number of gigabytes; give one such as {DEFAULT_GB:g}")
    return int(most * 1e9)


def make_room(place: Place) -> str:
    """Removes arrays that were not used for longest until ``place`` fits the bound; else says why it cannot be kept.

    What this process uses stays. Other processes go on with what they have opened.
    """
    try:
        place.file.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place.file.parent).free
    except OSError:
        free = 0
    remove_abandoned(place.file.parent)
    needs, wanted = f"needs {place.bytes / 1e9:.2f} GB", place.bytes * 1.05 + 1e8
    most, present = cache_limit(), cache_entries()
    if place.bytes > most:
        return f"{needs}, {VARIABLE} allows {most / 1e9:g}"
    total = sum(entry.bytes for entry in present)
    for entry in present:
        if total + place.bytes <= most and free >= wanted:
            break
        if entry.kind in ARRAYS and entry.file.name not in {*_in_use, place.name}:
            with contextlib.suppress(OSError):
                entry.file.unlink()
                total, free = total - entry.bytes, free + entry.bytes
                print(f"Removed {entry.file.name}, unused for longest: the caches need its room.")
    if free < wanted:
        return f"{needs}, {escaped(str(place.file.parent))} has {free / 1e9:.2f}"
    return "" if total + place.bytes <= most else f"{needs}, {VARIABLE} leaves {max(0, most - total) / 1e9:.2f}"


def cache_entries() -> list[Entry]:
    """What is kept in the folder, from the longest unused on."""
    kept = []
    with contextlib.suppress(OSError):
        for file in (*cache_dir().iterdir(), *cache_dir().glob(f"{KERNELS}/*.so")):
            if NAMES.fullmatch(file.name):
                with contextlib.suppress(OSError):
                    state, note = file.lstat(), None
                    with contextlib.suppress(Exception):  # files that are damaged or have no note are listed as well
                        note = _note(file)
                    kept.append(Entry(file, state.st_size, state.st_mtime, note))
    return sorted(kept, key=lambda entry: (entry.used, entry.file.name))


def _is_unused(entry: Entry, days: float) -> bool:
    return not days or time.time() - entry.used >= days * 86400


def clear_cache(older_than: float = 0.0) -> list[Entry]:
    """Removes what was not used for ``older_than`` days; returns that. Raises Refused where it cannot be removed."""
    folder, removed = cache_dir(), []
    remove_abandoned(folder)
    for entry in cache_entries():
        if _is_unused(entry, older_than):
            try:
                entry.file.unlink(missing_ok=True)
            except OSError as error:
                raise Refused(f"{entry.file} cannot be removed ({error.strerror}); remove it yourself") from error
            removed.append(entry)
    return removed


def cache_table(older_than: float = 0.0) -> str:
    """The folder as text: size, days since the last use, name and content of each entry, then the sum and the bound.

    Only entries that were not used for ``older_than`` days are listed and summed.
    """
    present = [entry for entry in cache_entries() if _is_unused(entry, older_than)]
    lines = [f"{'GB':>8}  {'days unused':>11}  file"] * bool(present)
    for entry in reversed(present):
        days = max(0.0, time.time() - entry.used) / 86400
        words = f": {entry.note.what}, made in {entry.note.seconds:.0f} s" if entry.note else ""
        lines.append(f"{entry.bytes / 1e9:8.3f}  {days:11.1f}  {entry.file.name}{words}")
    total, most = sum(entry.bytes for entry in present) / 1e9, cache_limit() / 1e9
    lines.append(f"{escaped(str(cache_dir()))}: {len(present)} files, {total:.2f} GB of at most {most:g} ({VARIABLE})")
    return "\n".join(lines)
