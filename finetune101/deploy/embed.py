"""Features and probabilities of many images as a table: for clustering, searching and models of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from finetune101.config import Count
from finetune101.deploy.inputs import Inputs
from finetune101.deploy.onnx_network import OnnxNetwork
from finetune101.deploy.tables import check_out_file, plain_text, pyarrow_modules
from finetune101.errors import Refused
from finetune101.files import as_json, atomic, typed

if TYPE_CHECKING:
    from finetune101.evaluation.checkpoint import TrainedNetwork

SUFFIXES = (".npz", ".parquet")


@dataclass(frozen=True)
class Embedded:
    """What a network sees in N images."""

    paths: list[str]
    """As they were given or found."""
    features: NDArray[np.float32]
    """(N, D): the input of the output layer."""
    probabilities: NDArray[np.float32]
    """(N, classes), calibrated, each row from 0 to 1."""
    classes: list[str]
    """The names of the columns of ``probabilities``."""


def embed_files(network: TrainedNetwork | OnnxNetwork, inputs: Inputs, batch_size: int = 64) -> Embedded:
    """Features and probabilities of every image in ``inputs``, decoded as ``predict`` does.

    (path, reason) of images that cannot be read are added to ``inputs.failed``. Raises Refused where no image is left,
    and for a ``batch_size`` below 1.
    """
    batch_size = typed(Count, batch_size, "--batch-size is")
    paths: list[str] = []
    features, probabilities = [], []
    rows = _exported_rows if isinstance(network, OnnxNetwork) else _rows
    with tqdm(total=len(inputs.files), unit="img", leave=False, disable=None) as bar:
        for good, values, shares in rows(network, inputs, batch_size):
            paths += good
            features.append(values)
            probabilities.append(shares)
            bar.update(len(good))
    if not paths:
        raise Refused(
            f"no image can be read ({inputs.failed[0][1] if inputs.failed else 'none is there'}); give others"
        )
    return Embedded(paths, np.concatenate(features), np.concatenate(probabilities), list(network.classes))


Rows = Iterator[tuple[list[str], NDArray[np.float32], NDArray[np.float32]]]
"""Paths of images, their features and their probabilities."""


def _exported_rows(network: Any, inputs: Inputs, batch_size: int) -> Rows:
    for paths, pixels in network.decoded(inputs.files, inputs.failed, batch_size):
        outputs = network.outputs(pixels)
        yield paths, outputs.features, outputs.probabilities


def _rows(network: Any, inputs: Inputs, batch_size: int) -> Rows:
    from finetune101.evaluation import metrics
    from finetune101.evaluation.features import FeatureExtractor
    from finetune101.evaluation.photos import decoded

    extract, files = FeatureExtractor(network), list(inputs.files)
    for paths, x in decoded(files, network.preprocessing, network.world, batch_size, inputs.failed):
        values, output = extract(x)
        shares = metrics.probabilities(output.cpu(), network.temperature or 1.0).float().numpy()
        yield paths, values.cpu().numpy(), shares


def check_features_file(out: Path, *, overwrite: bool = False) -> None:
    """Raises Refused where ``write_embedded`` could not write ``out``: before the work of an hour."""
    check_out_file(out, SUFFIXES, overwrite, example="features")
    if out.suffix.lower() == ".parquet":
        pyarrow_modules()


def write_embedded(table: Embedded, out: Path) -> None:
    """Writes ``table`` to ``out``, whole or not at all.

    .npz: arrays ``paths``, ``features``, ``probabilities``, ``classes``. .parquet: a row for each image with the
    columns ``path``, ``features`` and ``probabilities`` (lists), the class names as JSON in the metadata ``classes``.
    """
    check_features_file(out, overwrite=True)
    with atomic(out) as part:
        if out.suffix.lower() == ".npz":
            with open(part, "wb") as file:
                np.savez(
                    file,
                    paths=np.array(table.paths),
                    features=table.features,
                    probabilities=table.probabilities,
                    classes=np.array(table.classes),
                )
        else:
            _write_parquet(table, part)


def _write_parquet(table: Embedded, part: Path) -> None:
    pa, parquet = pyarrow_modules()
    columns = {
        "path": [plain_text(path) for path in table.paths],
        "features": list(table.features),
        "probabilities": list(table.probabilities),
    }
    rows = pa.table(columns).replace_schema_metadata({"classes": as_json(table.classes)})
    parquet.write_table(rows, part)
