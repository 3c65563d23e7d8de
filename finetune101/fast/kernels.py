"""The C files of this folder, built with gcc when first needed (some seconds) and kept in the cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from finetune101.errors import Refused, shortened
from finetune101.files import atomic, cache_dir, remove_abandoned

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
TIMEOUT = 60.0  # seconds that gcc may take for one file: it needs two
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")

SUFFIXES = {torch.bfloat16: "_bf16", torch.float32: "_fp32"}

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "moments": [_POINTER, _LONG, _LONG, _POINTER, _POINTER],
    "gradient_sums": [_POINTER] * 2 + [_LONG] * 2 + [_POINTER] * 2 + [_FLOAT] * 2 + [_POINTER] * 2,
    "apply": [_POINTER] + [_LONG] * 2 + [_POINTER] * 2 + [_FLOAT] * 2 + [_POINTER],
    "input_gradient": [_POINTER] * 2 + [_LONG] * 2 + [_POINTER] * 2 + [_FLOAT] * 2 + [_POINTER] * 3,
    "depthwise_output": [_POINTER] * 2 + [_LONG] * 10 + [_POINTER] * 3,
    "depthwise_gradients": [_POINTER] * 4
    + [_LONG] * 10
    + [_POINTER] * 2
    + [_FLOAT] * 2
    + [_POINTER] * 3
    + [_FLOAT] * 2
    + [_POINTER] * 5,
}


def compile_meanwhile() -> threading.Thread:
    """A thread that builds the kernels while the caller does something else; ``join`` it before ``compiled``.

    The process ends after the thread has ended, so that no compiler is left behind.
    """
    thread = threading.Thread(target=compiled, name="kernels")
    thread.start()
    return thread


def without_gcc() -> str:
    """What a training misses on a Linux without gcc, in a sentence; "" where nothing."""
    if platform.system() != "Linux" or shutil.which("gcc"):
        return ""
    return (
        "There is no gcc here, so that batch norms and depthwise convolutions are PyTorch's own, which train more"
        " slowly; install gcc (finetune101 benchmark measures what it brings)"
    )


@functools.cache
def compiled() -> Any:
    """The functions of batch_norm.c and depthwise.c, or None where they cannot be built: only with gcc on Linux.

    Each is there for every dtype of ``SUFFIXES``, which ends its name; ``kernel`` finds it.
    """
    gcc = shutil.which("gcc")
    if platform.system() != "Linux" or gcc is None:
        return None
    try:
        target = _output(gcc, "-march=native", "-Q", "--help=target")
        sources = b"".join(source.read_bytes() for source in SOURCES)
        key = hashlib.sha256(sources + target + " ".join(FLAGS).encode()).hexdigest()[:16]
        with contextlib.ExitStack() as stack:
            folder = _own_folder() or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="finetune101-")))
            file = folder / f"kernels_{key}.so"
            with contextlib.suppress(OSError, AttributeError):
                return _load(file)
            with atomic(file) as part:  # new, or the file there is damaged or somebody else's
                _build(gcc, part)
                sealed = part.read_bytes()
                part.write_bytes(sealed + hashlib.sha256(sealed).digest())
            file.chmod(0o600)
            return _load(file)
    except (OSError, Refused, AttributeError) as error:
        print(f"The quick CPU kernels cannot be built ({error}); training goes on without them.", file=sys.stderr)
        return None


def _own_folder() -> Path | None:
    """A folder of the cache that only this user can write, as code is loaded from it; None where there cannot be one.

    Several users may share the folder above it.
    """
    try:
        folder = cache_dir() / f"kernels_{os.geteuid()}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    except (OSError, Refused):
        return None
    status = folder.lstat()
    if not (stat.S_ISDIR(status.st_mode) and _is_private(status)):
        return None
    remove_abandoned(folder)
    return folder


def _is_private(status: os.stat_result) -> bool:
    """Whether a file or folder is this user's or root's, and nobody else may write it."""
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def kernel(name: str, dtype: torch.dtype) -> Any:
    """The function ``name`` for activations of ``dtype``, where ``compiled`` is there."""
    return getattr(compiled(), name + SUFFIXES[dtype])


def _load(file: Path) -> Any:
    """The functions in ``file``. Raises OSError for a file that is damaged, or that another user could have written."""
    opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    with contextlib.ExitStack() as closing:
        closing.callback(os.close, opened)
        status = os.fstat(opened)
        content = os.pread(opened, status.st_size, 0)
        if not (stat.S_ISREG(status.st_mode) and _is_private(status)):
            raise OSError(f"{file} may be written by others")
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:  # half a library would end the process
            raise OSError(f"{file} is damaged")
        # the file that was looked at, whatever has its name by now; a second library needs a number of its own
        held = Path(f"/proc/self/fd/{opened}")
        library = ctypes.CDLL(str(held if held.exists() else file))
        closing.pop_all()
    for name, kinds in _ARGUMENTS.items():
        for suffix in SUFFIXES.values():
            getattr(library, name + suffix).argtypes, getattr(library, name + suffix).restype = kinds, None
    return library


def _build(gcc: str, part: Path) -> None:
    """Not linked against an OpenMP of its own: the symbols are found in PyTorch's, whose threads it then shares."""
    variants = ((source, suffix) for source in SOURCES for suffix in SUFFIXES.values())
    objects = {part.with_name(f"{part.name}_{source.stem}{suffix}.o"): (source, suffix) for source, suffix in variants}
    try:
        for built, (source, suffix) in objects.items():
            _output(gcc, *FLAGS, f"-D{suffix[1:].upper()}", "-c", str(source), "-o", str(built))
        _output(gcc, "-shared", *map(str, objects), "-o", str(part))
    finally:
        for built in objects:
            built.unlink(missing_ok=True)


def _output(*command: str) -> bytes:
    """What ``command`` prints. Raises OSError with what it said where it fails, or does not end in ``TIMEOUT``."""
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=none, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            out, errors = process.communicate(timeout=TIMEOUT)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what a wrapper around gcc has started
            if isinstance(error, subprocess.TimeoutExpired):
                raise OSError(f"{command[0]} did not end within {TIMEOUT:g} seconds") from error
            raise
    if process.returncode:
        lines = errors.decode(errors="replace").split("\n")
        said = next((line for line in lines if "error" in line), next(filter(None, lines), "it said nothing")).strip()
        raise OSError(f"{command[0]} ended with {process.returncode}: {shortened(said)}")
    return out
