"""The Inception Score against its definition, image by image."""

import math

import numpy as np
import pytest

from ditmoe.sampling.metrics.inception_score import SplitSums, inception_score


def by_brute_force(probabilities: np.ndarray) -> float:
    marginal = [sum(row[c] for row in probabilities) / len(probabilities) for c in range(probabilities.shape[1])]
    divergence = [
        sum(float(p) * math.log(float(p) / q) for p, q in zip(row, marginal, strict=True) if p > 0)
        for row in probabilities
    ]
    return math.exp(sum(divergence) / len(divergence))


def random_probabilities(count: int, classes: int, seed: int) -> np.ndarray:
    logits = 3 * np.random.default_rng(seed).standard_normal((count, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probabilities[::7] = np.eye(classes)[0]  # zeros take no part
    return probabilities


def test_it_is_the_mean_over_splits() -> None:
    probabilities = random_probabilities(230, 6, 0)
    expected = [by_brute_force(probabilities[first : first + 100]) for first in (0, 100, 200)]
    mean, deviation, splits = inception_score(probabilities, split=100)
    assert mean == pytest.approx(np.mean(expected), rel=1e-12) and splits == 3
    assert deviation == pytest.approx(np.std(expected), rel=1e-11)


def test_sums_of_parts_are_those_of_the_set() -> None:
    probabilities, split = random_probabilities(90, 5, 1), np.arange(90) % 4
    whole = SplitSums.of(probabilities, split, 6)
    merged = SplitSums.of(probabilities[:31], split[:31], 6).merge(SplitSums.of(probabilities[31:], split[31:], 6))
    np.testing.assert_allclose(merged.scores_S, whole.scores_S, rtol=1e-13)
    assert whole.scores_S == pytest.approx([by_brute_force(probabilities[split == s]) for s in range(4)])


def test_bounds() -> None:
    certain = np.eye(4)[np.arange(400) % 4]
    assert inception_score(certain)[0] == pytest.approx(4.0)
    assert inception_score(np.full((100, 4), 0.25))[0] == pytest.approx(1.0)
    assert inception_score(certain, split=100)[2] == 4
