"""evidence/publish.py and publish_study.py: what stands in results/ afterwards, and which claims are made."""

from __future__ import annotations

from pathlib import Path

import publish
import publish_study
import pytest

from finetune101.run import Run


def test_an_ensemble_is_published_with_the_names_of_its_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, out = tmp_path / "results", tmp_path / "ensemble"
    monkeypatch.setattr(publish, "RESULTS", results)
    members = [results / name for name in ("a", "b")]
    scores = {"n": 100, "correct": 98, "loss": 0.1, "top1": 98.0, "top5": 99.0, "mean_per_class": 98.0}
    scores |= {"manifest_hash": "sha256:1", "top1_interval": [97.4, 98.7]}
    for folder in members:
        Run(folder).write_json("test.json", {**scores, "manifest": "reference_seed42"})
    (results / "claims.json").write_text("[]")
    Run(out).write_json("test.json", {**scores, "runs": ["runs/a", "runs/b"], "mirror": False, "top1": 98.123})
    (out / "predictions.csv").write_text("path,label,prediction,confidence\n")
    publish.publish([out], "best.finetune.any.reference.top1", "finetune101 ensemble a b", members)
    (claim,) = Run(results).read_json("claims.json")
    assert (claim["value"], claim["evidence"]) == (98.12, "ensemble")
    assert Run(results / "ensemble").read_json("config.json") == {"members": ["a", "b"], "mirror": False}
    with pytest.raises(ValueError, match="is not an ensemble of these 1 members"):
        publish.keep_ensemble(out, results / "ensemble", members[:1])


def test_a_curve_claims_how_few_images_reach_random_initialisation_with_the_most() -> None:
    values = {("finetune", 1): 20.0, ("finetune", 2): 40.0, ("finetune", 4): 60.0, ("scratch", 2): 10.0}
    cells = [
        {"model": "resnet18", "arm": arm, "size": size, "mean_per_class": value, "n": 3}
        for (arm, size), value in (values | {("scratch", 4): 30.0}).items()
    ]
    entries = list(publish_study.curve(cells))
    assert [(claim["id"], claim["value"], claim["n"]) for claim in entries] == [("compare.curve", 2, 3)]
    assert "reaches what random initialisation has with 4" in entries[0]["unit"]
    assert not list(
        publish_study.curve([{**cell, "mean_per_class": 1.0 + (cell["arm"] == "scratch")} for cell in cells])
    )
