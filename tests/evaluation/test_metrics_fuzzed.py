"""Metrics of random answers against definitions that are written out here, image by image, in the plainest Python."""

from __future__ import annotations

import itertools
import math
import os
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune101.evaluation import metrics

EXAMPLES = int(os.environ.get("FINETUNE101_EXAMPLES", "60"))  # another number for a longer or a shorter search
fuzzed = settings(derandomize=True, deadline=None, database=None, max_examples=EXAMPLES)
Rows = list[list[float]]
SCORE = st.integers(-400, 400).map(lambda n: n / 16)  # exact in single precision, from certain to undecided


@st.composite
def outputs(draw: st.DrawFn, distinct: bool = False) -> tuple[Rows, list[int]]:
    """Outputs of a network of 1 to 6 classes for 1 to 12 images, and the labels."""
    classes, images = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    row = st.lists(SCORE, min_size=classes, max_size=classes, unique=distinct)
    rows = draw(st.lists(row, min_size=images, max_size=images))
    return rows, draw(st.lists(st.integers(0, classes - 1), min_size=images, max_size=images))


@st.composite
def answers(draw: st.DrawFn, runs: int = 1, images: int = 1) -> tuple[list[list[bool]], list[list[bool]]]:
    """Right or wrong of two arms of ``runs`` runs or more, on the same ``images`` images or more."""
    count = draw(st.integers(images, 12))
    arm = st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=runs, max_size=4)
    return draw(arm), draw(arm)


@fuzzed
@given(outputs(distinct=True), st.integers(1, 8))
def test_top_k_is_the_share_of_labels_among_the_k_highest(data: tuple[Rows, list[int]], k: int) -> None:
    rows, labels = data
    right = sum(
        sum(other > row[label] for other in row) < k for row, label in zip(rows, labels, strict=True)
    )  # fewer than k outputs are above the label's
    assert metrics.top_k(torch.tensor(rows), torch.tensor(labels), k) == pytest.approx(100 * right / len(labels))


@fuzzed
@given(outputs())
def test_cross_entropy_is_the_mean_of_minus_log_probability(data: tuple[Rows, list[int]]) -> None:
    rows, labels = data
    losses = []
    for row, label in zip(rows, labels, strict=True):
        highest = max(row)
        losses.append(highest + math.log(sum(math.exp(x - highest) for x in row)) - row[label])
    found = metrics.cross_entropy(torch.tensor(rows), torch.tensor(labels))
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-9)


@fuzzed
@given(outputs(), st.integers(1, 40).map(lambda n: n / 8))
def test_probabilities_add_up_and_confidence_is_the_highest(data: tuple[Rows, list[int]], t: float) -> None:
    rows, labels = data
    logits = torch.tensor(rows)
    shares = metrics.probabilities(logits, t)
    sums = [[math.exp((x - max(row)) / t) for x in row] for row in rows]
    assert shares.tolist() == [pytest.approx([x / sum(row) for x in row], abs=1e-12) for row in sums]
    sure, right = metrics.confidences(logits, t, torch.tensor(labels))
    assert sure.tolist() == shares.max(1).values.tolist()
    best = [row.index(max(row)) for row in shares.tolist()]
    assert right.tolist() == [a == b for a, b in zip(best, labels, strict=True)]


@fuzzed
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30), st.integers(5, 8))
def test_mean_per_class_is_a_mean_of_class_accuracies(pairs: list[tuple[int, int]], classes: int) -> None:
    shares = []
    for name in {label for label, _ in pairs}:
        own = [answer == label for label, answer in pairs if label == name]
        shares.append(Fraction(sum(own), len(own)))
    predictions, labels = [answer for _, answer in pairs], [label for label, _ in pairs]
    expected = 100 * float(sum(shares, Fraction(0)) / len(shares))
    assert metrics.mean_per_class(predictions, labels, classes) == pytest.approx(expected)


@fuzzed
@given(st.integers(1, 3000), st.integers(0, 3000), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_ends_of_wilsons_interval_solve_its_equation(n: int, right: int, level: float) -> None:
    right = min(right, n)
    low, high = (end / 100 for end in metrics.wilson(right, n, level))
    z = {0.5: 0.6744897501960817, 0.9: 1.6448536269514722, 0.95: 1.959963984540054, 0.99: 2.5758293035489004}[level]
    assert 0 <= low <= right / n <= high <= 1
    for end in (low, high):  # a true rate at which the observed one is z standard errors away
        assert abs(right / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-9)
    turned = metrics.wilson(n - right, n, level)
    assert turned == pytest.approx((100 - 100 * high, 100 - 100 * low))


@fuzzed
@given(answers())
def test_mcnemar_is_a_sign_test_of_the_images_that_one_side_gets_right(
    data: tuple[list[list[bool]], list[list[bool]]],
) -> None:
    a, b = data[0][0], data[1][0]
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    assert metrics.mcnemar_exact(a, b) == pytest.approx(float(min(Fraction(1), Fraction(2 * tail, 2**n))))


@fuzzed
@given(answers(images=2))
def test_the_bootstrap_holds_the_difference_and_stays_within_what_images_can_give(
    data: tuple[list[list[bool]], list[list[bool]]],
) -> None:
    a, b = ([sum(column) / len(arm) for column in zip(*arm, strict=True)] for arm in data)
    gains = [100 * (x - y) for x, y in zip(a, b, strict=True)]
    difference, low, high = metrics.paired_bootstrap(a, b, resamples=400)
    assert difference == pytest.approx(sum(gains) / len(gains), abs=1e-6)
    assert min(gains) - 1e-6 <= low <= high <= max(gains) + 1e-6
    narrow = metrics.paired_bootstrap(a, b, level=0.5, resamples=400)
    assert low <= narrow[1] <= narrow[2] <= high
    if len(gains) == 2:  # all four samples of two images are equally likely, so that the ends are certain
        assert (low, high) == pytest.approx((min(gains), max(gains)), abs=1e-6)


@fuzzed
@given(answers(runs=2, images=2))
def test_the_interval_over_images_and_runs_by_sums(data: tuple[list[list[bool]], list[list[bool]]]) -> None:
    a, b = data
    result = metrics.crossed(a, b)
    n = len(a[0])
    means = [[Fraction(sum(column), len(arm)) for column in zip(*arm, strict=True)] for arm in data]
    gains = [x - y for x, y in zip(*means, strict=True)]
    mean = sum(gains, Fraction(0)) / n
    images = sum(((x - mean) ** 2 for x in gains), Fraction(0)) / (n - 1) / n
    parts, raws = [], []
    for arm, columns in zip(data, means, strict=True):
        rows = [Fraction(sum(row), n) for row in arm]
        whole = sum(rows, Fraction(0)) / len(arm)
        between = sum(((row - whole) ** 2 for row in rows), Fraction(0)) / (len(arm) - 1)
        rest = sum(
            (arm[i][j] - rows[i] - columns[j] + whole) ** 2 for i, j in itertools.product(range(len(arm)), range(n))
        ) / ((len(arm) - 1) * (n - 1))
        parts.append(max(Fraction(0), between - rest / n) / len(arm))
        raws.append(between / len(arm))
    variance = images + sum(parts)
    assert result.difference == pytest.approx(100 * float(mean), abs=1e-9)
    assert result.images_sd == pytest.approx(100 * math.sqrt(images), abs=1e-6)
    assert result.runs_sd == pytest.approx(100 * math.sqrt(sum(parts)), abs=1e-6)
    if variance:
        weights = images**2 / (n - 1) + sum(raw**2 / (len(arm) - 1) for raw, arm in zip(raws, data, strict=True))
        assert result.df == pytest.approx(max(1.0, float(variance**2 / weights)))
    low, high = result.interval
    assert (low + high) / 2 == pytest.approx(result.difference, abs=1e-9) and 0 <= result.p <= 1
    assert (low <= 0 <= high) == (result.p > 0.05)


@fuzzed
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), st.integers(1, 20))
def test_reliability_puts_each_image_into_the_bin_of_its_confidence(
    images: list[tuple[float, bool]], bins: int
) -> None:
    table = metrics.reliability([sure for sure, _ in images], [right for _, right in images], bins)
    assert len(table) == bins and sum(row["n"] for row in table) == len(images)
    error = 0.0
    for k, row in enumerate(table):  # a bin holds its upper end, the first one 0 as well
        own = [(s, right) for s, right in images if k < s * bins <= k + 1 or (s == 0 == k)]
        assert row["n"] == len(own)
        if own:
            sure, right = sum(s for s, _ in own) / len(own), sum(right for _, right in own) / len(own)
            assert (row["confidence"], row["top1"]) == (pytest.approx(100 * sure), pytest.approx(100 * right))
            error += len(own) / len(images) * abs(sure - right)
        else:
            assert row == {"n": 0, "confidence": None, "top1": None}
    assert metrics.ece(table) == pytest.approx(error, abs=1e-12)


SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=20)


@fuzzed
@given(SCORES, SCORES, st.integers(1, 20).map(lambda n: n / 20))
def test_auroc_and_false_positives_pair_by_pair(high: list[float], low: list[float], kept: float) -> None:
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in itertools.product(high, low)]
    assert metrics.auroc(high, low) == pytest.approx(sum(pairs) / len(pairs))
    fewest = math.ceil(kept * len(low))
    threshold = next(x for x in sorted(low) if sum(y <= x for y in low) >= fewest)
    expected = sum(x <= threshold for x in high) / len(high)
    assert metrics.false_positive_rate(high, low, kept) == pytest.approx(expected)
