"""predictions.csv: path, label, prediction and confidence of each image, readable by people, spreadsheets and us."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune101.files import as_json, atomic
from finetune101.standalone import csv_cell

COLUMNS = ("path", "label", "prediction", "confidence")
_GUARDED = re.compile("''*[-=+@]")
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")


def name_in_cell(text: str) -> str:
    """The name that ``standalone.csv_cell`` made ``text`` of."""
    plain = text[1:] if _GUARDED.match(text) else text
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), plain)


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of ``file``, names as they are. Raises csv.Error, TypeError or ValueError for a damaged one."""
    with open(file, newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened, strict=True))
    return [{key: value if key == "confidence" else name_in_cell(value) for key, value in row.items()} for row in rows]


def write_pair(folder: Path, ending: str, result: dict[str, Any], rows: Iterable[tuple[str, str, str, float]]) -> None:
    """test{ending}.json with ``result`` and predictions{ending}.csv with ``rows``, both or neither.

    A crash between the two leaves the new test.json, so that no look at the test images is uncounted.
    """
    with atomic(folder / f"predictions{ending}.csv") as table:
        with open(table, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([*map(csv_cell, names), f"{confidence:.4f}"] for *names, confidence in rows)
        with atomic(folder / f"test{ending}.json") as part:
            part.write_text(as_json(result, indent=1) + "\n", encoding="utf-8")
