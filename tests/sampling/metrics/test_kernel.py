"""KID against sums over all pairs."""

from itertools import product

import numpy as np
import pytest
import torch

from ditmoe.model.randomness import generator
from ditmoe.sampling.metrics.kernel import SEED, kernel_distance, unbiased_mmd2
from tests.sampling.metrics.test_moments import random_features


def by_brute_force(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i, j in product(range(n), range(n)) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i, j in product(range(m), range(m)) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a, b in product(x, y)) / (n * m)


def test_the_estimate_is_the_sum_over_all_pairs() -> None:
    x, y = random_features(23, 5, 1), random_features(31, 5, 2, scale=1.4, shift=0.2)
    assert unbiased_mmd2(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(
        by_brute_force(x, y), rel=1e-11
    )
    of_subsets = kernel_distance(x, y, subsets=3)
    assert of_subsets.images == 11 and of_subsets.subsets == 3 and of_subsets.deviation > 0


def test_subsets_are_drawn_by_a_seed_without_replacement() -> None:
    x, y = (random_features(40, 4, seed).astype(np.float32) for seed in (3, 4))
    values = []
    for number in range(5):
        random = generator(SEED, "evaluate/kid", number)
        one, other = (each[random.choice(40, 15, replace=False)].astype(np.float64) for each in (x, y))
        values.append(by_brute_force(one, other))
    found = kernel_distance(x, y, subsets=5, images=15)
    assert found.value == pytest.approx(np.mean(values), rel=1e-11)
    assert found.deviation == pytest.approx(np.std(values), rel=1e-11)


def test_equal_distributions_have_none_and_others_have_some() -> None:
    x, y, z = (
        random_features(3000, 8, 5, scale=scale)[order]
        for scale, order in ((1.0, slice(0, 1500)), (1.0, slice(1500, None)), (1.2, slice(1500, None)))
    )
    same, other = kernel_distance(x, y, images=300), kernel_distance(x, z, images=300)
    assert abs(same.value) < same.deviation < other.value / 3
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(x, y[:1])


def test_threads_are_not_in_the_last_digits() -> None:
    x, y = random_features(400, 70, 6).astype(np.float32), random_features(300, 70, 7).astype(np.float32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(kernel_distance(x, y, subsets=6, images=200))
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
