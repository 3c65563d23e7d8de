"""Metrics against hand-computed values, published values and library implementations."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from finetune101.evaluation import metrics


def test_top_k_counts_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 9.0]])
    labels = torch.tensor([0, 1, 2, 2])
    assert metrics.top_k(logits, labels, 1) == 50.0
    assert metrics.top_k(logits, labels, 2) == 75.0
    assert metrics.top_k(logits, labels, 5) == 100.0


def test_cross_entropy_of_known_outputs():
    labels = torch.tensor([0, 3])
    assert metrics.cross_entropy(torch.zeros(2, 4), labels) == pytest.approx(math.log(4))
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]]))
    assert metrics.cross_entropy(logits, labels) == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_mean_per_class_leaves_out_classes_without_images():
    labels = [0, 0, 0, 0, 2, 2]
    predictions = [0, 0, 0, 1, 2, 1]
    assert metrics.mean_per_class(predictions, labels, 5) == pytest.approx((75 + 50) / 2)
    assert metrics.mean_per_class(torch.tensor(predictions), torch.tensor(labels), 5) == pytest.approx(62.5)


def test_wilson_equals_its_formula():
    n, right, z = 1770, 1705, stats.norm.ppf(0.975)
    p = right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert metrics.wilson(right, n) == pytest.approx((100 * (middle - half), 100 * (middle + half)))


@pytest.mark.parametrize("right", [0, 10])
def test_wilson_stays_inside_percent(right):
    low, high = metrics.wilson(right, 10)
    assert 0.0 <= low < high <= 100.0


def test_wilson_covers_the_true_rate():
    rng = np.random.default_rng(0)
    for rate in (0.7, 0.95):
        intervals = [metrics.wilson(int(k), 300) for k in rng.binomial(300, rate, size=400)]
        assert 0.92 < np.mean([low <= 100 * rate <= high for low, high in intervals]) < 0.98


def test_mcnemar_by_hand():
    # Six images that only a gets right, one that only b does: p = 2 * (1 + 7) / 2**7.
    a = [True] * 6 + [False] + [True] * 5
    b = [False] * 6 + [True] + [True] * 5
    assert metrics.mcnemar_exact(a, b) == pytest.approx(2 * 8 / 128)
    assert metrics.mcnemar_exact(b, a) == pytest.approx(2 * 8 / 128)


def test_mcnemar_without_discordant_images():
    assert metrics.mcnemar_exact([True, False], [True, False]) == 1.0


def test_bootstrap_equals_a_resampling_of_images():
    rng = np.random.default_rng(1)
    a, b = rng.random(400) < 0.9, rng.random(400) < 0.8
    difference, low, high = metrics.paired_bootstrap(a, b)
    assert difference == pytest.approx(100 * (a.mean() - b.mean()))
    paired = (a.astype(float) - b.astype(float),)
    other = stats.bootstrap(paired, np.mean, method="percentile", n_resamples=10_000, rng=rng).confidence_interval
    assert (low, high) == pytest.approx((100 * other.low, 100 * other.high), abs=0.4)


def test_bootstrap_is_repeatable_and_antisymmetric():
    a, b = np.arange(200) % 10 != 0, np.arange(200) % 3 != 0
    first = metrics.paired_bootstrap(a, b, seed=3)
    assert first == metrics.paired_bootstrap(a, b, seed=3)
    assert metrics.paired_bootstrap(a, b) == metrics.paired_bootstrap(a, b, seed=0) != first
    difference, low, high = metrics.paired_bootstrap(b, a, seed=3)
    assert difference == -first[0]
    assert (low, high) == pytest.approx((-first[2], -first[1]), abs=1.0)


def test_equal_networks_differ_by_nothing():
    same = [True, True, False]
    assert metrics.paired_bootstrap(same, same) == (0.0, 0.0, 0.0)


def test_crossed_by_hand():
    # two runs x four images: the difference per image is 1/2, 1, 0, 1/2
    a, b = [[1, 1, 0, 1], [0, 1, 0, 1]], [[0, 0, 0, 1], [0, 0, 0, 0]]
    result = metrics.crossed(a, b)
    assert result.difference == pytest.approx(50)
    assert result.images_sd**2 == pytest.approx(np.var([50, 100, 0, 50], ddof=1) / 4)
    # each arm: runs 75 and 50 %, variance 312.5; residuals +-12.5 and +-37.5 points give 1250 / 3 x 1/1 ... / 4 images
    rest = 100**2 * (2 * (0.375**2) + 6 * 0.125**2) / 3
    assert result.runs_sd**2 == pytest.approx(2 * max(0, 312.5 - rest / 4) / 2)
    assert result.interval[0] < 50 < result.interval[1]


def test_crossed_of_runs_that_differ_by_hand():
    # arm a: one run all right, the other all wrong, so images explain none of its variance; arm b never differs
    a, b = [[1, 1, 1, 1], [0, 0, 0, 0]], [[0, 0, 0, 1], [0, 0, 0, 1]]
    result = metrics.crossed(a, b)
    images, runs = np.var([50, 50, 50, -50], ddof=1) / 4, np.var([100, 0], ddof=1) / 2
    assert result.difference == pytest.approx(25)
    assert (images, runs) == (625, 2500)
    assert (result.images_sd**2, result.runs_sd**2) == pytest.approx((images, runs))
    df = (images + runs) ** 2 / (images**2 / 3 + runs**2 / 1)
    assert result.df == pytest.approx(df)
    half = stats.t.ppf(0.975, df) * (images + runs) ** 0.5
    assert result.interval == pytest.approx((25 - half, 25 + half))
    assert result.p == pytest.approx(2 * stats.t.sf(25 / (images + runs) ** 0.5, df))


def test_crossed_takes_from_the_runs_what_the_images_explain_by_hand():
    # residuals of arm a: 6 times 1/8, 2 times 3/8, so 3/8 / 3 = 1/8 (1250 points squared); its runs: 75 and 0 %
    result = metrics.crossed([[1, 1, 1, 0], [0, 0, 0, 0]], [[0, 0, 0, 0]] * 2)
    assert result.runs_sd**2 == pytest.approx((75**2 / 2 - 1250 / 4) / 2)


def test_crossed_needs_two_runs_and_takes_equal_ones():
    with pytest.raises(ValueError, match="two runs on each side"):
        metrics.crossed([[1, 0]], [[1, 0], [1, 1]])
    with pytest.raises(ValueError, match="needs two of them"):
        metrics.crossed([[1], [0]], [[1], [1]])
    same = metrics.crossed([[1, 0]] * 2, [[1, 0]] * 2)
    assert (same.difference, same.interval, same.p, same.df, same.images_sd, same.runs_sd) == (0, (0, 0), 1, 1, 0, 0)


def test_few_images_give_a_wide_interval_but_no_endless_one():
    # a side's runs differ by more than the images' mean differences show: by the formula 0.01 degrees of freedom
    result = metrics.crossed([[0, 0], [0, 1]], [[0, 0], [0, 0], [0, 1]])
    assert (result.df, result.p) == (1, pytest.approx(0.5))  # difference and standard error are both 100 / 12
    assert result.interval == pytest.approx((100 / 12 * (1 - 12.7062047), 100 / 12 * (1 + 12.7062047)))


def test_crossed_covers_the_truth():
    # images and runs both random; the whole grid is benchmarks/intervals.py
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        hard, runs = rng.standard_normal(300), rng.standard_normal((2, 3, 1)) * 0.2
        a, b = (hard + run + rng.standard_normal((3, 300)) > 0 for run in runs)
        low, high = metrics.crossed(a, b).interval
        held += low <= 0 <= high
    assert 0.92 < held / 400 < 0.985


def test_temperature_mends_logits_that_are_too_sure():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.standard_normal((4000, 5)))
    labels = torch.tensor([rng.choice(5, p=p) for p in torch.softmax(logits, 1).numpy()])
    assert metrics.temperature(3 * logits, labels) == pytest.approx(3, rel=0.1)


def drawn(images, scale, classes=5, seed=0):
    """Logits, ``scale`` times too large, and labels that are drawn from their probabilities."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((images, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return torch.tensor(scale * logits), torch.tensor([rng.choice(classes, p=row) for row in p])


def test_calibration_is_kept_where_it_helps():
    result = metrics.calibrate(*drawn(2000, 3.0))
    assert result.temperature == pytest.approx(3, rel=0.1) and not result.reason
    assert metrics.calibrate(*drawn(2000, 0.5)).temperature == pytest.approx(0.5, rel=0.1)


def test_calibration_that_does_not_help_is_left_out():
    rng = np.random.default_rng(0)
    chance = torch.tensor(rng.standard_normal((900, 101))), torch.tensor(rng.integers(0, 101, 900))
    right = torch.arange(50) % 5
    for logits, labels in (
        chance,  # the best temperature is as high as it may be
        (10 * torch.nn.functional.one_hot(right, 5).double(), right),  # all right: the lower the better
        drawn(6, 3.0),  # too few
        (torch.zeros(50, 5), right),  # says nothing
    ):
        result = metrics.calibrate(logits, labels)
        assert result.temperature == 1 and result.reason


def test_a_temperature_never_makes_validation_worse():
    kept = 0
    for seed in range(40):
        logits, labels = drawn(60, 1.0 + seed % 4 / 4, seed=seed)
        result = metrics.calibrate(logits, labels)
        errors = [
            metrics.ece(metrics.reliability(*metrics.confidences(logits, t, labels))) for t in (1, result.temperature)
        ]
        losses = [metrics.cross_entropy(logits / t, labels) for t in (1, result.temperature)]
        assert errors[1] <= errors[0] and losses[1] <= losses[0] and 0.1 < result.temperature < 10
        assert bool(result.reason) == (result.temperature == 1)
        kept += result.temperature != 1
    assert 0 < kept < 40


def test_ten_images_are_enough_for_a_temperature():
    assert metrics.too_few(10) == "" and metrics.too_few(9).startswith("9 validation images are too few")


def test_reliability_and_ece_by_hand():
    bins = metrics.reliability([0.95, 1.0, 0.55, 0.0], [True, False, True, False], bins=10)
    assert [b["n"] for b in bins] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert bins[9] == {"n": 2, "confidence": pytest.approx(97.5), "top1": 50.0}
    assert metrics.ece(bins) == pytest.approx((1 * 0 + 1 * 0.45 + 2 * 0.475) / 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.wilson(0, 0),
        lambda: metrics.wilson(5, 4),
        lambda: metrics.mean_per_class([], [], 3),
        lambda: metrics.top_k(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)),
        lambda: metrics.cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)),
        lambda: metrics.mcnemar_exact([True], [True, False]),
        lambda: metrics.paired_bootstrap([], []),
        lambda: metrics.reliability([], []),
    ],
)
def test_impossible_input_is_a_value_error(call):
    with pytest.raises(ValueError):
        call()
