"""Predictions of image files as text, CSV, JSON and Parquet; each is written image by image."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from finetune101 import standalone
from finetune101.deploy.inputs import Inputs
from finetune101.deploy.prediction import Prediction
from finetune101.errors import Refused, escaped
from finetune101.files import atomic, check_writable
from finetune101.standalone import DIGITS, Label, csv_header, text_lines

ENDINGS = (".csv", ".json", ".parquet")
ROWS_AT_ONCE = 1000  # of a Parquet file


@dataclass(frozen=True)
class Column:
    """One value of an image in a table: ``kind`` is str, float or bool; None is an empty cell."""

    name: str
    kind: type
    value: Callable[[Prediction], Any]


COLUMNS: tuple[Column, ...] = (
    Column("unlike", bool, lambda one: one.unlike),
    Column("unlike_score", float, lambda one: None if one.unlike_score is None else round(one.unlike_score, DIGITS)),
)
"""What Parquet and JSON hold of an image after its path and its classes."""


def table_columns(width: int) -> list[Column]:
    """The columns of a Parquet table, named as ``standalone.csv_header`` says."""
    path, *classes = csv_header(width)[: 1 + 2 * width]
    return [
        Column(path, str, lambda one: one.source),
        *(column for k in range(width) for column in _class_columns(k, classes[2 * k], classes[2 * k + 1])),
        *COLUMNS,
    ]


def _class_columns(k: int, name: str, share: str) -> tuple[Column, Column]:
    """The columns of the class at place ``k``, empty for an image with fewer classes."""

    def value(one: Prediction, part: int) -> str | float | None:
        return one.classes[k][part] if k < len(one.classes) else None

    return Column(name, str, lambda one: value(one, 0)), Column(share, float, lambda one: value(one, 1))


def write_text(predictions: Iterable[Prediction], out: TextIO) -> None:
    """Lines for a terminal, as ``standalone.text_lines`` gives them."""
    for one in predictions:
        out.write("\n".join(text_lines(as_label(one), escaped)) + "\n")


def write_csv(predictions: Iterable[Prediction], out: TextIO, width: int) -> None:
    """A line per image, as ``standalone.write_csv`` writes it."""
    standalone.write_csv(map(as_label, predictions), out, width)


def as_label(one: Prediction) -> Label:
    """``one`` for ``standalone``."""
    return Label(one.source, one.classes, one.unlike, one.unlike_score)


def write_json(predictions: Iterable[Prediction], out: TextIO, inputs: Inputs) -> None:
    """An object in ASCII, an image per line, ``COLUMNS`` beside its classes.

    {"predictions": [{"path", "classes": [{"class", "probability"}]}], "failed": [{"path", "reason"}],
    "left_out": {reason: number}}
    """
    out.write('{"predictions": [')
    for number, one in enumerate(predictions):
        classes = [{"class": name, "probability": round(probability, DIGITS)} for name, probability in one.classes]
        row = {"path": one.source, "classes": classes, **{column.name: column.value(one) for column in COLUMNS}}
        out.write(f"{',' if number else ''}\n {json.dumps(row)}")
    failed = json.dumps([{"path": path, "reason": reason} for path, reason in inputs.failed])
    left_out = json.dumps({reason: len(paths) for reason, paths in inputs.left_out.items()})
    out.write(f'\n],\n"failed": {failed},\n"left_out": {left_out}}}\n')


def write_parquet(predictions: Iterable[Prediction], file: Path, width: int) -> None:
    """``table_columns`` and a row per image, ``ROWS_AT_ONCE`` in memory. Raises Refused without pyarrow."""
    pa, parquet = pyarrow_modules()
    columns = table_columns(width)
    kinds = {str: pa.string(), float: pa.float64(), bool: pa.bool_()}
    schema = pa.schema([(column.name, kinds[column.kind]) for column in columns])
    rest = iter(predictions)
    with parquet.ParquetWriter(file, schema) as writer:
        while rows := list(itertools.islice(rest, ROWS_AT_ONCE)):
            values = [[plain_text(column.value(one)) for one in rows] for column in columns]
            writer.write_table(pa.table(values, schema=schema))


def check_table_file(file: Path, overwrite: bool) -> None:
    """Raises Refused for an unknown ending, a file that exists unless ``overwrite``, and Parquet without pyarrow."""
    check_out_file(file, ENDINGS, overwrite, example="labels")
    if file.suffix.lower() == ".parquet":
        pyarrow_modules()


def check_out_file(file: Path, endings: Sequence[str], overwrite: bool, *, example: str) -> None:
    """Before long work: raises Refused for another ending, a folder, a place that cannot be written, and a file that
    exists unless ``overwrite``; ``example`` is a name without ending."""
    name = escaped(str(file))
    if file.suffix.lower() not in endings:
        listed = f"neither {' nor '.join(endings)}" if len(endings) > 1 else f"something other than {endings[0]}"
        raise Refused(f"--out {name} ends in {listed}; give a name such as {example}{endings[0]}")
    if file.is_dir():
        raise Refused(f"--out {name} is a folder; name a file")
    if file.exists() and not overwrite:
        raise Refused(f"{name} exists; give another --out, or --overwrite")
    check_writable(file, file.parent, "--out")


def write_table_file(predictions: Iterable[Prediction], file: Path, inputs: Inputs, width: int) -> None:
    """Writes ``file`` in the format of its ending, whole or not at all. Raises Refused as ``check_table_file``."""
    with atomic(file) as part:
        if file.suffix.lower() == ".parquet":
            write_parquet(predictions, part, width)
            return
        with open(part, "w", newline="", encoding="utf-8") as out:
            if file.suffix.lower() == ".json":
                write_json(predictions, out, inputs)
            else:
                write_csv(predictions, out, width)


def plain_text(value: Any) -> Any:
    """``value`` as Parquet takes it: bytes of a name that are not UTF-8 as \\udcNN."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def pyarrow_modules() -> Sequence[Any]:
    """The modules pyarrow and pyarrow.parquet. Raises Refused where they are not installed."""
    try:
        if importlib.util.find_spec("pyarrow") is None:
            raise ModuleNotFoundError("pyarrow")
        import pyarrow
        import pyarrow.parquet
    except (ImportError, ValueError) as error:  # ValueError: find_spec's, of a module that is blocked
        raise Refused(
            "a .parquet file needs pyarrow; pip install 'finetune101[parquet]', or give another ending"
        ) from error
    return pyarrow, pyarrow.parquet
