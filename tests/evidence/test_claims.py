"""evidence/claims.py: true claims pass, and every way to be wrong is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import claims
import pytest
from written_runs import as_by_the_first_version, write_run

ROOT = Path(__file__).parents[2]
TEST = ("cat/1.jpg", "cat/2.jpg", "cat/3.jpg", "dog/1.jpg")
HEADER = "path,label,prediction,confidence\n"
# three of four right; cat 2/3, dog 1/1
ROWS = ["cat/1.jpg,cat,cat,0.9", "cat/2.jpg,cat,cat,0.8", "cat/3.jpg,cat,dog,0.6", "dog/1.jpg,dog,dog,0.7"]


def claim(**changes: Any) -> dict[str, Any]:
    base = {"id": "a.b.top1", "value": 75.0, "unit": "%", "n": 1, "spread": None, "command": "train", "evidence": "a"}
    return {"kind": claims.kind_of(changes.get("id", "a.b.top1")), **base, **changes}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    results = tmp_path / "results"
    (results / "a").mkdir(parents=True)
    (results / "splits").mkdir()
    manifest = {"hash": "sha256:0", "classes": ["cat", "dog"], "subsets": {"train": [], "val": [], "test": TEST}}
    (results / "splits" / "tiny.json").write_text(json.dumps(manifest))
    (results / "a" / "config.json").write_text("{}")
    (results / "a" / "test.json").write_text('{"manifest": "tiny", "manifest_hash": "sha256:0"}')
    (results / "a" / "predictions.csv").write_text(HEADER + "\n".join(ROWS) + "\n")
    return tmp_path


def problems(project: Path, *listed: dict[str, Any]) -> str:
    (project / "results" / "claims.json").write_text(json.dumps(listed))
    return "\n".join(claims.check_claims(project)[1])


def test_the_projects_own_claims_hold() -> None:
    assert claims.check_claims(ROOT)[1] == []


def test_true_claims_hold(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    per_class = claim(id="a.b.mean_per_class", value=83.33)
    (project / "results" / "a" / "output.txt").write_text("It took 65.04 s, p = 2.31e-162.\n")
    text = "a/output.txt"
    seconds = claim(id="demo.seconds", value=65, unit="s", evidence=f"{text}:It took {{}} s")
    p = claim(id="gain.p", value=2.3e-162, unit="", evidence=f"{text}:p = {{}}")
    weights = claim(id="a.parameters", value=3.5, unit="million")
    assert problems(project, claim(), per_class, seconds, p, weights) == ""
    assert claims.main(project) == 0
    out = capsys.readouterr().out
    assert "All 5 claims" in out and "2 recomputed" in out and "2 recorded" in out and "1 not checked" in out


@pytest.mark.parametrize(
    ("value", "where", "problem"),
    [
        (65, "output.txt:took {} s", ""),
        (65.04, "output.txt:took {} s", ""),
        (74, "output.txt:took {} s", "gives 65.04"),
        (65, "output.txt:run {}", "0 numbers fit"),
        (1, "output.txt:{} or", "2 numbers fit"),
        (65, "output.txt", "file:words"),
        (65, "", "file:words"),
        (69, "some.json:rows.1.share*100", ""),
        (0.69, "some.json:rows.1.share", ""),
        (69, "some.json:rows.0.share*100", "gives 20.0"),
        (69, "some.json:rows.7.share", "IndexError"),
        (69, "some.json:share", "KeyError"),
        (3, "lines.jsonl:1.n", ""),
    ],
)
def test_a_recorded_number_is_the_one_that_its_evidence_names(
    project: Path, value: float, where: str, problem: str
) -> None:
    folder = project / "results" / "a"
    (folder / "output.txt").write_text("It took 65.04 s in run v1.74; 1 or 2 or so.\n")
    (folder / "some.json").write_text(json.dumps({"rows": [{"share": 0.2}, {"share": 0.69}], "other": 69}))
    (folder / "lines.jsonl").write_text('{"n": 2}\n{"n": 3}\n')
    text = problems(project, claim(id="demo.number", value=value, unit="s", evidence=f"a/{where}"))
    assert problem in text if problem else text == ""


@pytest.mark.parametrize(("name", "kind"), [("a.b.top1", "recorded"), ("demo.seconds", "recomputed")])
def test_a_claim_is_what_it_is_called(project: Path, name: str, kind: str) -> None:
    assert "is called" in problems(project, claim(id=name, kind=kind))


def test_times_are_the_sums_of_the_records(tmp_path: Path) -> None:
    results = tmp_path / "results"
    records = [50, 60, 55]
    write_run(results / "arm" / "s0", {1}, scores=records, first=600.0)
    write_run(results / "arm" / "s1", {1}, scores=records, first=3.0, run_seed=1)  # from the cache of the other
    as_by_the_first_version(results)
    assert claims.minutes(results / "arm", results) == 13
    right = claim(id="best.minutes", value=13, unit="min", n=2, evidence="arm")
    assert problems(tmp_path, right) == ""
    assert "arm gives 13" in problems(tmp_path, right | {"value": 8})


def test_claims_on_speed_are_those_of_the_table() -> None:
    measured = claims.speed(ROOT / "results")
    assert measured["speed.plain_features"] == 6.0 and measured["speed.finetune"] == 35.6
    right = claim(id="speed.finetune", value=35.6, unit="times", evidence="speed")
    assert claims.check_claim(right, ROOT / "results") == []
    assert claims.check_claim(right | {"value": 233.3}, ROOT / "results")


def test_no_claims_hold(project: Path) -> None:
    assert problems(project) == ""


def test_several_runs(project: Path) -> None:
    folder = project / "results" / "a"
    right = [row.replace("dog,0.6", "cat,0.6") for row in ROWS]
    for seed, rows in ((0, ROWS), (1, right)):
        shutil.copytree(folder, project / "results" / "runs" / f"seed{seed}")
        (project / "results" / "runs" / f"seed{seed}" / "predictions.csv").write_text(HEADER + "\n".join(rows) + "\n")
    assert problems(project, claim(value=87.5, n=2, spread=17.68, evidence="runs")) == ""
    assert "spread" in problems(project, claim(value=87.5, n=2, spread=3.0, evidence="runs"))
    assert "n = 1" in problems(project, claim(value=87.5, evidence="runs"))
    assert "no test.json" in problems(project, claim(evidence="splits"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"value": 75.01}, "claims 75.01, the predictions give 75.0000"),
        ({"id": "a.b.mean_per_class"}, "83.3333"),
        ({"evidence": "b"}, "no file or folder below"),
        ({"evidence": ".."}, "no file or folder below"),
    ],
)
def test_wrong_claim(project: Path, changes: dict[str, Any], problem: str) -> None:
    assert problem in problems(project, claim(**changes))


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (ROWS[:3], "dog/1.jpg is missing"),
        ([*ROWS, "dog/2.jpg,dog,dog,0.9"], "dog/2.jpg is not in the split's test set"),
        ([*ROWS, ROWS[0]], "twice"),
        ([*ROWS[:3], "dog/1.jpg,cat,cat,0.9"], "labels dog/1.jpg as cat"),
        ([*ROWS[:3], "dog/1.jpg,dog,cow,0.9"], "predicts cow"),
        ([], "no rows"),
    ],
)
def test_wrong_predictions(project: Path, rows: list[str], problem: str) -> None:
    (project / "results" / "a" / "predictions.csv").write_text(HEADER + "".join(row + "\n" for row in rows))
    assert problem in problems(project, claim())


@pytest.mark.parametrize("name", ["a/config.json", "a/test.json", "splits/tiny.json", "a/predictions.csv"])
def test_evidence_that_is_not_whole(project: Path, name: str) -> None:
    (project / "results" / name).unlink()
    text = problems(project, claim())
    assert any(word in text for word in ("missing", "no predictions", "no test.json"))


def test_a_field_left_out_and_an_id_twice(project: Path) -> None:
    half = claim()
    del half["command"]
    assert "lacks command" in problems(project, half)
    assert "claimed twice" in problems(project, claim(), claim())


@pytest.mark.parametrize(
    ("page", "fine"),
    [
        ("Nothing.", True),
        ("| 75.0 % | `a.b.top1` |", True),
        ("| 75.00 % | `a.b.top1` |", True),
        ("see a.b.top1.", False),
        ("| 175.0 | `a.b.top1` |", False),
        ("| 76.0 | `a.b.top1` |\n75.0", False),
        ("`other.a.b.top1` `a.b.top1.more`", True),
        ("about <!--claim:a.b.top1:.0f-->75<!--/--> %", True),
    ],
)
def test_a_page_that_names_a_claim_has_its_value(project: Path, page: str, fine: bool) -> None:
    (project / "docs" / "zh").mkdir(parents=True)
    table = f"<!-- generated: python x.py -->\n{page}\n<!-- end of generated -->\n"  # elsewhere numbers need marks
    (project / "docs" / "zh" / "results.md").write_text(table)
    wrong = "a.b.top1: docs/zh/results.md names it without its value 75.0"
    assert problems(project, claim()) == ("" if fine else wrong)


def test_a_readme_that_differs_is_told(project: Path) -> None:
    (project / "README.md").write_text("It has <!--claim:a.b.top1-->75.01<!--/--> %.")
    assert "README.md, line 1: not as claimed" in problems(project, claim())
    (project / "README.md").write_text("It has 75.00 %.")
    assert problems(project, claim()) == "README.md, line 1: 75.00 has no mark"


def test_exit_code(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert claims.main(project) == 1  # there is no claims.json yet
    assert "claims.json is missing" in capsys.readouterr().err


def test_a_difference_is_recomputed_from_both_arms(project: Path) -> None:
    results = project / "results"
    shutil.copytree(results / "a", results / "b")
    wrong = [row.replace("cat,0", "dog,0") for row in ROWS]
    (results / "b" / "predictions.csv").write_text(HEADER + "\n".join(wrong) + "\n")
    (results / "ab").mkdir()
    pair = {"a": {"runs": [{"path": "../a"}]}, "b": {"runs": [{"path": "../b"}]}, "difference_interval": [10, 80]}
    (results / "ab" / "comparison.json").write_text(json.dumps(pair))
    difference = 75.0 - claims.recompute(results / "b", "top1", results)[0]
    assert difference > 0
    gain = claim(id="compare.gain.a.top1", value=difference, evidence="ab", spread=[10, 80])
    assert problems(project, gain) == ""
    assert "the comparison has [10, 80]" in problems(project, gain | {"spread": [20, 30]})
    assert "the smaller arm has 1" in problems(project, gain | {"n": 3})
    assert "the predictions give" in problems(project, gain | {"value": difference + 1})


def test_a_calibration_error_is_averaged_again(project: Path) -> None:
    file = project / "results" / "a" / "test.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "calibration_scaled": {"ece": 0.01234}}))
    error = claim(id="report.ece", value=0.0123, unit="ECE")
    assert problems(project, error) == ""
    assert "the runs have [0.01234]" in problems(project, error | {"value": 0.0125})


def test_another_split_is_noticed(project: Path) -> None:
    (project / "results" / "a" / "test.json").write_text('{"manifest": "tiny", "manifest_hash": "sha256:1"}')
    assert "another split" in problems(project, claim())


def test_pointing_is_counted_over_all_classes(project: Path) -> None:
    points = [{"class": str(k % 12), "mask": k < 18, "outline": k < 24, "box": True} for k in range(24)]
    file = project / "results" / "a" / "pointing.json"
    file.write_text(json.dumps({"points": points}))
    true = claim(id="use.explain.pointing", value=0.75, unit="share")
    assert problems(project, true, claim(id="use.explain.pointing.outline", value=1.0, unit="share")) == ""
    assert "gives 0.75" in problems(project, {**true, "value": 0.85})
    file.write_text(json.dumps({"points": points[:23]}))
    assert "has no number" in problems(project, true)
