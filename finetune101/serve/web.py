"""An exported network as a folder for any static web host: one page, the network runs in the visitor's browser."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from finetune101.deploy.export import Exported, Source, export_network
from finetune101.deploy.onnx_network import read_exported_info
from finetune101.errors import Refused
from finetune101.files import atomic
from finetune101.run import check_folder

TEMPLATES = Path(__file__).parent / "templates"
RUNTIME = Path("node_modules/onnxruntime-web/dist")
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PAGE_FILES = {"page.css": "page.css", "page.js": "page.js", "words.js": "words.js", "browser.js": "backend.js"}
"""File in ``templates/`` -> its name in the folder."""
MEGABYTES = 100  # of a picture: more than a browser decodes
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)


def write_web(onnx_file: Path, folder: Path, runtime: Path = RUNTIME) -> Path:
    """Writes the page, the network and onnxruntime-web into ``folder``; returns the page.

    ``runtime`` is the folder ``dist`` of the npm package onnxruntime-web; three of its files are copied. Raises Refused
    where they are not there, and for a file that finetune101 did not export or that takes resized pictures.
    """
    info = read_exported_info(onnx_file)
    if info.input != "images":
        raise Refused(f"{onnx_file} takes resized pictures only; export it without --resized")
    find_runtime(runtime)
    check_folder(folder)
    network = {"name": info.name or onnx_file.stem, "model": info.model, "classes": info.classes}
    page = (TEMPLATES / "page.html").read_text(encoding="utf-8")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    about = {**network, "megabytes": MEGABYTES, "explains": False, "unlike_above": info.unlike_threshold}
    texts = {
        "index.html": page.replace("<!-- policy -->", policy),
        "network.json": json.dumps(about, ensure_ascii=False),
        **{new: (TEMPLATES / name).read_text(encoding="utf-8") for name, new in PAGE_FILES.items()},
    }
    for name, text in texts.items():
        with atomic(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    copies = {"network.onnx": onnx_file, **{name: runtime / name for name in RUNTIME_FILES}}
    for name, source in copies.items():
        with atomic(folder / name) as part:
            shutil.copyfile(source, part)
    return folder / "index.html"


def export_web(
    source: Source, out: Path, runtime: Path = RUNTIME, parity: str | None = None, overwrite: bool = False
) -> Exported:
    """Exports the network of ``source`` into the folder ``out`` with its page; see ``export_network`` for ``parity``.

    Raises Refused as ``write_web`` and ``export_network`` do.
    """
    if out.exists() and not overwrite:
        raise Refused(f"{out} exists; give another --out, or --overwrite")
    started = time.perf_counter()
    find_runtime(runtime)  # before the work
    with tempfile.TemporaryDirectory(prefix="finetune101_") as name:
        exported = export_network(source, Path(name) / "network.onnx", parity=parity)
        write_web(exported.file, out, runtime)
    notes = (*exported.notes, f"Try it: python -m http.server --directory {shlex.quote(str(out))}")
    return replace(exported, file=out, format="web", seconds=time.perf_counter() - started, notes=notes)


def find_runtime(folder: Path) -> Path:
    """``folder`` itself. Raises Refused where onnxruntime-web is not in it."""
    missing = [name for name in RUNTIME_FILES if not (folder / name).is_file()]
    if missing:
        raise Refused(
            f"{folder} does not hold {missing[0]} of onnxruntime-web; get it by: npm install onnxruntime-web, or give "
            "its folder dist by --runtime"
        )
    return folder
