"""Whatever a file that is read holds, a command ends right, or with one sentence and exit code 1 or 2."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune101.cli.main import main

LIMIT = 20.0  # seconds of processor time of one command: none may hang
EXAMPLES = int(os.environ.get("FINETUNE101_EXAMPLES", "0"))  # of each kind of file, for a longer search


def examples(count: int) -> settings:
    """As many as ``count`` examples, the same ones each time; any number where FINETUNE101_EXAMPLES asks for it."""
    return settings(
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        max_examples=EXAMPLES or count,
        suppress_health_check=list(HealthCheck),
    )


def outcome(argv: Sequence[str]) -> tuple[int, str]:
    """(exit code, what stands on stderr) of a command that must end in a second or so, without an exception."""
    said, began = io.StringIO(), time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = main(list(argv))
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Exception:
        pytest.fail(f"{' '.join(argv)}\n{traceback.format_exc()}")
    took = time.process_time() - began
    assert took < LIMIT, f"{argv} took {took:.0f} s"
    assert code in (0, 1, 2), code
    lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    assert len(lines) == (code == 2), said.getvalue()
    assert all(letter.isprintable() for line in lines for letter in line.encode("utf-8", "replace").decode()), lines
    return code, said.getvalue()


@pytest.fixture(scope="module")
def made(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two runs, a comparison, a study and a search of one epoch each were made."""
    folder = tmp_path_factory.mktemp("schemas") / "work"
    folder.mkdir()
    tiny = [
        "--data", str(tiny_data), "--model", "squeezenet1_1", "--no-pretrain", "--size", "32", "--threads", "1",
        "--batch-size", "16", "--epochs", "1",
    ]  # fmt: skip
    with contextlib.chdir(folder):
        for seed in ("0", "1"):
            assert outcome(["train", "--exp", f"run{seed}", "--seed", seed, *tiny])[0] == 0
            assert outcome(["evaluate", f"run{seed}"])[0] == 0
        assert outcome(["compare", "run0", "run1"])[0] == 0
        assert outcome(["search", "--exp", "search", "--grid", "lr=0.01,0.02", *tiny])[0] == 0
        study = [flag for flag in tiny if flag != "--no-pretrain"]
        study[study.index("--model")] = "--models"
        assert outcome(["study", "--exp", "study", "--arms", "scratch", "--seeds", "2", *study])[0] == 0
    (folder / "tiny").symlink_to(tiny_data)
    recipe = yaml.safe_load((folder / "runs/search/winner.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "recipe.toml").write_text('[optim]\nlr = 0.1\nschedule = "cosine"\n[model]\nprobe_l2 = [0.1, 1]\n')
    (folder / "space.yaml").write_text("lr: 1e-4..1e-1:log\nbatch_size: [8, 16]\nschedule: [step, cosine]\n")
    return folder


IMAGE = "tiny/ball/image_0001.jpg"
PREDICT = ["predict", "runs/run0", IMAGE]
RECIPE = ["train", "--exp", "new", "--data", "missing", "--config"]  # ends, where the file is right, at the images
READERS: dict[str, list[str]] = {  # file -> a quick command that reads it
    "recipe.yaml": [*RECIPE, "recipe.yaml"],
    "recipe.toml": [*RECIPE, "recipe.toml"],
    "recipe.json": [*RECIPE, "recipe.json"],
    "space.yaml": ["search", "--exp", "new", "--data", "missing", "--dry-run", "--space", "space.yaml"],
    "runs/run0/config.json": PREDICT,
    "runs/run0/env.json": PREDICT,
    "runs/run0/split.json": ["evaluate", "run0", "--subset", "val"],
    "runs/run0/metrics.jsonl": ["report", "run0", "--no-gallery"],
    "runs/run0/test.json": ["compare", "run0", "run1"],
    "runs/run0/predictions.csv": ["compare", "run0", "run1"],
    "runs/run0/best.safetensors": PREDICT,
    "runs/run0/last.pt": ["train", "--exp", "run0", "--resume"],
    "runs/study/study.json": ["report", "runs/study", "--no-gallery"],
    "runs/search/search.json": ["search", "report", "runs/search"],
    "comparison/comparison.json": ["report", "comparison", "--no-gallery"],
}
WRITTEN = ("comparison/", "report/", "runs/search/report/", "runs/run0/")  # folders that these commands may write to
HOSTILE: list[Any] = [
    None, True, 0, -1, 1, 2.5, 1e308, 10**400, 10**17, "", "x", "12", "\ud800", "\x1b[31m", "../../../escape", "/esc",
    "\0", "a" * 5000, [], {}, [[]], [None], {"": None}, {"x": {"y": []}},
]  # fmt: skip
HOSTILE += [json.loads("[" * 49 + "]" * 49), json.loads("[" * 400 + "]" * 400)]


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Every (table or list, key) within ``value``."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [spot for key in keys for spot in [(value, key), *spots(value[key])]]


def mutated(value: Any, draw: Callable[..., Any]) -> Any:
    """``value`` with one to three places removed, doubled or changed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        held, key = draw(st.sampled_from(spots(value) or [([value], 0)]))
        kind = draw(st.sampled_from(["delete", "double", "change", "change", "change"]))
        if kind == "delete":
            del held[key]
        elif kind == "double" and isinstance(held, list):
            held.append(held[key])
        else:
            held[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    return value


def damaged(content: bytes, draw: Callable[..., Any]) -> bytes:
    """``content`` cut off, with random bytes in it, or with a piece given twice."""
    a, b = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    kind = draw(st.sampled_from(["cut", "insert", "replace", "double", "all"]))
    noise = draw(st.one_of(st.binary(max_size=40), st.sampled_from([b"\0", b"\xff", b"NaN", b"1e999", b"[" * 9999])))
    if kind == "cut":
        return content[:a]
    if kind == "all":
        return noise
    middle = {"insert": noise + content[a:b], "replace": noise, "double": 2 * content[a:b]}[kind]
    return content[:a] + middle + content[b:]


def as_file(name: str, content: bytes, draw: Callable[..., Any]) -> bytes:
    """``content`` of the file ``name`` changed: most often in its values, else in its bytes."""
    kind = name.rsplit(".", 1)[1]
    if draw(st.integers(0, 3)) == 0 or kind == "toml":
        return damaged(content, draw)
    if kind == "json":
        return json.dumps(mutated(json.loads(content), draw)).encode()
    if kind == "yaml":
        return yaml.safe_dump(mutated(yaml.safe_load(content), draw)).encode("utf-8", "replace")
    if kind in ("jsonl", "csv"):
        rows = [line.split(",") for line in content.decode().splitlines()]
        if kind == "jsonl":
            rows = mutated([json.loads(line) for line in content.decode().splitlines()], draw)
            return "".join(json.dumps(row) + "\n" for row in rows).encode()
        lines = (row if isinstance(row, list) else [row] for row in mutated(rows, draw))
        return "\n".join(",".join(map(str, row)) for row in lines).encode("utf-8", "replace")
    if kind == "safetensors":
        size = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:size])
        said = {key: json.loads(text) if text[0] in "[{" else text for key, text in header["__metadata__"].items()}
        said = {key: one if isinstance(one, str) else json.dumps(one) for key, one in mutated(said, draw).items()}
        text = json.dumps({**header, "__metadata__": said}).encode()
        return len(text).to_bytes(8, "little") + text + content[size:]
    state = torch.load(io.BytesIO(content), weights_only=True)
    records = json.loads(state["records"])
    state = {**state, "records": json.dumps(mutated(records, draw))} if draw(st.booleans()) else {
        key: one for key, one in state.items() if key != draw(st.sampled_from(sorted(state)))
    }  # fmt: skip
    torch.save(state, out := io.BytesIO())
    return out.getvalue()


def files(folder: Path) -> set[str]:
    """All files below ``folder``, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def try_changes(made: Path, name: str, count: int) -> None:
    """Changes the file ``name`` in ``count`` ways and runs the command that reads it; restores all files."""
    kept = {file: (made / file).read_bytes() for file in files(made) if (made / file).stat().st_size < 10**7}
    before = files(made.parent)

    @examples(count)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        (made / name).write_bytes(as_file(name, kept[name], data.draw))
        try:
            with contextlib.chdir(made):
                outcome(READERS[name])
            new = {file.removeprefix(f"{made.name}/") for file in files(made.parent) - before}
            assert all(file.startswith(WRITTEN) for file in new), new
        finally:
            for file, content in kept.items():
                if not (made / file).is_file() or (made / file).read_bytes() != content:
                    (made / file).write_bytes(content)

    with contextlib.chdir(made):
        code, said = outcome(READERS[name])
        assert code == (2 if "missing" in READERS[name] else 0), said
    check()


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_ends_right_or_in_one_sentence(made: Path, name: str) -> None:
    draws = READERS[name][0] in ("report", "compare") or "report" in READERS[name]  # pictures, a second each
    try_changes(made, name, 3 if draws else 8 if name.startswith("runs") else 15)


@pytest.mark.skipif(not EXAMPLES, reason="FINETUNE101_EXAMPLES, such as 50, asks for a longer search")
@pytest.mark.parametrize("name", READERS)
def test_many_changes_of_a_file_end_right_or_in_one_sentence(made: Path, name: str) -> None:
    try_changes(made, name, EXAMPLES)
