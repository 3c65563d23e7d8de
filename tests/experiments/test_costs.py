"""Times of trainings whose features came from a cache, weak recipes and frozen backbones: told, and not counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_runs import as_by_the_first_version, write_run

from finetune101.experiments import costs
from finetune101.experiments.costs import features_cached
from finetune101.recipes import RECIPES
from finetune101.reports import compare
from finetune101.reports.comparison import comparison_text
from finetune101.reports.groups import open_group
from finetune101.reports.page import Page
from finetune101.reports.pages import _compared
from finetune101.run import Run

GAIN = Path(__file__).parents[2] / "results" / "study_gain" / "efficientnet_lite0"


def test_the_published_runs_that_read_a_cache() -> None:
    runs = [Run(path.parent) for path in sorted(GAIN.glob("*/all/*/metrics.jsonl"))]
    cached = features_cached(runs)
    warm = {f"{arm}/all/split42_seed{seed}" for arm in ("finetune", "probe") for seed in (1, 2)}
    assert {path.relative_to(GAIN.resolve()).as_posix() for path in cached} == warm
    probe = [run for run in runs if "probe" in run.path.parts]
    assert costs.mean_seconds(probe, cached) == pytest.approx(115.877 + 23.571)  # that of seed 0 alone


@pytest.fixture
def arms(tmp_path: Path) -> Path:
    """A probe with one cold and two warm runs, and a random start by a quick recipe."""
    for seed, first in enumerate((100.0, 5.0, 4.0)):
        write_run(tmp_path / "probe" / f"s{seed}", {seed}, run_seed=seed, first=first, recipe="probe")
        write_run(
            tmp_path / "scratch" / f"s{seed}",
            set(range(20 + seed)),
            run_seed=seed,
            scores=[40, 60],
            pretrain=False,
            recipe="scratch_fast",
            name="squeezenet1_1",
        )
    as_by_the_first_version(tmp_path)
    return tmp_path


def test_costs_leave_out_runs_that_read_a_cache(arms: Path) -> None:
    a, b = (open_group(str(arms / name)) for name in ("probe", "scratch"))
    c = compare.all_pairs([a, b])[0]
    assert (c.a.seconds, c.b.seconds) == (100, 120)
    assert [run.features_cached for run in c.a.runs] == [False, True, True]
    words = comparison_text(c)
    assert "probe/s1, probe/s2 read features from the cache" in words and "trained for 1.7 min" in words
    only_warm = compare.all_pairs([open_group(str(arms / "probe" / "s1")), open_group(str(arms / "probe" / "s0"))])[0]
    assert only_warm.a.seconds is None and "no time" in comparison_text(only_warm)


def test_frozen_backbones_and_weak_recipes_are_told(arms: Path, tmp_path: Path) -> None:
    found = [open_group(str(arms / name)) for name in ("probe", "scratch")]
    c = compare.all_pairs(found)[0]
    assert (c.a.frozen, c.b.frozen) == (3, 0)
    words = comparison_text(c)
    assert "frozen backbone in 3 of 3 runs" in words
    assert "the recipe scratch_fast, which is not the best known: more is reached by the recipe scratch" in words
    page = Page(tmp_path / "page", "en")
    _compared(page, found)
    note = next(section["note"] for section in page.sections if section["kind"] == "sheet")
    for told in ("frozen backbone in 3 of 3", "probe/s1, probe/s2", "scratch (in twice the time)"):
        assert told in note


def test_weights_of_epoch_0_are_a_frozen_backbone_even_of_a_fine_tuning(tmp_path: Path) -> None:
    kept = open_group(str(write_run(tmp_path / "kept", {1}, first=9.0, recipe="finetune_fast").path))
    other = open_group(str(write_run(tmp_path / "other", {2}, scores=[50, 60], recipe="finetune_fast").path))
    c = compare.all_pairs([kept, other])[0]
    assert (c.a.frozen, c.b.frozen) == (1, 0) and comparison_text(c).count("frozen backbone") == 1


@pytest.mark.parametrize(
    ("recipe", "pretrain", "device", "better"),
    [
        ("original", False, "cpu", ["scratch_fast", "scratch"]),
        ("scratch_fast", False, "cpu", ["scratch"]),
        ("scratch", False, "cpu", []),
        ("scratch", False, "cuda", ["scratch_long"]),
        ("scratch_long", False, "cuda", []),
        ("original", True, "cpu", ["finetune"]),
        ("finetune", True, "cpu", []),
        (None, False, "cpu", []),
    ],
)
def test_better_recipes(tmp_path: Path, recipe: str, pretrain: bool, device: str, better: list[str]) -> None:
    run = write_run(tmp_path / "a", {1}, recipe=recipe, pretrain=pretrain)
    env = run.read_json("env.json")
    run.write_json("env.json", {**env, "world": {**env["world"], "device": device}})
    other = open_group(str(write_run(tmp_path / "b", {2}).path))
    arm = compare.all_pairs([open_group(str(run.path)), other])[0].a
    assert [name for name, _ in arm.better_recipes] == better and set(better) <= RECIPES.keys()
