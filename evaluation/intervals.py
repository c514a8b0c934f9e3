"""Bootstrap intervals over items: seeded, vectorised, paired.

A resample draws n items with replacement; as counts per item it is one row of a matrix, and a resampled mean
is a product with it. All arms of a task share its resamples, so differences are paired (Efron & Tibshirani
1993, ch. 13). Intervals are percentiles 2.5 and 97.5. Called by evaluation/run.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..base.seeding import derive

PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def resamples(count: int, times: int, seed: int, *names: str) -> np.ndarray:
    """float64 [times, count]: how often each item is drawn in each of `times` resamples."""
    random = np.random.default_rng(derive(seed, "bootstrap", *names))
    return random.multinomial(count, np.full(count, 1.0 / count), size=times).astype(np.float64)


def mean_draws(value_N: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    """Resampled means [R] of the values."""
    return count_RN @ value_N / len(value_N)


def ratio_draws(top_N: np.ndarray, bottom_N: np.ndarray, count_RN: np.ndarray) -> np.ndarray:
    """Resampled ratios of sums [R], for example nats per token."""
    return (count_RN @ top_N) / (count_RN @ bottom_N)


def interval(value: float, draws_R: np.ndarray) -> Interval:
    low, high = np.percentile(draws_R, PERCENTILES)
    return Interval(float(value), float(low), float(high))


def paired_difference(value_N: np.ndarray, other_N: np.ndarray, count_RN: np.ndarray) -> Interval:
    """Mean of value - other over the same items, with its interval."""
    difference_N = value_N - other_N
    return interval(difference_N.mean(), mean_draws(difference_N, count_RN))


def macro(values: list[float], draws_TR: list[np.ndarray]) -> Interval:
    """Mean over tasks; every task is resampled by itself, the set of tasks is taken as fixed."""
    return interval(float(np.mean(values)), np.mean(np.stack(draws_TR), axis=0))
