"""One evaluation as a small object: its numbers, and the lines that a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune101.errors import escaped

FROZEN = "Frozen backbone: only the output layer of this network was trained"
"""What every command says of such a network."""
RANDOM_LAYERS = "Beside the output layer, these layers started at random, not from ImageNet weights"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a network does on ``n`` images; accuracies in percent, ``loss`` is the mean cross-entropy.

    ``interval`` is Wilson's 95 % interval of ``top1``; ``folder`` holds predictions.csv where one was written;
    ``record`` is the whole record, as test.json holds it.
    """

    subset: str
    n: int
    correct: int
    loss: float
    top1: float
    interval: tuple[float, float]
    top5: float
    mean_per_class: float
    folder: Path | None = None
    record: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any], subset: str = "test", folder: Path | None = None) -> Evaluation:
        """The evaluation that ``record`` (test.json's fields) tells of."""
        numbers = {name: record[name] for name in ("n", "correct", "loss", "top1", "top5", "mean_per_class")}
        low, high = record["top1_interval"]
        return cls(subset=subset, interval=(low, high), folder=folder, record=record, **numbers)

    def __repr__(self) -> str:
        return score_text(self.record, self.subset)


def score_text(record: Mapping[str, Any], subset: str = "test") -> str:
    """The numbers of one evaluation as lines."""
    low, high = record["top1_interval"]
    alone = record.get("without_duplicates", {"n": record["n"]})
    twins, without = record["n"] - alone["n"], ""
    if twins and alone["n"]:
        without = f"\nWithout the {twins} that have a near-duplicate in training: {alone['top1']:.2f} %"
    return (
        f"{subset.capitalize()} loss: {record['loss']:.4f}\n"
        f"{subset.capitalize()} accuracy: {record['top1']:.2f} % ({record['correct']}/{record['n']}, "
        f"95 % interval {low:.2f} to {high:.2f} %)\n"
        f"Top-5 accuracy: {record['top5']:.2f} %\n"
        f"Mean per-class accuracy: {record['mean_per_class']:.2f} %{without}{_confidence_text(record)}"
    )


def _confidence_text(record: Mapping[str, Any]) -> str:
    """What an evaluation says of its confidences and of the start of its layers; each on a line of its own."""
    lines = []
    if reason := record.get("temperature_reason"):
        lines.append(f"Confidence is not calibrated (temperature 1): {reason}")
    elif "calibration_scaled" in record:
        before, after, t = record["calibration"]["ece"], record["calibration_scaled"]["ece"], record["temperature"]
        lines.append(
            f"Confidence is calibrated: temperature {t:.2f}, calibration error {after:.3f} ({before:.3f} without)"
        )
    if record.get("frozen_backbone"):
        lines.append(FROZEN)
    if layers := record.get("random_layers"):
        lines.append(f"{RANDOM_LAYERS}: {escaped(', '.join(layers))}")
    if members := record.get("frozen_members"):
        lines.append(f"Frozen backbone: only the output layer was trained of {escaped(', '.join(members))}")
    return "".join(f"\n{line}" for line in lines)
