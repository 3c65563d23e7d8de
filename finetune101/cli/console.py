"""What surrounds a command: words as a shell leaves them, standard streams, signals and the exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from finetune101.errors import Refused, escaped, shortened
from finetune101.files import cache_dir, remedy_to_write
from finetune101.redaction import keep_error, redacted, traceback_of

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff](?!\[A)")  # tqdm goes up by ESC [A
OURS = (BlockingIOError, ChildProcessError, ProcessLookupError, InterruptedError)  # OSErrors that are bugs of ours
MAYBE_OURS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EINVAL, errno.EBADF)
MOST_TOLD = 3000  # characters of a sentence
MOST_READ = 2 * MOST_TOLD  # characters in which secrets are looked for: more are never shown
REMEDIES = {
    errno.ENOENT: "check that it is still there",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENOMEM: "close other programs, or give a smaller --batch-size",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM: somebody else, such as SLURM or Docker, ends the command."""


class Stream:
    """A standard stream that never ends the work: what it cannot take is dropped, and remembered in ``lost``.

    Letters that its encoding lacks are written as \\xNN or \\uNNNN, control characters as well.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None
        self.replaced = False
        with contextlib.suppress(AttributeError, ValueError, OSError):
            if stream.errors == "strict" or stream.errors == "surrogateescape":
                stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes ``text`` as far as the stream can take it."""
        text = CONTROL.sub(lambda match: escaped(match[0]), text)
        if not self.replaced:
            try:
                text.encode(self._stream.encoding or "utf-8")
            except UnicodeEncodeError:
                self.replaced = True
            except LookupError:
                pass
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes every line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Sends on what was written."""
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        if self.lost:
            return
        try:
            act()
        except OSError as error:
            self.lost = error
            with contextlib.suppress(OSError, ValueError, AttributeError):  # or the end of Python would fail on it
                _to_nowhere(self._stream.fileno())


def _to_nowhere(number: int) -> None:
    """Makes the open file of that number lead to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


@contextlib.contextmanager
def streams() -> Iterator[tuple[Stream, Stream]]:
    """Standard output and error as ``Stream``s until the end of the block; closed ones lead nowhere."""
    before = sys.stdout, sys.stderr
    if None in before or sys.stdin is None:
        _open_closed()
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    out, err = Stream(sys.stdout or nowhere), Stream(sys.stderr or nowhere)
    sys.stdout, sys.stderr = out, err
    try:
        yield out, err
        if out.replaced:
            note = f"note: {out.encoding} has no sign for some letters, which stand as \\u and their number here"
            print(f"{note}; PYTHONUTF8=1 writes them", file=err)
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
        nowhere.close()


def _open_closed() -> None:
    """Puts /dev/null where a standard stream was closed, or the next file that is opened would get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM end the block by ``Terminated``, as Ctrl-C ends it by KeyboardInterrupt."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends at once
        raise Terminated

    usual = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if usual:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if usual:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def watched(folder: Path, goes_on: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Keeps the traceback of a bug in error.log of ``folder``; ``goes_on()`` is told when the block is stopped."""
    try:
        yield
    except Refused:
        raise
    except KeyboardInterrupt as stop:
        if not getattr(stop, "__notes__", ()):
            with contextlib.suppress(Exception):  # an interrupted command must end, whatever the folder holds
                stop.add_note(goes_on() or "nothing of it was begun")
        raise
    except Exception as error:
        if file := keep_error(error, folder):
            error.add_note(f"This traceback is also in {file}")
        raise


def expanded(argv: Sequence[str]) -> list[str]:
    """``argv`` with ~ as a home folder also where a shell leaves it: --runs=~/x. Raises Refused for unknown users."""
    words: list[str] = []
    for word in argv:
        flag, sign, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        if flag == "--exp" or (words and words[-1] == "--exp") or not re.match(r"~[\w.\-]*(/|$)", value):
            words.append(word)
            continue
        path = os.path.expanduser(value)
        if path == value and not os.path.exists(value):
            raise Refused(f"{value} names the home folder of a user that is not here; name another folder")
        words.append(f"{flag}{sign}{path}")
    return words


def guarded(call: Callable[[], int], debug: bool = False, verb: str = "") -> int:
    """The exit code of ``call``: what the user can mend is one sentence and 2; bugs keep their traceback.

    With ``debug`` the user's errors show their traceback as well. ``verb`` decides what is said to be done where the
    work is stopped before it can say so itself.
    """
    with streams() as (out, err), terminable():
        if not err.isatty():
            os.environ.setdefault("TQDM_MININTERVAL", "30")  # a log file needs no progress bar ten times a second
        try:
            code = call()
        except Refused as error:
            _show(error, debug)
            return _told(f"{error}")
        except KeyboardInterrupt as stop:
            return _stopped(stop, verb)
        except BrokenPipeError:  # of a process that we talk to: our own streams never raise
            raise
        except OSError as error:
            if error.errno is None or isinstance(error, OURS):
                _hide_secrets(error)
                raise
            _show(error, debug)
            return _told(_of_system(error) + _traceback_place(error))
        except (MemoryError, RuntimeError) as error:
            if not (sentence := _of_machine(error)):
                _hide_secrets(error)
                raise
            _show(error, debug)
            return _told(sentence)
        except Exception as error:
            _hide_secrets(error)
            raise
        out.flush()
        if out.lost and not isinstance(out.lost, BrokenPipeError):  # a reader such as head may have seen enough
            return _told(f"standard output cannot be written: {out.lost.strerror}; what else was asked for is done")
        return code


def _show(error: BaseException, debug: bool) -> None:
    if debug:
        print(traceback_of(error), end="", file=sys.stderr)


def _told(sentence: str) -> int:
    words = " ".join(redacted(sentence[:MOST_READ]).split())  # of a damaged file a name may be megabytes long
    print(f"error: {escaped(shortened(words, MOST_TOLD))}", file=sys.stderr)
    return 2


def _stopped(stop: KeyboardInterrupt, verb: str) -> int:
    """Says what goes on with the work that was stopped; the exit code is that of the signal."""
    terminated = isinstance(stop, Terminated)
    again = f"give the command again{', with --resume where its run has begun' if verb == 'train' else ''}"
    notes = "; ".join(getattr(stop, "__notes__", ())) or again
    rank = os.environ.get("RANK", "0")
    if rank == "0" or (rank == "1" and terminated):  # torchrun terminates the others where rank 0 was killed
        line = f"{'terminated' if terminated else 'interrupted'}; {notes}"
        print(f"\n{escaped(redacted(line))}", file=sys.stderr)
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def _of_system(error: OSError) -> str:
    """The sentence for an error of the system: what cannot be, which file, and what to do."""
    assert error.errno is not None
    reason = error.strerror or os.strerror(error.errno)
    names = [shortened(os.fsdecode(n), 100) for n in (error.filename, error.filename2) if isinstance(n, str | bytes)]
    remedy = REMEDIES.get(error.errno, "choose another file or folder" if names else "try again")
    if names and error.errno not in REMEDIES:
        remedy = remedy_to_write(error, Path(os.fsdecode(error.filename or error.filename2)), remedy)
    return f"{reason}: {' -> '.join(names)}; {remedy}" if names else f"{reason}; {remedy}"


def _traceback_place(error: OSError) -> str:
    """Where the traceback of ``error`` is kept, for errors that may be a bug of ours; "" for the others.

    A missing or wrong file may be the user's mistake or ours, and no rule tells which: so the user gets the sentence,
    and whoever looks for a bug the traceback.
    """
    if error.errno not in MAYBE_OURS:
        return ""
    if notes := getattr(error, "__notes__", ()):  # ``watched`` kept it
        return f". {notes[0]}"
    with contextlib.suppress(OSError, Refused):
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        if file := keep_error(error, folder):
            return f". The traceback is in {file}"
    return ""


def _of_machine(error: BaseException) -> str:
    """The sentence for too little memory, on the machine or its GPU, and for a user without a home; "" for others."""
    gpu = type(error).__name__ == "OutOfMemoryError"
    if gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        where = "the GPU" if gpu else "this machine"
        return f"the memory of {where} is not enough; give a smaller --batch-size or --size"
    if "determine home directory" in str(error):  # pathlib's for ~name of nobody
        return "a path begins with ~ and a user that is not here; name another folder"
    return ""


def _hide_secrets(error: Exception) -> None:
    """Lets Python print the traceback of ``error`` without the secrets in it."""
    text = traceback_of(error)
    if text != "".join(traceback.format_exception(error)):
        sys.excepthook = lambda kind, value, trace: print(text, end="", file=sys.stderr)
