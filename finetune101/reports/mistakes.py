"""What a run gets wrong: classes in the order of their confusions, the most confused pairs, and example images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from finetune101.data.decode import Unreadable, opened
from finetune101.data.images import class_of, find_data
from finetune101.errors import Refused
from finetune101.evaluation.tested import Answer, confused_pairs, is_inside
from finetune101.reports.groups import Tested
from finetune101.run import Run

THUMBNAIL = 150  # px, the longer side of an example image
SMALL = 80  # and of a training image beside it
NEAREST = 3  # training images beside a mistake
EXAMPLES = 12  # images of a gallery
MAY_HIDE = 30  # with more classes than this, those that are never confused are left out of the matrix
FRAMED = 0.04  # classes are in one block when this share of their images, two at least, are taken for one another


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Counts [true, predicted] of the classes shown, in ``blocks`` (lengths); ``hidden`` were never confused."""

    names: list[str]
    counts: npt.NDArray[np.int64]
    blocks: list[int]
    hidden: int


def confusion_of(answers: Mapping[str, Answer]) -> Confusion:
    """The confusion matrix with classes that are taken for each other side by side.

    Average-linkage clustering of the mutual confusion rates, leaves in optimal order: Z. Bar-Joseph, D. Gifford,
    T. Jaakkola, "Fast optimal leaf ordering for hierarchical clustering", Bioinformatics 17 (2001).
    """
    names = sorted({name for answer in answers.values() for name in (answer.label, answer.prediction)})
    number = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for answer in answers.values():
        counts[number[answer.label], number[answer.prediction]] += 1
    wrong = counts - np.diag(np.diag(counts))
    kept = np.flatnonzero(wrong.any(0) | wrong.any(1)) if len(names) > MAY_HIDE else np.arange(len(names))
    if len(kept) < 3:
        kept = np.arange(len(names))
    counts = counts[np.ix_(kept, kept)]
    rate = counts / counts.sum(1, keepdims=True).clip(1)
    mutual = (rate + rate.T) / 2
    mutual[counts + counts.T < 2] = np.minimum(mutual, FRAMED / 2)[counts + counts.T < 2]  # one mistake is no pattern
    distance = 1 - mutual
    np.fill_diagonal(distance, 0)
    order, blocks = np.arange(len(kept)), [1] * len(kept)
    if len(kept) > 2:
        tree = hierarchy.linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
        order = hierarchy.leaves_list(tree)
        cluster = hierarchy.fcluster(tree, 1 - FRAMED, "distance")[order]
        blocks = [int(n) for n in np.diff([0, *np.flatnonzero(np.diff(cluster)) + 1, len(cluster)])]
    counts, hidden = counts[np.ix_(order, order)], len(names) - len(kept)
    return Confusion(names=[names[i] for i in kept[order]], counts=counts, blocks=blocks, hidden=hidden)


def pair_examples(run: Tested, root: Path) -> list[dict[str, Any]]:
    """The most confused pairs, each with a mistaken image and one that the run rightly gives the predicted class."""
    rows = []
    for label, prediction, count in confused_pairs(run.answers):
        wrong = [(a.confidence, p) for p, a in run.answers.items() if (a.label, a.prediction) == (label, prediction)]
        right = [(a.confidence, p) for p, a in run.answers.items() if a.right and a.label == prediction]
        trained = (p for p in run.manifest.subsets["train"] if class_of(p) == prediction)
        other = max(right)[1] if right else next(trained, None)
        images = [picture(root, path) if path else None for path in (max(wrong)[1], other)]
        rows.append({"label": label, "prediction": prediction, "count": count, "images": images})
    return rows


def examples(answers: Mapping[str, Answer], right: bool, root: Path | None) -> list[dict[str, Any]]:
    """The least confident right answers, or the most confident wrong ones; with ``root`` as images."""
    chosen = [(path, answer) for path, answer in answers.items() if answer.right == right]
    chosen.sort(key=lambda one: (one[1].confidence if right else -one[1].confidence, one[0]))
    return [
        {"path": path, **answer._asdict(), "image": picture(root, path) if root else None}
        for path, answer in chosen[:EXAMPLES]
    ]


def add_reasons(run: Run, root: Path, chosen: Sequence[dict[str, Any]], words: Mapping[str, str]) -> str:
    """Adds to the ``examples`` of ``run`` where it looked and the nearest training images, as data URIs.

    Returns what was added, or why nothing was, in the ``words`` of the page. The first use takes one forward pass of
    each training image.
    """
    from finetune101.deploy.network import load  # these take long to import, and few pages need them

    readable = [one for one in chosen if one["image"]]
    if not readable or not run.best.is_file():
        return ""
    try:
        network = load(run)
        network.find_training_images(str(root))
        for one in readable:
            explanation = network.explain(root / one["path"], one["prediction"])
            one["overlay"] = _data_uri(explanation.overlay(), THUMBNAIL)
            near = [(small, other.label) for other in explanation.neighbours if (small := other.thumbnail(SMALL))]
            one["near"] = [(_data_uri(small, SMALL), label) for small, label in near[:NEAREST]]
    except Refused as error:
        return words["unexplained"].format(reason=error)
    return words["explained"]


def picture(root: Path, path: str) -> str | None:
    """A small copy of the image ``path`` in ``root`` as a data URI; None where it cannot be decoded.

    Raises Refused where it is not there, and for a path that leaves ``root``: somebody else's run could show any
    picture of this machine.
    """
    if not is_inside(path):
        raise Refused(f"{path} is not inside of the data folder; the run is damaged")
    return thumbnail(root / path)


def thumbnail(file: Path) -> str | None:
    """A small copy of an image, upright, as a data URI; None where it cannot be decoded. Raises Refused without it."""
    if not file.exists():
        raise Refused(f"{file} is not there; give --data the images of the run, or --no-gallery")
    try:
        with opened(file, THUMBNAIL) as picture:
            return _data_uri(picture.image, THUMBNAIL)
    except Unreadable:
        return None


def _data_uri(image: Image.Image, side: int) -> str:
    """A copy of ``image`` whose longer side has ``side`` pixels at most, as a JPEG in a data URI."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_root(runs: Sequence[Tested], data: str | None) -> Path:
    """Where the images of ``runs`` are. Raises Refused, offering --no-gallery, when they are not there."""
    try:
        return find_data(runs[0].run.image_folder(data or None))
    except Refused as error:
        raise Refused(f"{error}; or make the report with --no-gallery") from error
