"""docs/tutorial.ipynb runs from its first cell to its last, on a few small images."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tiny_data: Path, here: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    book = nbformat.read(NOTEBOOK, as_version=4)
    (place,) = [i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", [])]
    settings = {"size": 64, "cache_size": 64, "batch_size": 8, "epochs": 1, "train_sizes": (64,), "device": "cpu"}
    code = f"DATA = {str(tiny_data)!r}\nSETTINGS = {settings}"
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(code))
    nbclient.NotebookClient(book, timeout=240, resources={"metadata": {"path": str(here)}}).execute()
    shown = {kind for cell in book.cells for one in cell.get("outputs", []) for kind in one.get("data", {})}
    printed = "".join(one.get("text", "") for cell in book.cells for one in cell.get("outputs", []))
    assert "image/png" in shown and "points (" in printed


def test_it_is_kept_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in book.cells)
