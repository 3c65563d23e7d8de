"""Files: written whole or not at all, claimed by one process, read by a schema; and the folder of caches."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import tempfile
import time
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from finetune101.errors import Refused

FORMAT = 1
"""Version of every file that is written; a file without one is of 0.1.0."""
MOST_BYTES = 256 * 2**20  # of a JSON file: the split of a million images fits
MOST_SETTINGS = 2**20  # bytes of a file that people write
ABANDONED = 24 * 3600.0  # seconds after which a temporary file of another machine is nobody's any more


@contextlib.contextmanager
def atomic(path: Path, *, make_folder: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well; else ``path`` stays as it was.

    The temporary file is there, empty, when the block begins; its name is unlike that of any other process on any
    machine. The final file has the mode that the umask gives to new files, whatever the block did to it. Without
    ``make_folder`` a missing folder is not made. Raises Refused, naming the file, when the disk is full or the folder
    cannot be written.
    """
    mark = f"{socket.gethostname()[:40]}.{os.getpid()}.{secrets.token_hex(4)}"
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
        reason = error.strerror or error
        raise Refused(f"cannot write {path}: {reason}; free some space or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):  # must not hide the error above, as where a parent is a file
            part.unlink()


def remove_abandoned(folder: Path) -> None:
    """Removes temporary files of ``atomic`` in ``folder`` whose process is dead, or of other machines after a day."""
    here = socket.gethostname()[:40]
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            made = re.fullmatch(r"\..*?\.(?P<host>.+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.part", part.name)
            local = made is not None and part.name.endswith(".".join([f".{here}", *part.name.split(".")[-3:]]))
            dead = made is not None and local and not _is_alive(int(made["pid"]))
            if dead or time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


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
            if isinstance(error, filelock.Timeout):
                raise
            keeper = filelock.SoftFileLock(lock.with_name(lock.name + ".soft"), timeout=0)
            keeper.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        with contextlib.suppress(OSError):  # a full disk must not end the work
            signed.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield True
    finally:
        with contextlib.suppress(OSError):
            signed.unlink()
        keeper.release()


def claimed_by(lock: Path) -> str:
    """Who holds ``lock``: "process 4711 on host", as far as that is known."""
    try:
        return lock.with_name(lock.name + ".owner").read_text(encoding="utf-8").strip() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def cache_dir() -> Path:
    """$FINETUNE101_CACHE, else ~/.cache/finetune101, else a private folder for temporary files."""
    given = os.environ.get("FINETUNE101_CACHE")
    try:
        return Path(given).expanduser() if given else Path.home() / ".cache" / "finetune101"
    except RuntimeError as error:  # a user without a home, or ~name of nobody
        if given:
            raise Refused(f"FINETUNE101_CACHE is {given}, and there is no such user; name a folder") from error
        return _private_folder()


@functools.cache
def _private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="finetune101-"))


def sha256(path: Path) -> str:
    """The sha256 (hex) of a file's bytes. Raises Refused naming a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); repair or remove it") from error


def write_json(path: Path, value: Any, *, make_folder: bool = True) -> None:
    """Writes ``value`` as JSON, whole or not at all; names of files that are not UTF-8 as escaped characters."""
    with atomic(path, make_folder=make_folder) as part:
        part.write_text(as_json(value, indent=1) + "\n", encoding="utf-8")


def as_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON text that every encoding of Unicode can hold."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def read_json(file: Path, kind: Any = Any, *, remedy: str) -> Any:
    """The content of the JSON file ``file``, of the type ``kind`` (see ``checked``).

    Raises Refused when the file is missing, not JSON, too large, of a newer version or not a ``kind``; ``remedy`` ends
    the sentence.
    """
    try:
        if file.stat().st_size > MOST_BYTES:
            raise Refused(f"{file} has more than {MOST_BYTES >> 20} MB; {remedy}")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise Refused(f"cannot read {file}: {error.strerror}; {remedy}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{file} is not UTF-8 text; {remedy}") from error
    return checked(parse_json(text, f"{file}", remedy), kind, f"{file}", remedy=remedy)


def parse_json(text: str, source: str, remedy: str) -> Any:
    """``text`` as JSON without NaN; raises Refused naming its ``source``."""

    def refuse(word: str) -> Any:
        raise Refused(f"{source} holds {word}, which is no number; {remedy}")

    try:
        return json.loads(text, parse_constant=refuse)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused(f"{source} is not valid JSON ({reason}); {remedy}") from error
    except Refused:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise Refused(f"{source} is not valid JSON ({error}); {remedy}") from error


def read_settings(file: Path) -> dict[str, Any]:
    """The table in a YAML, TOML or JSON file. Raises Refused when it cannot be read or holds no table."""
    if file.suffix not in (".yaml", ".yml", ".toml", ".json"):
        raise Refused(f"{file} is no file of settings; give one that ends in .yaml, .toml or .json")
    import yaml  # only where a file is read: the command line starts without it

    class Loader(yaml.SafeLoader):
        """Without aliases: a few hundred bytes of them fill the memory."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"*{self.peek_event().anchor} is an alias, which is not read; write the value")
            return super().compose_node(parent, index)

    read = {".toml": tomllib.loads, ".json": json.loads}.get(file.suffix, lambda text: yaml.load(text, Loader))
    try:
        if file.stat().st_size > MOST_SETTINGS:
            raise Refused(f"{file} has more than {MOST_SETTINGS >> 20} MB, too much for settings; shorten it")
        values = read(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"cannot read {file}: {error.strerror}; check its name") from error
    except Refused:
        raise
    # a damaged or hostile file can raise nearly anything: ValueError of dates, AttributeError of YAML's !!bool, …
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise Refused(f"{file} is not valid {file.suffix[1:].upper()} ({shortened(reason)}); correct it") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise Refused(f"{file} holds no table of names and values; write lines such as lr: [0.01, 0.001]")
    return values


def shortened(text: str, most: int = 200) -> str:
    """``text`` of at most ``most`` characters, for messages."""
    return text if len(text) <= most else text[: most - 1] + "…"


def checked(value: Any, kind: Any, source: str, *, remedy: str, text: bool = False) -> Any:
    """``value`` itself where it is of the type ``kind``; a dataclass is made of a table.

    ``kind`` is a type that msgspec knows: a dataclass or TypedDict with bounds (``msgspec.Meta``), a list, a union.
    Keys that a TypedDict lacks are allowed, those that a dataclass lacks are not. ``text``: numbers and true or false
    may be written as text, as YAML reads 1e-3. Raises Refused with ``source``, the place in it and what belongs there;
    ``remedy`` ends the sentence. A "format" above ``FORMAT`` is refused by name.
    """
    form = value.get("format", 0) if isinstance(value, dict) else 0
    if isinstance(form, int) and form > FORMAT:
        raise Refused(
            f"{source} has format {form}, this version of finetune101 reads up to {FORMAT}; install a newer version"
        )
    try:
        made = msgspec.convert(value, kind, strict=not text)
    except msgspec.ValidationError as error:
        raise Refused(f"{_place_and_kind(value, kind, source, error)}; {remedy}") from error
    except (RecursionError, OverflowError, UnicodeEncodeError) as error:
        raise Refused(f"{source} holds values that no setting can have; {remedy}") from error
    return made if hasattr(kind, "__dataclass_fields__") else value


def _place_and_kind(value: Any, kind: Any, source: str, error: msgspec.ValidationError) -> str:
    """A sentence's beginning such as "runs/a/config.json has optim.lr = 'x', not a number above 0"."""
    reason, _, place = str(error).partition(" - at `")
    path = [part for part in re.split(r"[.\[\]]", place.rstrip("`").removeprefix("$")) if part]
    if missing := re.search(r"missing required field `(.+)`", reason):
        name = ".".join([*path, missing[1]])
        return f"{source} lacks {name}"
    at: Any = value
    for part in path:
        if isinstance(at, list | tuple) and part.isdigit():
            at = at[int(part)]
        elif isinstance(at, dict):
            at = at.get(part, next(iter(at.values()), None)) if part != "..." else next(iter(at.values()), None)
        else:
            break
    wanted = hint_at(kind, path)
    told = must_be(wanted) if wanted is not None else reason[0].lower() + reason[1:]
    name = ".".join(path)
    return f"{source} has {name} = {shortened(repr(at), 60)}, not {told}" if name else f"{source} is not {told}"


def hint_at(kind: Any, path: list[str]) -> Any:
    """The type at ``path`` (names of fields, places in lists) within ``kind``; None where there is none."""
    for part in path:
        bare = kind.__origin__ if hasattr(kind, "__metadata__") else kind
        if get_origin(bare) in (Union, types.UnionType):
            bare = next((option for option in get_args(bare) if option is not type(None)), bare)
            bare = bare.__origin__ if hasattr(bare, "__metadata__") else bare
        if part.isdigit() or part == "...":
            inner = get_args(bare)
            kind = inner[-1] if inner and inner[-1] is not Ellipsis else (inner[0] if inner else None)
        else:
            try:
                kind = get_type_hints(bare, include_extras=True).get(part)
            except TypeError:
                return None
        if kind is None:
            return None
    return kind


def must_be(hint: Any) -> str:
    """In words what a value of the type ``hint`` is: "a whole number of at least 1", "one of a, b", "true or false"."""
    bounds = [meta for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
    bare = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    if get_origin(bare) in (Union, types.UnionType):
        options = [must_be(option) for option in get_args(bare) if option is not type(None)]
        return " or ".join(options + ["none"] * (type(None) in get_args(bare)))
    if get_origin(bare) is Literal:
        return f"one of {', '.join(map(str, get_args(bare)))}"
    if get_origin(bare) in (tuple, list):
        inner = [option for option in get_args(bare) if option is not Ellipsis]
        return f"a list in which each is {must_be(inner[0])}" if inner else "a list"
    if bare is bool:
        return "true or false"
    if bare is str:
        return "text"
    if bare in (int, float):
        return _number(bare, bounds)
    return "a table of names and values" if bare is not Any else "a value"


def _number(kind: type, bounds: list[msgspec.Meta]) -> str:
    whole = "a whole number" if kind is int else "a number"
    limits = {name: getattr(meta, name) for meta in bounds for name in ("ge", "gt", "le", "lt")}
    ends = {name: f"{limit:g}" for name, limit in limits.items() if limit is not None}
    low = f"of at least {ends['ge']}" if "ge" in ends else f"above {ends['gt']}" if "gt" in ends else ""
    high = f"at most {ends['le']}" if "le" in ends else f"below {ends['lt']}" if "lt" in ends else ""
    return " ".join(filter(None, (whole, ", ".join(filter(None, (low, high))))))


def escaped(name: str) -> str:
    """``name`` for people: control characters and bytes that are not UTF-8 as \\xNN, so that a terminal shows them."""
    return "".join(
        f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff"
        else c if c.isprintable() or c == " "
        else f"\\x{ord(c):02x}" if ord(c) < 256
        else f"\\u{ord(c):04x}"
        for c in name
    )  # fmt: skip
