"""Intervals cover, are seeded, and paired differences are narrower than unpaired ones."""

from __future__ import annotations

import numpy as np
from quietgoose.evaluation.intervals import (
    interval,
    macro,
    mean_draws,
    paired_difference,
    ratio_draws,
    resamples,
)


def test_seeded_by_name_and_whole():
    first, again, other = resamples(50, 20, 3, "a"), resamples(50, 20, 3, "a"), resamples(50, 20, 3, "b")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.all(first.sum(axis=1) == 50)


def test_equals_a_plain_bootstrap():
    value = np.random.default_rng(0).random(40)
    counts = resamples(40, 500, 0, "t")
    plain = [np.repeat(value, row.astype(int)).mean() for row in counts]
    np.testing.assert_allclose(mean_draws(value, counts), plain, rtol=1e-12)
    weights = np.arange(1.0, 41.0)
    plain = [np.repeat(value, row.astype(int)).sum() / np.repeat(weights, row.astype(int)).sum() for row in counts]
    np.testing.assert_allclose(ratio_draws(value, weights, counts), plain, rtol=1e-12)


def test_coverage_near_95_percent():
    random, hits = np.random.default_rng(1), 0
    for trial in range(300):
        value = (random.random(150) < 0.6).astype(float)
        found = interval(value.mean(), mean_draws(value, resamples(150, 400, trial, "c")))
        hits += found.low <= 0.6 <= found.high
    assert 0.90 <= hits / 300 <= 0.985


def test_paired_is_narrower_and_zero_for_equal_arms():
    random = np.random.default_rng(2)
    one = (random.random(400) < 0.5).astype(float)
    two = np.where(random.random(400) < 0.05, 1 - one, one)
    counts = resamples(400, 1000, 0, "t")
    paired = paired_difference(two, one, counts)
    apart = mean_draws(two, counts) - mean_draws(one, resamples(400, 1000, 1, "t"))
    assert paired.high - paired.low < 0.5 * (np.percentile(apart, 97.5) - np.percentile(apart, 2.5))
    same = paired_difference(one, one, counts)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_macro_mean_narrows_with_tasks():
    random = np.random.default_rng(3)
    values = [(random.random(100) < 0.5).astype(float) for _ in range(9)]
    draws = [mean_draws(value, resamples(100, 1000, 0, str(index))) for index, value in enumerate(values)]
    alone, together = interval(values[0].mean(), draws[0]), macro([v.mean() for v in values], draws)
    assert np.isclose(together.value, np.mean([v.mean() for v in values]))
    ratio = (together.high - together.low) / (alone.high - alone.low)
    assert 0.25 < ratio < 0.45  # 1/3 for nine independent tasks
