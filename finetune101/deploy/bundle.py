"""A folder that labels photos on a machine without finetune101 and without PyTorch: the network and one program."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from finetune101 import standalone
from finetune101.deploy.card import write_card
from finetune101.deploy.export import Exported, Source, export_network
from finetune101.deploy.released_files import RELEASED
from finetune101.errors import Refused
from finetune101.run import Run, check_folder

NEEDS = ("numpy", "pillow", "onnxruntime")
"""What the program imports: the lines of requirements.txt, with the versions that are installed here."""
PROGRAM = "predict.py"
USE = f"""
## In this folder

The network is also here as `network.onnx`, with a program that needs neither finetune101 nor PyTorch:

```sh
pip install -r requirements.txt
python {PROGRAM} photos/ --out labels.csv
```
"""
"""What the card of a bundle says in addition."""


def export_bundle(
    source: Source, out: Path, run: Run | None = None, parity: str | None = None, overwrite: bool = False
) -> Exported:
    """Writes network.onnx, predict.py, requirements.txt and card.md into the folder ``out``.

    predict.py is ``standalone.py``. ``run`` is the run of the network; without it only a released network gets a card.
    Raises Refused for a folder that is there unless ``overwrite``, and as ``export_network`` does.
    """
    check_folder(out)
    if out.exists() and not overwrite:
        raise Refused(f"{out} exists; give another --out, or --overwrite")
    started = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".finetune101_", dir=out.parent) as name:
        made, notes = Path(name), []
        exported = export_network(source, made / "network.onnx", parity=parity)
        shutil.copyfile(standalone.__file__, made / PROGRAM)
        lines = [f"{package}=={version(package)}\n" for package in NEEDS]
        (made / "requirements.txt").write_text("".join(lines), encoding="utf-8")
        if run or source.network.name in RELEASED:
            card = write_card(source.network.name, run, made / "card.md")
            card.write_text(card.read_text(encoding="utf-8") + USE, encoding="utf-8")
        else:
            notes.append("No card: a checkpoint alone does not say how it was trained")
        out.mkdir(exist_ok=True)
        for file in made.iterdir():
            os.replace(file, out / file.name)
    notes += [f"Try it: cd {shlex.quote(str(out))} && pip install -r requirements.txt"]
    notes += [f"  python {PROGRAM} photos/ --out labels.csv"]
    notes = [*exported.notes, *notes]
    return replace(exported, file=out, format="bundle", seconds=time.perf_counter() - started, notes=tuple(notes))
