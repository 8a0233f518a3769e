"""The Fréchet distance against closed forms, scipy, and mpmath with 70 digits."""

import mpmath
import numpy as np
import pytest
import torch
from scipy import linalg

from ditmoe.sampling.metrics.frechet import EPSILON, exact_product, frechet_distance
from ditmoe.sampling.metrics.moments import Gaussian, Moments
from tests.sampling.metrics.test_moments import random_features

MANY = 2**20 + 1
"""Images: more than features, and one more than a power of two: a scatter is as exact as its covariance."""


def gaussian(mean: np.ndarray, covariance: np.ndarray, count: int = MANY) -> Moments:
    return Moments(count, mean, covariance * (count - 1))


def test_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.standard_normal((8, 8)))
    s, t = random.uniform(0.5, 2, 8), random.uniform(0.5, 2, 8)
    mean_a, mean_b = random.standard_normal(8), random.standard_normal(8)
    a, b = (gaussian(m, basis @ np.diag(v**2) @ basis.T) for m, v in ((mean_a, s), (mean_b, t)))
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((s - t) ** 2)
    distance = frechet_distance(a, b)
    assert distance.value == pytest.approx(expected, rel=1e-12)
    assert distance.ranks == (8, 8)
    assert distance.error < 1e-11
    assert distance.mean_term == pytest.approx(np.sum((mean_a - mean_b) ** 2))


@pytest.mark.parametrize("dimension", [2, 16, 64])
def test_distance_agrees_with_sqrtm_where_that_is_sound(dimension: int) -> None:
    a = Moments.of(random_features(2000, dimension, 1))
    b = Moments.of(random_features(2000, dimension, 2, scale=1.5, shift=0.3))
    root = linalg.sqrtm(a.covariance_FF @ b.covariance_FF).real
    trace = np.trace(a.covariance_FF + b.covariance_FF - 2 * root)
    expected = np.sum((a.mean_F - b.mean_F) ** 2) + trace
    distance = frechet_distance(a, b)
    assert distance.value == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a).value == pytest.approx(distance.value, rel=1e-10)


def test_distance_of_a_set_to_itself_is_zero_within_its_stated_error() -> None:
    for count in (500, 20):
        a = Moments.of(random_features(count, 64, 3))
        distance = frechet_distance(a, a)
        assert abs(distance.value) <= distance.error
        assert distance.error < 1e-5


def test_rank_deficient_covariances_are_exact_within_the_stated_error() -> None:
    # Two sets in the same plane of a 100-dimensional space: the distance is that within the plane.
    random = np.random.default_rng(4)
    basis, _ = np.linalg.qr(random.standard_normal((100, 3)))
    x, y = random.standard_normal((50, 3)), 2 * random.standard_normal((40, 3)) + 1
    inside = frechet_distance(Moments.of(x), Moments.of(y))
    outside = frechet_distance(Moments.of(x @ basis.T), Moments.of(y @ basis.T))
    assert outside.ranks == (3, 3)
    assert abs(outside.value - inside.value) <= outside.error
    assert outside.value == pytest.approx(inside.value, rel=1e-9)


def test_orthogonal_supports_have_no_common_root() -> None:
    a = gaussian(np.zeros(4), np.diag([1.0, 2.0, 0, 0]))
    b = gaussian(np.zeros(4), np.diag([0, 0, 3.0, 4.0]))
    assert frechet_distance(a, b).value == pytest.approx(10.0)
    still = gaussian(np.ones(4), np.zeros((4, 4)))
    assert frechet_distance(a, still).value == pytest.approx(3.0 + 4.0)


def with_eigenvalues(eigenvalues: np.ndarray, seed: int) -> np.ndarray:
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues), len(eigenvalues))))
    covariance = (basis * eigenvalues) @ basis.T
    return (covariance + covariance.T) / 2


def distance_of_mpmath(a: Moments | Gaussian, b: Moments | Gaussian) -> mpmath.mpf:
    with mpmath.workdps(70):
        one, other = (mpmath.matrix(((m.covariance_FF + m.covariance_FF.T) / 2).tolist()) for m in (a, b))
        eigenvalues, vectors = mpmath.eigsy(one)
        assert min(eigenvalues) > 0
        root = vectors * mpmath.diag([mpmath.sqrt(value) for value in eigenvalues]) * vectors.T
        singular = [mpmath.sqrt(value) for value in mpmath.eigsy(root * other * root, eigvals_only=True)]
        shift = sum((mpmath.mpf(x) - mpmath.mpf(y)) ** 2 for x, y in zip(a.mean_F, b.mean_F, strict=True))
        trace = sum(one[i, i] + other[i, i] for i in range(one.rows))
        return +(shift + trace - 2 * sum(singular))


N = 12
FLAT = np.array([1.0] * 3 + [3e-15] * (N - 3))
ILL_CONDITIONED = {
    "six decades": (np.logspace(0, -6, N), np.logspace(0, -6, N)[::-1]),
    "thirteen decades": (np.logspace(0, -13, N), np.logspace(0, -13, N)),
    "against a round one": (np.logspace(0, -14, N), np.linspace(1, 2, N)),
    "a plane and its rounding": (FLAT, np.linspace(1, 2, N)),
    "of other scales": (1e9 * np.logspace(0, -13, N), 1e-6 * np.linspace(1, 2, N)),
    "two planes": (FLAT, FLAT[::-1]),
}


@pytest.mark.parametrize("spectra", ILL_CONDITIONED.values(), ids=ILL_CONDITIONED.keys())
@pytest.mark.parametrize("shift", [0.0, 0.01])
def test_ill_conditioned_distances_are_those_of_mpmath(spectra: tuple[np.ndarray, ...], shift: float) -> None:
    a = gaussian(np.zeros(N), with_eigenvalues(spectra[0], 1))
    b = gaussian(np.full(N, shift), with_eigenvalues(spectra[1], 2))
    expected = distance_of_mpmath(a, b)
    for distance in (frechet_distance(a, b), frechet_distance(b, a)):
        assert abs(distance.value - expected) <= 1e-12 * expected
        assert abs(distance.value - expected) <= distance.error <= 1e-8 * expected


@pytest.mark.parametrize("decades", [4, 13])
def test_distances_of_near_gaussians_are_those_of_mpmath(decades: int) -> None:
    """What is left of traces that cancel to one in a hundred thousand."""
    one = with_eigenvalues(np.logspace(0, -decades, N), 3)
    change = np.eye(N) + 1e-3 * np.random.default_rng(4).standard_normal((N, N))
    other = change @ one @ change.T
    a, b = gaussian(np.zeros(N), one), gaussian(np.zeros(N), (other + other.T) / 2)
    expected, distance = distance_of_mpmath(a, b), frechet_distance(a, b)
    assert expected < 1e-4
    assert abs(distance.value - expected) <= 1e-8 * expected
    assert abs(distance.value - expected) <= distance.error < 1e-9


def test_a_large_distance_that_is_known_exactly() -> None:
    """Covariances whose entries are sums of powers of two, in the directions of a Hadamard matrix."""
    size = 256
    hadamard = linalg.hadamard(size).astype(np.float64)
    s, t = 2.0 ** -(np.arange(size) % 19), 2.0 ** -(np.arange(size)[::-1] % 7)
    a, b = (gaussian(np.zeros(size), (hadamard * root**2) @ hadamard.T / size) for root in (s, t))
    distance, expected = frechet_distance(a, b), float(np.sum((s - t) ** 2))
    assert distance.value == pytest.approx(expected, rel=1e-12)
    assert abs(distance.value - expected) <= distance.error < 1e-8 * expected
    assert distance.ranks == (size, size)


def test_products_are_exact_beyond_float64() -> None:
    random = np.random.default_rng(5)
    a, b, c = (torch.from_numpy(random.standard_normal((9, 9)) * 10.0 ** random.integers(-3, 4, 9)) for _ in "abc")
    found = exact_product(a, exact_product(b, c))
    with mpmath.workdps(70):
        expected = mpmath.matrix(a.tolist()) * mpmath.matrix(b.tolist()) * mpmath.matrix(c.tolist())
        largest = max(abs(value) for value in expected)
        for i in range(9):
            for j in range(9):
                value = mpmath.mpf(found[0, i, j].item()) + mpmath.mpf(found[1, i, j].item())
                assert abs(value - expected[i, j]) <= largest * EPSILON**1.5


def test_threads_are_not_in_the_last_digits_of_a_distance() -> None:
    a, b = (gaussian(np.zeros(80), with_eigenvalues(np.logspace(0, -12, 80), seed)) for seed in (6, 7))
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(frechet_distance(a, b))
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[1]


SIZE, BLOCKS = 2048, 256
"""Features of Inception, and the blocks that their space is cut into, each of 8."""


def small_covariances(random: np.random.Generator, blocks: int, decades: float) -> np.ndarray:
    """Integers B·2⁴⁰ of covariances `[blocks, 8, 8]` that do not commute, of eigenvalues over some decades."""
    scale = 2.0**20 * np.logspace(0, -decades / 2, 8)
    factor = np.round(random.uniform(-1, 1, (blocks, 8, 8)) * scale).astype(np.int64)
    return factor @ factor.transpose(0, 2, 1)


def lifted(block_BSS: np.ndarray, mean_BS: np.ndarray) -> Gaussian:
    """The Gaussian of independent blocks, its blocks mixed by a Hadamard matrix: no entry is rounded.

    Entries are integers below 2⁵³ times a power of two: 40 bits of a block's products, 3 of its sums, and 8 of the
    sums over blocks.
    """
    hadamard = linalg.hadamard(BLOCKS).astype(np.int64)
    mixed = np.zeros((BLOCKS, 8, BLOCKS, 8), dtype=np.int64)
    for i in range(8):
        for j in range(8):
            mixed[:, i, :, j] = (hadamard * block_BSS[:, i, j]) @ hadamard
    assert np.abs(mixed).max() < 2**53
    mean = (hadamard @ mean_BS) / 2.0**20 / BLOCKS**0.5
    return Gaussian(None, mean.reshape(SIZE), mixed.reshape(SIZE, SIZE) / 2.0**40 / BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize(("decades", "near"), [(11.0, False), (3.0, True)])
def test_distances_of_2048_features_are_those_of_mpmath(decades: float, near: bool) -> None:
    """Covariances that do not commute, ill conditioned or nearly equal: their distance is that of blocks."""
    random = np.random.default_rng(8)
    one = small_covariances(random, BLOCKS, decades)
    other = small_covariances(random, BLOCKS, decades)
    if near:  # what is left of traces that cancel
        other = one + np.round(2.0**-10 * np.abs(one[:, :1, :1]) * np.eye(8)).astype(np.int64)
    mean = np.round(random.uniform(-1, 1, (BLOCKS, 8)) * 2**14).astype(np.int64)
    nowhere = np.zeros((2, 8))
    expected = mpmath.mpf(float((mean.astype(np.float64) ** 2).sum() / 2.0**40))
    for each in range(BLOCKS):
        a, b = (Gaussian(None, nowhere[place], block[each] / 2.0**40) for place, block in enumerate((one, other)))
        expected += distance_of_mpmath(a, b)
    a, b = lifted(one, np.zeros_like(mean)), lifted(other, mean)
    assert np.linalg.cond(a.covariance_FF) > 10 ** (decades - 2)
    distance = frechet_distance(a, b)
    assert abs(distance.value - expected) <= 1e-8 * expected
    assert abs(distance.value - expected) <= distance.error


@pytest.mark.slow
def test_a_distance_of_2048_features_that_is_known_exactly() -> None:
    hadamard = linalg.hadamard(SIZE).astype(np.float64)
    s, t = 2.0 ** -(np.arange(SIZE) % 19), 2.0 ** -(np.arange(SIZE)[::-1] % 7)
    a, b = (Gaussian(None, np.zeros(SIZE), (hadamard * root**2) @ hadamard.T / SIZE) for root in (s, t))
    distance, expected = frechet_distance(a, b), float(np.sum((s - t) ** 2))
    assert abs(distance.value - expected) <= min(1e-10 * expected, distance.error)
