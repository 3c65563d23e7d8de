"""Comparisons of run directories written to disk, against numbers worked out by hand."""

import json
import shutil

import pytest
from written_runs import write_run

from finetune101.evaluation import metrics
from finetune101.reports import compare, groups
from finetune101.reports.comparison import Comparison, comparison_text
from finetune101.reports.page import p_cell, p_text
from finetune101.run import Run


def compared(*runs: Run) -> Comparison:
    """The comparison of two runs."""
    return compare.all_pairs([groups.open_group(str(run.path)) for run in runs])[0]


@pytest.fixture
def arms(tmp_path):
    good = write_run(tmp_path / "fine tuned", {1, 2, 3}, source="package weights 0.1.0 sha256:aa")
    poor = write_run(tmp_path / "scratch", set(range(2, 42)))
    return good, poor


def test_numbers_by_hand(arms):
    c = compared(*arms)
    assert (c.n, c.a.correct, c.b.correct) == (200, 197, 160)
    assert (c.a.top1, c.b.top1) == (98.5, 80.0)
    # Images 2 and 3 are wrong in both runs, image 1 in the first only, 4 to 41 in the second only.
    assert (c.mcnemar[0].only_a, c.mcnemar[0].only_b) == (38, 1)
    assert c.difference == pytest.approx(18.5)
    assert c.difference_interval[0] < 18.5 < c.difference_interval[1]
    assert c.mcnemar[0].p == pytest.approx(2 * (1 + 39) / 2**39)
    assert c.a.top1_interval == metrics.wilson(197, 200)
    # Of 50 bees the second run has 4, 8, ..., 40 wrong; of 150 ants the other 30.
    assert c.b.mean_per_class == pytest.approx((100 * 40 / 50 + 100 * 120 / 150) / 2)
    assert c.a.mean_per_class == pytest.approx((100 + 100 * 147 / 150) / 2)


def test_each_arm_says_what_it_is(tmp_path):
    write_run(tmp_path / "tuned" / "s0", {1}, run_seed=0, scores=[60, 90, 80], recipe="finetune", source="of a file")
    write_run(tmp_path / "tuned" / "s3", {1, 2}, run_seed=3, scores=[70, 80, 85], recipe="finetune", source="of a file")
    good = groups.open_group(str(tmp_path / "tuned"))
    other = write_run(tmp_path / "other", {1, 2, 3}, run_seed=3, pretrain=False, init_hash="sha256:other")
    c = compare.all_pairs([good, groups.open_group(str(other.path))])[0]
    a, b = c.a, c.b
    assert (a.name, a.network, a.recipe, a.pretrain, a.device) == (
        "tuned", "efficientnet_lite0", "finetune", True, "cpu",
    )  # fmt: skip
    assert (a.init_source, a.init_hash, a.epoch, a.seconds) == ("of a file", "sha256:0123456789abcdef", 2, 180)
    assert (a.correct, a.top1, a.validation) == (198.5, 99.25, 87.5)
    assert a.top1_sd == pytest.approx(0.5 / 2**0.5) and a.top1_interval == metrics.wilson(198.5, 200)
    # ants: 0 and 1 of 150 are wrong, as 1 and 2 are no fourth images
    assert a.mean_per_class == pytest.approx((100 + (149 + 148) / 3) / 2)
    assert a.mean_per_class_sd == pytest.approx((1 / 3) / 2**0.5)
    assert (b.pretrain, b.recipe, b.validation, b.steps_to_other, b.top1_sd) == (False, None, None, None, None)
    assert (a.steps_to_other, a.seconds_to_other) == (None, None)  # the other arm has no validation
    first, second = a.runs
    assert (first.seed, first.split_seed, first.epoch, first.correct, first.top1) == (0, 42, 2, 199, 99.5)
    assert (second.seed, second.epoch, second.correct, second.mean_per_class) == (
        3, 3, 198, pytest.approx((100 + 100 * 148 / 150) / 2),
    )  # fmt: skip
    assert first.path == (tmp_path / "tuned" / "s0").as_posix() and first.manifest_hash == c.manifest_hash
    assert c.manifest_hash == good.runs[0].manifest.hash() and (c.n, c.splits) == (200, 1)
    assert (first.command, first.start, first.init_hash) == ("", "pretrained", "sha256:0123456789abcdef")
    assert not first.features_cached and not first.frozen
    pair = c.mcnemar[0]
    assert len(c.mcnemar) == 1 and (pair.a, pair.b) == (f"{a.name}/s3", b.name)  # the pair of one seed
    assert (pair.only_a, pair.only_b, pair.p) == (1, 0, 1.0)


def test_layers_that_started_at_random_are_said(arms):
    config = arms[0].read_json("config.json")
    config["model"]["random_layers"] = ["blocks.6"]
    arms[0].write_json("config.json", config)
    c = compared(*arms)
    assert (list(c.a.random_layers), list(c.b.random_layers)) == (["blocks.6"], [])


def test_a_p_value_is_never_shown_as_nothing():
    assert (p_text(0.0123), p_text(0.0), p_text(1.0)) == ("= 0.012", "< 1e-300", "= 1")
    assert p_cell(0.0) == ("< 1e-300", 0.0) and p_cell(None)[0] == "–"


def test_a_recipe_that_was_cut_is_said(arms):
    config = arms[0].read_json("config.json")
    config["recipe"], config["optim"]["epochs"] = "scratch", 1
    arms[0].write_json("config.json", config)
    c = compared(*arms)
    assert (c.a.epochs, c.a.whole_epochs, c.b.whole_epochs) == (1, 140, None)
    text = comparison_text(c)
    assert text.count("was cut short: 1 of the 140 epochs of the recipe scratch") == 1
    config["optim"]["epochs"] = 140
    arms[0].write_json("config.json", config)
    assert compared(*arms).a.whole_epochs is None


def test_a_wins_curve_reaches_the_final_validation_accuracy_of_the_other(tmp_path):
    a = write_run(tmp_path / "a", {1}, scores=[40, 50, 60])
    b = write_run(tmp_path / "b", {2}, scores=[50, 45, 44])
    c = compared(a, b)
    assert (c.a.validation, c.b.validation) == (60, 50)
    assert (c.a.steps_to_other, c.a.seconds_to_other) == (20, 120)  # as much is enough
    assert (c.b.steps_to_other, c.b.seconds_to_other) == (None, None)


def test_paths_of_a_kept_comparison_start_at_its_folder(arms, tmp_path):
    values = compare.comparison_json([compared(*arms)], tmp_path / "out" / "deep")
    assert values["a"]["runs"][0]["path"] == "../../fine tuned" and values["b"]["runs"][0]["path"] == "../../scratch"
    assert values["others"] == []
    folder = Run(tmp_path / "out" / "deep")
    folder.write_json("comparison.json", values)
    assert [(group.name, len(group.runs)) for group in compare.read_groups(folder.path)] == [
        (values["a"]["name"], 1), (values["b"]["name"], 1),
    ]  # fmt: skip
    values["a"]["runs"][0]["path"] = "a\0b"
    folder.write_json("comparison.json", values)
    with pytest.raises(ValueError, match=r"comparison.json names a folder that cannot be; run compare again"):
        compare.read_groups(folder.path)


def test_text_says_everything(arms):
    words = comparison_text(compared(*arms))
    for expected in (
        "same 200 images",
        "98.50 % (95.68 to 99.49)",
        "80.00 %",
        "+18.50 points (+",
        "Only fine tuned is right: 38 images. Only scratch is right: 1 image.",
        "p = 1.5e-10",
        "fine tuned is better",
        "package weights 0.1.0 sha256:aa",
        "random (seed 0)",
        "sha256:0123456789ab",
    ):
        assert expected in words
    assert max(map(len, words.splitlines())) <= 100
    assert "networks differ" not in words


def test_names_reach_no_terminal_raw(tmp_path):
    classes = ("ant\x1b]0;title\x07", "bee\nline")
    a = write_run(tmp_path / "red\x1b[31m", {1, 2, 3}, classes=classes)
    words = comparison_text(compared(a, write_run(tmp_path / "b", {4}, classes=classes)))
    assert "red\\x1b[31m" in words and "bee\\x0aline" in words
    assert all(c.isprintable() or c == "\n" for c in words)


def test_swapping_the_runs_swaps_the_sign(arms):
    there, back = compared(*arms), compared(*reversed(arms))
    assert back.difference == -there.difference
    assert back.mcnemar[0].p == there.mcnemar[0].p
    assert "-18.50 points (-" in comparison_text(back)
    assert "fine tuned is better" in comparison_text(back)


def test_a_small_difference_is_not_called_one(tmp_path):
    c = compared(write_run(tmp_path / "a", {1, 2, 3}), write_run(tmp_path / "b", {3, 4}, name="resnet18"))
    assert c.mcnemar[0].p == 1.0
    assert "do not tell the two apart" in comparison_text(c)
    assert "networks differ" in comparison_text(c)


def test_a_run_equals_its_copy(arms, tmp_path):
    copy = shutil.copytree(arms[0].path, tmp_path / "copy")
    with pytest.raises(ValueError, match="with itself"):
        compared(arms[0], arms[0])
    c = compared(arms[0], Run(copy))
    assert (c.difference, c.difference_interval, c.mcnemar[0].p) == (0.0, (0.0, 0.0), 1.0)


def test_comparison_json_is_plain(arms):
    values = compare.comparison_json([compared(*arms)], arms[0].path)
    assert json.loads(json.dumps(values)) == values
    assert values["a"]["top1"] == 98.5
    assert values["difference_interval"][0] < 18.5


def test_runs_of_one_name_are_told_apart(tmp_path):
    c = compared(write_run(tmp_path / "x" / "same", {1}), write_run(tmp_path / "y" / "same", {2}))
    assert c.a.name.endswith("x/same")
    assert c.b.name.endswith("y/same")


def test_other_splits_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"split differently .*train one of them again with --split"):
        compared(write_run(tmp_path / "a", {1}), write_run(tmp_path / "b", {1}, seed=1))


def test_a_run_without_a_test_is_refused(arms):
    (arms[1].path / "predictions.csv").unlink()
    with pytest.raises(ValueError, match="finetune101 evaluate"):
        compared(*arms)


@pytest.mark.parametrize("damage", ["path,label\n", "", "path,label,prediction\nant/1.jpg,ant\n", 'path,label,"\n'])
def test_broken_predictions_are_refused(arms, damage):
    (arms[1].path / "predictions.csv").write_text(damage)
    with pytest.raises(ValueError, match="finetune101 evaluate"):
        compared(*arms)


def test_predictions_that_are_not_those_of_test_json_are_refused(arms):
    file = arms[1].path / "predictions.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], *(line.replace(",ant,ant,", ",ant,bee,") for line in lines[1:])]) + "\n")
    with pytest.raises(ValueError, match="does not belong to its predictions"):
        compared(*arms)


def test_predictions_of_other_images_are_refused(arms):
    file = arms[1].path / "predictions.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(ValueError, match="does not belong to its predictions"):
        compared(*arms)


# groups of runs


@pytest.fixture
def seeds(tmp_path):
    """Two arms with three seeds each, in folders."""
    for seed in range(3):
        write_run(tmp_path / "good" / f"s{seed}", set(range(seed, seed + 4)), run_seed=seed, scores=[50, 90, 89])
        write_run(tmp_path / "poor" / f"s{seed}", set(range(10, 40 + 3 * seed)), run_seed=seed, scores=[40, 45, 50])
    return tmp_path


def pair(folder):
    return compare.all_pairs([groups.open_group(str(folder / name)) for name in ("good", "poor")])[0]


def test_groups_give_means_spreads_and_an_interval_over_runs(seeds):
    c = pair(seeds)
    assert [run.correct for run in c.b.runs] == [170, 167, 164]
    assert (c.b.top1, c.b.top1_sd) == (pytest.approx(83.5), pytest.approx(1.5))
    assert c.difference == pytest.approx(98 - 83.5)
    assert c.over == "images and runs" and c.interval == c.crossed.interval
    # wider than over images alone
    assert c.crossed.interval[0] < c.difference_interval[0] < c.difference_interval[1] < c.crossed.interval[1]
    assert len(c.mcnemar) == 3  # never pooled
    assert [p.only_a - p.only_b for p in c.mcnemar] == [26, 29, 32]
    assert (c.mcnemar[0].a, c.mcnemar[0].b) == ("good/s0", "poor/s0")
    words = comparison_text(c)
    assert "83.50 ± 1.50 %" in words and "n = 3 runs" in words and "over images and runs" in words
    assert max(map(len, words.splitlines())) <= 120


def test_one_test_image_tells_nothing_of_runs(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "good" / f"s{seed}", set(), run_seed=seed, test=1)
        write_run(tmp_path / "poor" / f"s{seed}", {0}, run_seed=seed, test=1)
    c = pair(tmp_path)
    assert (c.difference, c.over, c.crossed) == (100, "images", None)


def test_steps_to_the_other_arm_and_cost(seeds):
    c = pair(seeds)
    assert (c.a.steps_to_other, c.a.seconds_to_other) == (10, 60)
    assert c.b.steps_to_other is None
    assert (c.a.validation, c.b.validation) == (90, 50)
    assert {(run.steps, run.seconds, run.images) for run in c.a.runs} == {(30, 180, 18)}
    assert "reaches" in comparison_text(c) and "never" in comparison_text(c)


def test_gains_per_class(seeds):
    listed = pair(seeds).classes
    assert listed[0].gain > listed[1].gain  # the greatest first
    rows = {row.name: row for row in listed}
    assert {name: row.n for name, row in rows.items()} == {"ant": 150, "bee": 50}
    # wrong bees (every fourth image): 12, 16, ..., 36 and then 40 and 44
    assert rows["bee"].b == pytest.approx(100 * (1 - (7 + 8 + 9) / 3 / 50))
    assert rows["bee"].gain == pytest.approx(rows["bee"].a - rows["bee"].b)
    assert rows["ant"].b_interval[0] < rows["ant"].b < rows["ant"].b_interval[1]


def test_several_splits_give_an_interval_over_splits(tmp_path):
    for split, wrong in enumerate((10, 12, 14)):
        write_run(tmp_path / "good" / f"{split}", {1}, seed=split)
        write_run(tmp_path / "poor" / f"{split}", set(range(wrong)), seed=split)
    c = pair(tmp_path)
    assert (c.splits, c.over, c.crossed, c.difference_interval) == (3, "splits", None, None)
    assert c.difference == pytest.approx((4.5 + 5.5 + 6.5) / 3)
    half = 4.302653 * (1 / 3 + 200 / 6) ** 0.5  # t of 2 degrees; test / training images; variance 1
    assert c.interval == pytest.approx((5.5 - half, 5.5 + half), abs=1e-3)
    assert compare.over_splits([-90.0, 90.0], 1) == (-100, 100)  # a difference cannot be larger


def test_a_split_that_one_arm_lacks_is_left_out(tmp_path):
    for split in range(3):
        write_run(tmp_path / "good" / f"{split}", {1}, seed=split)
    write_run(tmp_path / "poor" / "1", {1, 2}, seed=1)
    arms = groups.on_common_splits([groups.open_group(str(tmp_path / name)) for name in ("good", "poor")])
    assert [[run.manifest.seed for run in group.runs] for group in arms] == [[1], [1]]
    other = groups.open_group(str(write_run(tmp_path / "other", {1}, seed=9).path))
    with pytest.raises(ValueError, match="no split has been trained in every arm yet; continue the study first"):
        groups.on_common_splits([arms[0], other])


def test_a_glob_is_a_group(seeds):
    group = groups.open_group(str(seeds / "good" / "s[01]"))
    assert [run.run.name for run in group.runs] == ["s0", "s1"]
    with pytest.raises(ValueError, match=r"no run matches .*nothing\*; a glob is looked up here and in runs"):
        groups.open_group(str(seeds / "nothing*"))


def test_a_group_is_one_arm(seeds):
    with pytest.raises(ValueError, match="same seed and split"):
        groups.open_group(str(seeds))
    write_run(seeds / "good" / "other", {1}, run_seed=7, name="resnet18")
    with pytest.raises(ValueError, match="several networks"):
        groups.open_group(str(seeds / "good"))
    shutil.rmtree(seeds / "good" / "other")
    write_run(seeds / "good" / "other", {1}, run_seed=7, pretrain=False)
    with pytest.raises(ValueError, match=r"not one arm: they differ in model"):
        groups.open_group(str(seeds / "good"))


def test_three_groups_give_every_pair(seeds):
    shutil.copytree(seeds / "good", seeds / "third")
    comparisons = compare.all_pairs([groups.open_group(str(seeds / name)) for name in ("good", "poor", "third")])
    assert [(c.a.name, c.b.name) for c in comparisons] == [("good", "poor"), ("good", "third"), ("poor", "third")]
    out = seeds / "out"
    Run(out).write_json("comparison.json", compare.comparison_json(comparisons, out))
    again = compare.read_groups(out)
    assert [len(group.runs) for group in again] == [3, 3, 3]
    assert compare.compare_groups(*again[:2]).difference == comparisons[0].difference
    with pytest.raises(ValueError, match="another one"):
        compare.all_pairs(again[:1])


def test_other_splits_are_refused_by_their_images(tmp_path):
    a, b = write_run(tmp_path / "a", set()), write_run(tmp_path / "b", set(), test=198)
    with pytest.raises(ValueError, match=r"2 images in one test set only: ant/0198.jpg, ant/0199.jpg"):
        compared(a, b)


def test_a_random_start_is_proven(tmp_path):
    from finetune101.models.build import build

    right = build("squeezenet1_1", 2, pretrain=False, size=32, seed=3).init_hash
    tuned = write_run(tmp_path / "tuned", {1}, init_hash="sha256:pretrained")

    def start(name, init_hash):
        run = write_run(tmp_path / name, {2}, name="squeezenet1_1", pretrain=False, run_seed=3, init_hash=init_hash)
        return compared(tuned, run).b.runs[0].start

    assert start("random", right).startswith("random: seed 3 gives the recorded initial state")
    assert start("other", "sha256:other").startswith("not proven")
    assert "is that of tuned, which is pretrained" in start("fake", "sha256:pretrained")


def test_one_run_against_several_is_judged_by_the_interval_not_by_one_pair(tmp_path):
    one = groups.open_group(str(write_run(tmp_path / "a", set(range(40)), run_seed=0).path))
    for seed, wrong in enumerate(({*range(70)}, {*range(195, 200)}, {*range(195, 200)})):
        write_run(tmp_path / "b" / f"s{seed}", wrong, run_seed=seed)
    c = compare.compare_groups(one, groups.open_group(str(tmp_path / "b")))
    assert c.difference < 0 and c.mcnemar[0].only_a > c.mcnemar[0].only_b  # the first pair says the contrary
    assert c.interval[0] < c.difference < c.interval[1] < 0
    assert f"So {c.b.name} is better" in comparison_text(c)
    assert f"One training run of {c.a.name}: another seed" in comparison_text(c)


def test_pairs_share_their_seed(tmp_path):
    for arm, seeds in (("a", (1, 2)), ("b", (0, 1))):
        for seed in seeds:
            write_run(tmp_path / arm / f"s{seed}", {seed, 10 + seed}, run_seed=seed)
    c = compare.compare_groups(*(groups.open_group(str(tmp_path / arm)) for arm in "ab"))
    assert [(pair.a, pair.b) for pair in c.mcnemar] == [(f"{c.a.name}/s1", f"{c.b.name}/s1")]


def test_more_groups_than_a_picture_can_show_are_refused(tmp_path):
    arms = [groups.open_group(str(write_run(tmp_path / f"g{n}", {n}).path)) for n in range(6)]
    assert len(compare.all_pairs(arms[:5])) == 10
    with pytest.raises(ValueError, match="compare shows 5 groups at most"):
        compare.all_pairs(arms)


def test_the_interval_over_splits_by_hand():
    low, high = compare.over_splits([1.0, 2.0, 3.0], 0.5)
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(4.302653 * ((1 / 3 + 0.5) * 1) ** 0.5, rel=1e-6)
