"""The C files of this folder, built with gcc when first needed (a second) and kept in the cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from finetune101.errors import Refused
from finetune101.files import cache_dir
from finetune101.runs import save_with

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")

SUFFIXES = {torch.bfloat16: "_bf16", torch.float32: "_fp32"}

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "moments": [_POINTER, _LONG, _LONG, _POINTER, _POINTER],
    "gradient_sums": [_POINTER] * 2 + [_LONG] * 2 + [_POINTER] * 2 + [_FLOAT] * 2 + [_POINTER] * 2,
    "apply": [_POINTER] + [_LONG] * 2 + [_POINTER] * 2 + [_FLOAT] * 2 + [_POINTER],
    "input_gradient": [_POINTER] * 2 + [_LONG] * 2 + [_POINTER] * 2 + [_FLOAT] * 2 + [_POINTER] * 3,
    "depthwise_weight_gradient": [_POINTER] * 2 + [_LONG] * 10 + [_POINTER],
    "depthwise_input_gradient": [_POINTER] * 2 + [_LONG] * 10 + [_POINTER],
}


@functools.cache
def compiled() -> Any:
    """The functions of batch_norm.c and depthwise.c, or None where they cannot be built: only with gcc on Linux.

    Each is there for every dtype of ``SUFFIXES``, which ends its name; ``kernel`` finds it.
    """
    gcc = shutil.which("gcc")
    if platform.system() != "Linux" or gcc is None:
        return None
    try:
        target = subprocess.run([gcc, "-march=native", "-Q", "--help=target"], capture_output=True, check=True).stdout
        sources = b"".join(source.read_bytes() for source in SOURCES)
        key = hashlib.sha256(sources + target + " ".join(FLAGS).encode()).hexdigest()[:16]
        file = cache_dir() / f"kernels_{key}.so"
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            with contextlib.suppress(OSError, AttributeError):
                return _load(file)
        save_with(file, lambda part: _build(gcc, part))  # new, or the file there is damaged
        return _load(file)
    except (OSError, Refused, AttributeError, subprocess.CalledProcessError) as error:
        print(f"The quick CPU kernels cannot be built ({error}); training goes on without them.", file=sys.stderr)
        return None


def kernel(name: str, dtype: torch.dtype) -> Any:
    """The function ``name`` for activations of ``dtype``, where ``compiled`` is there."""
    return getattr(compiled(), name + SUFFIXES[dtype])


def _load(file: Path) -> Any:
    found = ctypes.CDLL(str(file))
    for name, kinds in _ARGUMENTS.items():
        for suffix in SUFFIXES.values():
            getattr(found, name + suffix).argtypes, getattr(found, name + suffix).restype = kinds, None
    return found


def _build(gcc: str, part: Path) -> None:
    """Not linked against an OpenMP of its own: the symbols are found in PyTorch's, whose threads it then shares."""
    variants = ((source, suffix) for source in SOURCES for suffix in SUFFIXES.values())
    objects = {part.with_name(f"{part.name}_{source.stem}{suffix}.o"): (source, suffix) for source, suffix in variants}
    try:
        for built, (source, suffix) in objects.items():
            define = f"-D{suffix[1:].upper()}"
            subprocess.run([gcc, *FLAGS, define, "-c", source, "-o", built], capture_output=True, check=True)
        subprocess.run([gcc, "-shared", *objects, "-o", part], capture_output=True, check=True)
    finally:
        for built in objects:
            built.unlink(missing_ok=True)
