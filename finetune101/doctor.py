"""What a training needs of this machine: what is there, what is wrong with it, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune101.config import SystemConfig
from finetune101.data.images import find_data
from finetune101.data.layouts import FOLDER, folders_in
from finetune101.deploy.released_files import RELEASED, available
from finetune101.errors import Refused, escaped, shortened
from finetune101.files import WRITE_REMEDIES, cache_dir, writable_place
from finetune101.host import GPU_FILES, has_gpu, thread_count
from finetune101.recipes import RECIPES

PYTHONS = ((3, 11), (3, 13))
"""The first and the last Python that the package supports."""
LEAST_FREE = 0.3e9
"""Bytes: the files of one training of a small network. With less a training cannot end."""
FOR_IMAGES = 2e9
"""Bytes: Caltech-101 decoded at 224 px takes 1.3 GB in the folder of caches."""
# it is measured, nothing is written there
SHARED_MEMORY = Path("/dev/shm")  # nosec B108
LEAST_SHARED = 1e9
"""Bytes of shared memory that the worker processes of a GPU training pass their batches in; Docker gives 64 MB."""
C_PROGRAM = "#include <math.h>\n#include <omp.h>\nfloat root(float x) { return sqrtf(x) * omp_get_max_threads(); }\n"
INSTALL_GCC = {
    "apt-get": "sudo apt-get install gcc libc6-dev",
    "dnf": "sudo dnf install gcc",
    "pacman": "sudo pacman -S gcc",
    "apk": "sudo apk add gcc musl-dev libgomp",
}

State = Literal["ok", "note", "warning", "error"]
"""note: fine, with something to know; warning: training works, with something missing or slower; error: it cannot."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    text: str
    """What is there, or what is wrong."""
    state: State = "ok"
    remedy: str = ""
    """A command, or what else mends it; "" where nothing is wrong."""


def examine_machine(data: str | None = None, runs: str = "runs") -> Iterator[Check]:
    """Looks at everything that a training needs, one thing after the other; changes nothing and downloads nothing.

    ``data`` and ``runs`` are the folders of images and of runs, as ``train`` takes them. Raises Refused where the
    variables of torchrun are set without torchrun.
    """
    yield check_python()
    packages = _tried("packages", check_packages)
    yield packages
    torch = check_torch()
    yield torch
    if torch.state != "error":
        yield _tried("GPU", check_gpu)
        yield _tried("precision", _precision)
    yield _tried("cores", _cores)
    yield _tried("compiler", check_compiler)
    if torch.state != "error" and has_gpu():
        yield check_shared_memory()
    yield from check_folders(Path(runs))
    yield _tried("data", lambda: check_data(data))
    yield _tried("released", _released)
    if "error" not in (torch.state, packages.state):
        yield _tried("ImageNet", _imagenet)


def _tried(name: str, check: Callable[[], Check]) -> Check:
    """The line of ``check``, also where the system lets it not look: the other checks go on."""
    try:
        return check()
    except OSError as error:
        remedy = WRITE_REMEDIES.get(error.errno or 0, "allow this user to read it")
        return Check(name, f"it cannot be looked at: {error.strerror or error} ({error.filename})", "warning", remedy)


def can_train(checks: Iterable[Check]) -> bool:
    """Whether nothing is in the way of a training."""
    return all(check.state != "error" for check in checks)


def check_lines(check: Check) -> list[str]:
    """``check`` for a terminal: state, name and text, and below it what mends it."""
    mark = {"ok": "ok", "note": "note", "warning": "!", "error": "ERROR"}[check.state]
    lines = [f"{mark:6} {check.name:14} {escaped(check.text)}"]
    return [*lines, *([f"{'':21} mend it: {escaped(check.remedy)}"] if check.remedy else [])]


def verdict(checks: Sequence[Check]) -> str:
    """One sentence about all ``checks``."""
    errors = [check.name for check in checks if check.state == "error"]
    warnings = [check.name for check in checks if check.state == "warning"]
    if errors:
        return f"Training cannot work here: mend {', '.join(errors)} first."
    return f"Training works here; worth mending: {', '.join(warnings)}." if warnings else "Training works here."


def checks_as_table(checks: Sequence[Check]) -> dict[str, Any]:
    """``checks`` for programs."""
    rows = [vars(check) for check in checks]
    return {"can_train": can_train(checks), "verdict": verdict(checks), "checks": rows}


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """Whether this Python is one that the package supports."""
    first, last = (".".join(map(str, one)) for one in PYTHONS)
    text = f"{'.'.join(map(str, version))}, {sys.executable}"
    remedy = f"make an environment with Python {last}: python{last} -m venv .venv"
    if sys.maxsize < 2**32:
        return Check("Python", f"{text}: 32 bit, for which there is no PyTorch", "error", f"{remedy} (64 bit)")
    if not PYTHONS[0] <= version[:2] <= PYTHONS[1]:
        return Check("Python", f"{text}; finetune101 supports {first} to {last}", "warning", remedy)
    return Check("Python", text)


def check_packages(needed: Sequence[str] | None = None) -> Check:
    """Whether every package that ``needed`` names (requirements, as pip takes them) is installed, in a fitting version.

    Without ``needed`` they are those that finetune101 itself asks pip for.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:  # doctor starts without any package
        return Check("packages", "packaging is missing", "error", "pip install packaging")
    if needed is None:
        try:
            needed = importlib.metadata.requires("finetune101") or []
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path of Python
            return Check("packages", "finetune101 is not installed by pip: what it needs is not looked at")
    own = [line for line in map(Requirement, needed) if line.marker is None or line.marker.evaluate({"extra": ""})]
    missing = [line for line in own if not _version(line.name)]
    others = [line for line in own if line not in missing and not line.specifier.contains(_version(line.name), True)]
    if wrong := [*missing, *others]:
        parts = [f"missing: {', '.join(f'{line.name}{line.specifier}' for line in missing)}"] if missing else []
        parts += [f"{line.name} {_version(line.name)} is installed, {line.specifier} needed" for line in others]
        remedy = _pip_install([f"{line.name}{line.specifier}" for line in wrong])
        return Check("packages", f"{len(wrong)} of {len(own)} do not fit: {'; '.join(parts)}", "error", remedy)
    return Check("packages", f"all {len(own)} that finetune101 needs")


def check_torch() -> Check:
    """Whether PyTorch can be loaded, and fits its torchvision."""
    again = "pip install --force-reinstall torch torchvision"
    try:
        import torch
    except Exception as error:  # a library that is missing or of another machine can raise nearly anything
        return Check("PyTorch", f"it cannot be loaded: {shortened(' '.join(str(error).split()))}", "error", again)
    text = f"{torch.__version__}, torchvision {_version('torchvision') or 'missing'}"
    return torchvision_mismatch(_requirements("torchvision"), torch.__version__) or Check("PyTorch", text)


def torchvision_mismatch(requirements: Iterable[str], torch: str) -> Check | None:
    """The check of a torchvision whose ``requirements`` name another PyTorch than version ``torch``; None where they
    fit."""
    wanted = next((line.partition("==")[2].split(";")[0].strip() for line in requirements if "torch==" in line), "")
    if not wanted or wanted.split("+")[0] == torch.split("+")[0]:
        return None
    text = f"torchvision {_version('torchvision')} was built for PyTorch {wanted}, and {torch} is installed"
    return Check("PyTorch", text, "error", f"pip install torch=={wanted}")


def check_gpu(files: Sequence[str] = GPU_FILES) -> Check:
    """Whether there is a GPU that this PyTorch can use; the system has one where one of the ``files`` exists."""
    import torch

    if has_gpu():
        count, memory = torch.cuda.device_count(), torch.cuda.get_device_properties(0).total_memory
        return Check("GPU", f"{count} x {torch.cuda.get_device_name(0)}, {memory / 1e9:.0f} GB")
    if torch.backends.mps.is_available():
        return Check("GPU", "the Mac's own (MPS)")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return Check("GPU", "switched off by CUDA_VISIBLE_DEVICES")
    if any(map(os.path.exists, files)):
        text = f"there is one, but PyTorch {torch.__version__} cannot use it: it is a build for the processor alone, or"
        remedy = "look at nvidia-smi, then install the PyTorch that fits (pytorch.org, Get Started)"
        return Check("GPU", f"{text} the driver is too old for it", "warning", remedy)
    return Check("GPU", "none: networks are trained on the processor")


def _precision() -> Check:
    from finetune101.machine import detect

    world = detect(SystemConfig())
    reason = ": this processor has no bf16" if (world.device.type, world.precision) == ("cpu", "fp32") else ""
    return Check("precision", f"{world.precision} on {world.device.type}{reason}")


def _cores() -> Check:
    usable, present = thread_count(), os.cpu_count() or 1
    why = " (affinity, a container's quota, SLURM or OMP_NUM_THREADS keep the others)" if usable < present else ""
    return Check("cores", f"{usable} of {present}{why}")


def check_compiler() -> Check:
    """Whether gcc builds a library with OpenMP: the quick CPU kernels of finetune101 are built when first needed."""
    if platform.system() != "Linux":
        return Check("compiler", f"not needed on {platform.system()}")
    slower = "batch norms and depthwise convolutions on the processor are PyTorch's own, which train more slowly"
    manager = next((name for name in INSTALL_GCC if shutil.which(name)), "")
    remedy = INSTALL_GCC.get(manager, "install gcc")
    gcc = shutil.which("gcc")
    if gcc is None:
        return Check("compiler", f"there is no gcc: {slower}", "warning", remedy)
    try:
        with tempfile.TemporaryDirectory(prefix="finetune101-") as folder:
            words = [gcc, "-x", "c", "-", "-shared", "-fPIC", "-fopenmp", "-lm", "-o", str(Path(folder) / "built.so")]
            subprocess.run(words, input=C_PROGRAM, capture_output=True, text=True, check=True, timeout=20)
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines() or ["it says nothing"]
        return Check("compiler", f"gcc builds nothing ({shortened(said[0])}): {slower}", "warning", remedy)
    except OSError as error:
        text = f"gcc could not be tried ({shortened(str(error))}): {slower}"
        return Check("compiler", text, "warning", "export TMPDIR=FOLDER")
    return Check("compiler", gcc)


def check_shared_memory(folder: Path = SHARED_MEMORY, least: float = LEAST_SHARED) -> Check:
    """Whether the worker processes that feed a GPU have ``least`` bytes of shared memory to pass batches in."""
    try:
        total = shutil.disk_usage(folder).total
    except OSError:
        return Check("shared memory", f"this system has no {folder}")
    if total < least:
        text = f"{folder} has {total / 1e6:.0f} MB: the processes that prepare images for the GPU may end"
        remedy = f"in Docker: docker run --shm-size=2g ...; else: sudo mount -o remount,size=2G {folder}"
        return Check("shared memory", text, "warning", remedy)
    return Check("shared memory", f"{total / 1e9:.1f} GB")


def check_folders(runs: Path, least: float = LEAST_FREE, for_images: float = FOR_IMAGES) -> Iterator[Check]:
    """Whether the folders of runs, of caches and of temporary files can be written, and have room.

    ``least``: bytes that must be free for runs; ``for_images``: bytes that decoded images of Caltech-101 take.
    """
    yield _folder("runs", runs, least, "error", "give another folder: --runs FOLDER")
    try:
        caches = cache_dir()
    except Refused as error:
        yield Check("caches", str(error), "error", "export FINETUNE101_CACHE=FOLDER")
    else:
        remedy = "export FINETUNE101_CACHE=FOLDER (on a disk with room), or finetune101 cache clear"
        yield _folder("caches", caches, for_images, "warning", remedy)
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        yield Check("temporary", str(error), "error", "export TMPDIR=FOLDER")
    else:
        yield _folder("temporary", temporary, least, "warning", "export TMPDIR=FOLDER")


def _folder(name: str, folder: Path, wanted: float, otherwise: State, remedy: str) -> Check:
    """The check of a folder, or of the one that it would be made in; ``otherwise`` is the state of one that is of no
    use."""
    try:
        free = shutil.disk_usage(writable_place(folder)).free
    except OSError as error:
        return Check(name, f"{folder} cannot be written ({error.strerror})", otherwise, remedy)
    if free < wanted:
        text = f"{folder} has {free / 1e9:.2f} GB free, and needs {wanted / 1e9:.1f}"
        return Check(name, text, otherwise, f"free some space, or {remedy}")
    return Check(name, f"{folder}, {free / 1e9:.0f} GB free")


def check_data(data: str | None = None) -> Check:
    """Whether there are images to train on, where ``train`` looks for them; without a place that was named, a note."""
    try:
        root = find_data(data)
        return Check("data", f"{root}: {len(folders_in(root))} folders")
    except Refused as error:
        if not (data or os.environ.get("FINETUNE101_DATA") or os.path.lexists(Path("data") / FOLDER)):
            text = "none named: give --data FOLDER, your photos in one folder per class, or get Caltech-101 by"
            return Check("data", f"{text} finetune101 data download", "note")
        text, _, remedy = str(error).partition("; ")
        return Check("data", text, "error", remedy)


def _released() -> Check:
    present = available()
    if missing := [name for name in RELEASED if name not in present]:
        remedy = "install finetune101 again from its checkout or wheel"
        return Check("released", f"not in this package: {', '.join(missing)}", "warning", remedy)
    return Check("released", ", ".join(present))


def _imagenet() -> Check:
    """Whether the recipes that start from ImageNet weights find theirs; weights of a package are never downloaded."""
    from finetune101.models.build import is_installed
    from finetune101.models.table import Package, lookup, names

    def missing_packages(name: str) -> set[str]:
        weights = lookup(name).weights
        if isinstance(weights, tuple):
            return {package for part in weights for package in missing_packages(part)}
        if not isinstance(weights, Package) or is_installed(name):
            return set()
        return {f"{weights.project}=={weights.version}"}

    settings = {name: recipe("").model for name, recipe in RECIPES.items()}
    lacks = {name: missing_packages(model.name) for name, model in settings.items() if model.pretrain}
    if recipes := [name for name, packages in lacks.items() if packages]:
        text = f"those of the recipe {', '.join(recipes)} are not on this machine"
        return Check("ImageNet", text, "warning", _pip_install(sorted(set().union(*lacks.values()))))
    present = ", ".join(name for name in names() if is_installed(name))
    return Check("ImageNet", f"weights of {present}; those of other networks are downloaded when first used")


def _pip_install(requirements: Sequence[str]) -> str:
    """The command that installs ``requirements``, in a form that every shell takes."""
    return " ".join(["pip install", *(f'"{line}"' if re.search("[<>!~]", line) else line for line in requirements)])


def _version(package: str) -> str:
    """The installed version of ``package``; "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""


def _requirements(package: str) -> list[str]:
    try:
        return importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
