"""Files: written whole or not at all, claimed by one process, read by a schema; and the folder of caches."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin

import msgspec

from finetune101.errors import Refused, bare, escaped, must_be, parts, shortened, shown

FORMAT = 1
"""Version of every file that is written; a file without one is of 0.1.0."""
MOST_BYTES = 256 * 2**20  # of a JSON file: the split of a million images fits
MOST_SETTINGS = 2**17  # bytes of a file that people write
DEEPEST = 50  # levels of tables and lists in a file
WRITE_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "choose a place that you may use, or change its permissions",
    errno.EPERM: "choose a place that you may use, or change its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EFBIG: "allow larger files (ulimit -f), or choose another folder",
}
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system without locks
ABANDONED = 24 * 3600.0  # seconds after which a temporary file of another machine counts as abandoned


@contextlib.contextmanager
def atomic(path: Path, *, make_folder: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well; else ``path`` stays as it was.

    The temporary file is there, empty, when the block begins; its name is unlike that of any other process on any
    machine. The final file has the mode that the umask gives to new files, whatever the block did to it. Without
    ``make_folder`` a missing folder is not made. Raises Refused, naming the file, when the disk is full or the folder
    cannot be written.
    """
    mark = f"{process_space()}.{os.getpid()}.{secrets.token_hex(4)}"
    part = path.with_name(f".{path.name[:100]}.{mark}.part")
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as created:
            mode = stat.S_IMODE(os.fstat(created.fileno()).st_mode)
        yield part
        os.chmod(part, mode)  # some libraries write through a private file of their own
        with open(part, "r+b") as written:
            os.fsync(written.fileno())  # a crash of the machine must not leave an empty file under the final name
        os.replace(part, path)
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror or error}; {remedy_to_write(error, path)}") from error
    finally:
        with contextlib.suppress(OSError):  # must not hide the error above, as where a parent is a file
            part.unlink()


def remedy_to_write(error: OSError, path: Path, otherwise: str = "choose another folder") -> str:
    """What the user can do where ``path`` cannot be written, by the reason of ``error``."""
    remedy = WRITE_REMEDIES.get(error.errno or 0, otherwise)
    with contextlib.suppress(Refused):
        cache, place = cache_dir().absolute(), path.absolute()
        is_above = place in cache.parents and not os.path.lexists(place)  # the first folder that mkdir would make
        if place == cache or cache in place.parents or is_above:
            with_space = f"{remedy}, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            return f"{with_space}set $FINETUNE101_CACHE to a folder that you may write"
    return remedy


def writable_place(folder: Path) -> Path:
    """``folder``, or the nearest one above it that exists; raises OSError where nothing can be made in it."""
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    with tempfile.TemporaryFile(dir=place):
        return place


def check_writable(path: Path, folder: Path, flag: str) -> None:
    """Before long work: raises Refused where ``path``, which ``flag`` names, cannot be made in ``folder``."""
    try:
        writable_place(folder)
    except OSError as error:
        remedy = remedy_to_write(error, folder, f"choose another {flag}")
        raise Refused(f"cannot write {escaped(str(path))}: {error.strerror or error}; {remedy}") from error


def remove_abandoned(folder: Path) -> None:
    """Removes temporary files of ``atomic`` in ``folder`` whose process is dead, or of other machines after a day."""
    here = process_space()
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            made = re.fullmatch(r"\..*?\.(?P<host>.+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.part", part.name)
            local = made is not None and part.name.endswith(".".join([f".{here}", *part.name.split(".")[-3:]]))
            dead = made is not None and local and not _is_alive(int(made["pid"]))
            if dead or time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


def process_space() -> str:
    """What tells process numbers of one machine and container from those of others: host, and namespace on Linux."""
    with contextlib.suppress(OSError):
        space = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
        return f"{socket.gethostname()[:40]}-{space}"
    return socket.gethostname()[:40]


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # there a signal 0 would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def claim(lock: Path) -> Iterator[bool]:
    """Whether this process alone holds the file ``lock``, until the end of the block or of the process.

    The system keeps it, on this machine and on folders that machines share (NFS 4). Where a file system has no locks a
    file beside ``lock`` is the sign. ``claimed_by`` says who holds it.
    """
    import filelock

    lock.parent.mkdir(parents=True, exist_ok=True)
    signed = lock.with_name(lock.name + ".owner")
    keeper: Any = filelock.FileLock(lock, timeout=0)
    try:
        try:
            keeper.acquire()
        except (NotImplementedError, OSError) as error:
            lacks = isinstance(error, NotImplementedError) or error.errno in NO_LOCKS
            if isinstance(error, filelock.Timeout) or not lacks:
                raise
            keeper = filelock.SoftFileLock(lock.with_name(lock.name + ".soft"), timeout=0)
            keeper.acquire()
    except filelock.Timeout:
        if not lock.exists():
            lock.touch()  # filelock waits even where no file can be made; this says why, and raises
        yield False
        return
    try:
        with contextlib.suppress(OSError):  # a full disk must not end the work
            signed.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield True
    finally:
        with contextlib.suppress(OSError):  # while the lock is claimed: afterwards the file is the next owner's
            signed.unlink()
        with contextlib.suppress(OSError):  # the process is done with it all the same
            keeper.release()


def claimed_by(lock: Path) -> str:
    """Who holds ``lock``: "process 4711 on host", as far as that is known."""
    try:
        return lock.with_name(lock.name + ".owner").read_text(encoding="utf-8").strip() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def cache_dir() -> Path:
    """$FINETUNE101_CACHE, else ~/.cache/finetune101, else a private folder for temporary files."""
    folder = os.environ.get("FINETUNE101_CACHE")
    try:
        return Path(folder).expanduser() if folder else Path.home() / ".cache" / "finetune101"
    except RuntimeError as error:  # a user without a home, or ~name of nobody
        if folder:
            raise Refused(f"FINETUNE101_CACHE is {folder}, and there is no such user; name a folder") from error
        return _private_folder()


@functools.cache
def _private_folder() -> Path:
    folder, owner = Path(tempfile.mkdtemp(prefix="finetune101-")), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder


def sha256(path: Path) -> str:
    """The sha256 (hex) of a file's bytes. Raises Refused naming a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); repair or remove it") from error


def write_json(path: Path, value: Any, *, make_folder: bool = True) -> None:
    """Writes ``value`` as JSON, a table with the version of its form in it, whole or not at all.

    Names of files that are not UTF-8 are written as escaped characters.
    """
    if isinstance(value, dict):
        value = {"format": FORMAT, **value}
    with atomic(path, make_folder=make_folder) as part:
        part.write_text(as_json(value, indent=1) + "\n", encoding="utf-8")


def as_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON text that every encoding of Unicode can hold."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def read_text(file: Path, remedy: str, most: int = MOST_BYTES) -> str:
    """The text (UTF-8) of ``file``. Raises Refused where there is none, or more than ``most`` bytes of it."""
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise Refused(f"{file} is a folder or no real file; {remedy}")
        with open(file, "rb") as opened:
            content = opened.read(most + 1)
    except Refused:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that holds a zero byte
        raise Refused(f"cannot read {file}: {getattr(error, 'strerror', error)}; {remedy}") from error
    if len(content) > most:
        raise Refused(f"{file} has more than {most >> 10} KB, too much for what it should hold; {remedy}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{file} is not text in UTF-8; {remedy}") from error


def read_json(file: Path, kind: Any = Any, *, remedy: str, most: int = MOST_BYTES) -> Any:
    """The content of the JSON file ``file``, of the type ``kind`` (see ``checked``).

    Raises Refused when the file is missing, not JSON, larger than ``most`` bytes, of a newer version or not a ``kind``;
    ``remedy`` ends the sentence.
    """
    return checked(parse_json(read_text(file, remedy, most), f"{file}", remedy), kind, f"{file}", remedy=remedy)


def parse_json(text: str, source: str, remedy: str) -> Any:
    """``text`` as JSON; raises Refused, naming its ``source``, also for NaN, deep nesting and a name given twice."""
    return _parsed(_json, text, source, "JSON", remedy)


def read_settings(file: Path) -> dict[str, Any]:
    """The table in a YAML, TOML or JSON file. Raises Refused when it cannot be read or holds no table."""
    parsers: dict[str, Callable[[str], Any]] = {".yaml": _yaml, ".yml": _yaml, ".toml": _toml, ".json": _json}
    if (suffix := file.suffix.lower()) not in parsers:
        raise Refused(f"{file} is no file of settings; give one that ends in .yaml, .toml or .json")
    text = read_text(file, "give a file of settings, saved as UTF-8", MOST_SETTINGS)
    values = _parsed(parsers[suffix], text, f"{file}", suffix[1:].upper(), "correct it")
    if not isinstance(values, dict) or not values or not all(isinstance(key, str) for key in values):
        raise Refused(f"{file} holds no table of names and values, such as optim: {{lr: 0.01}} of a recipe; write one")
    _check_format(values, f"{file}")
    return {name: value for name, value in values.items() if name != "format"}


def _parsed(parse: Callable[[str], Any], text: str, source: str, language: str, remedy: str) -> Any:
    """``parse(text)``; raises Refused where the text is not of the ``language``, or nested deeply."""
    try:
        value = parse(text)
        if _is_deep(value):
            raise RecursionError
        return value
    except RecursionError as error:
        raise Refused(f"{source} is nested more than {DEEPEST} deep; {remedy}") from error
    # a damaged or hostile file can raise nearly anything: ValueError of numbers, AttributeError of dates, …
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        reason = shortened(escaped(" ".join(str(error).split(";")[0].split())))
        raise Refused(f"{source} is not valid {language} ({reason}); {remedy}") from error


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner = (v for held in level for v in (held.values() if isinstance(held, dict) else held))
        level = [v for v in inner if isinstance(v, dict | list)] if isinstance(level[0], dict | list) else []
        if not level:
            return False
    return True


def _json(text: str) -> Any:
    def number(word: str) -> float:
        if not math.isfinite(value := float(word)):
            raise ValueError(f"{shortened(word, 20)} is no number")
        return value

    return json.loads(text, parse_float=number, parse_constant=number, object_pairs_hook=_table)


def _table(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A table of ``pairs``; raises ValueError for a name that is given twice."""
    table: dict[Any, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"{shortened(str(name), 40)} is given twice")
        table[name] = value
    return table


def _toml(text: str) -> dict[str, Any]:
    if any(key.count(".") > DEEPEST for key in re.split(r"[\n,={}\[\]]", text)):
        raise RecursionError  # tomllib would take hours for a key of thousands of parts
    return tomllib.loads(text)


def _yaml(text: str) -> Any:
    """``text`` as YAML 1.2 with plain values only: no aliases, which fill the memory, and no tags.

    So ``off`` is a word, ``1e-3`` a number, and a date or 1:30 text. Raises ValueError.
    """
    import yaml  # only where a file is read: the command line starts without it

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                raise ValueError(f"line {event.start_mark.line + 1} has an alias or a tag; write the value itself")
            self.depth += 1
            if self.depth > DEEPEST + 1:
                raise RecursionError
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            return _table(
                [(self.construct_object(k, deep=True), self.construct_object(v, deep=True)) for k, v in node.value]
            )

    number = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    for kind, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
        ("float", number, list("-+.0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), first)
    try:
        return yaml.load(text, Loader)  # nosec B506
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def checked(value: Any, kind: Any, source: str, *, remedy: str) -> Any:
    """``value`` itself where it is of the type ``kind``; a dataclass is made of a table.

    ``kind`` is a type that msgspec knows: a dataclass or TypedDict with bounds (``msgspec.Meta``), a list, a union.
    Raises Refused with ``source``, the place in it and what belongs there; ``remedy`` ends the sentence. A "format"
    above ``FORMAT`` is refused by name.
    """
    _check_format(value, source)
    try:
        made = msgspec.convert(value, kind)
    except (ValueError, RecursionError, OverflowError) as error:  # msgspec's own, and of surrogates and long numbers
        raise Refused(f"{_fault(value, kind, source)}; {remedy}") from error
    return made if hasattr(kind, "__dataclass_fields__") else value


def _check_format(value: Any, source: str) -> None:
    form = value.get("format", 0) if isinstance(value, dict) else 0
    if type(form) is not int or form < 0:
        raise Refused(f"{source} has format {shown(form)}, which is no version of a file; remove or repair it")
    if form > FORMAT:
        raise Refused(
            f"{source} has format {shown(form)}, this version of finetune101 reads up to {FORMAT}; "
            "install a newer version"
        )


def _fault(value: Any, kind: Any, source: str) -> str:
    """A sentence's beginning such as "runs/a/config.json has optim.lr = 'x', not a number above 0"."""
    place, reason = "", ""
    while True:
        try:
            msgspec.convert(value, kind)
        except (ValueError, RecursionError, OverflowError) as error:
            reason = str(error)
        for name, inner, hint in parts(value, kind):
            if not _fits(inner, hint):
                place, value, kind = f"{place}.{name}" if place else name, inner, hint
                break
        else:
            break
    if "surrogates" in reason and not place:
        return f"{source} holds a name that is not Unicode text"
    if missing := re.match(r"Object missing required field `(.+?)`", reason):
        return f"{source} lacks {f'{place}.' if place else ''}{missing[1]}"
    has = f"has {escaped(shortened(place))} = {shown(value)}," if place else "is"
    return f"{source} {has} not {must_be(kind)}"


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except (ValueError, RecursionError, OverflowError):
        return False
    return True


def typed(hint: Any, value: Any, what: str) -> Any:
    """``value`` as the type ``hint``, also where it is written as text, or alone where a list belongs.

    Raises Refused, in a sentence that begins with ``what``, for a value that the type cannot have.
    """
    kind, plain = bare(hint), value
    if get_origin(kind) is tuple and not isinstance(value, list | tuple):
        plain = [value]
    elif bool in (kind, *get_args(kind)) and isinstance(value, str):
        plain = {"yes": True, "on": True, "no": False, "off": False}.get(value.lower(), value)
    try:
        return msgspec.convert(plain, hint, strict=False)
    except (ValueError, RecursionError, OverflowError) as error:  # msgspec's, also of surrogates and long numbers
        raise Refused(f"{what} {shown(value)}; give {must_be(hint)}") from error
