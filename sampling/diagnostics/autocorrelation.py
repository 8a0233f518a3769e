"""Autocorrelation of several chains at once, and how many independent draws their states are worth.

A chain that never leaves its place looks perfectly mixed from inside. So lags are measured against the variance of
all chains together: chains that each stand still at a place of their own have autocorrelation 1, not 0.

Shapes: C chains, T steps (or samples) of each, F features; R rows of autocorrelation.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_ROUNDING: Final = 1e-24
"""Variance as a share of the mean square, below which it is rounding."""
_BLOCK_BYTES: Final = 1 << 27
"""Memory of the Fourier transforms of a block of features."""


@dataclass(frozen=True)
class Correlation:
    """What successive states of chains have in common."""

    rho_T: Float64
    """Autocorrelation at lags 0 … T − 1, of all chains."""
    rho_CT: Float64
    """The same from the motion of each chain alone, against the variance of all."""
    effective: float
    """Effective sample size of all chains, 1 … C·T."""
    effective_C: Float64
    """Of each chain, 1 … T."""

    @property
    def time(self) -> float:
        """Integrated autocorrelation time: states that count as one independent draw, 1 … T."""
        return self.rho_CT.size / self.effective


def correlation(x_CTF: NDArray[np.floating], group_C: NDArray[np.int64]) -> Correlation | None:
    """Autocorrelation of chains that share a target within their group.

    ρ_t = 1 − V_t/(2 var⁺), where V_t is the mean squared difference of states t apart and var⁺ the variance of the
    target from within and between chains (Gelman et al., Bayesian Data Analysis, 3rd ed., eq. 11.3 and 11.7).
    Vehtari et al. (arXiv 1903.08008, eq. 10) have the autocovariance of long chains in place of V_t; about the
    mean of a few states that is biased, and V_t is not. Both are summed over features, which weights each by its
    variance and does not change when features are rotated: on all principal components the figure is the same,
    and on the leading ones it would rest on their number.

    Args:
        group_C: target of each chain; the mean of a group is that of its chains. With one chain to each group
            nothing is known of places that a chain never visits: var⁺ is then the variance within chains.

    Returns:
        None where nothing can be said: fewer than 2 states of a chain, or states that do not vary.
    """
    chains, steps, _ = x_CTF.shape
    if steps < 2:
        return None
    x_CTF = np.asarray(x_CTF, dtype=np.float64)
    mean_CF = x_CTF.mean(axis=1)
    deviation_CTF = x_CTF - mean_CF[:, None]
    variance, _ = _variances(mean_CF, np.square(deviation_CTF).sum(axis=2), group_C)
    if variance <= _ROUNDING * np.square(x_CTF).sum(axis=2).mean():
        return None
    rho_CT = 1 - _half_variogram(deviation_CTF) / variance
    rho_T = rho_CT.mean(axis=0)
    return Correlation(
        rho_T,
        rho_CT,
        chains * steps / float(_autocorrelation_time(rho_T[None])[0]),
        steps / _autocorrelation_time(rho_CT),
    )


def split_r_hat(x_CTF: NDArray[np.floating], group_C: NDArray[np.int64]) -> float | None:
    """√(var⁺/W) of the halves of chains: near 1 where each half has seen what all have (BDA3, eq. 11.4).

    With several features both variances are summed over them.

    Returns:
        None with fewer than 4 states of a chain, or where no half of a chain varies.
    """
    chains, steps, features = x_CTF.shape
    half = steps // 2
    if half < 2:
        return None
    # The middle state of an uneven number is left out.
    ends_CTF = np.concatenate([x_CTF[:, :half], x_CTF[:, steps - half :]], axis=1).astype(np.float64)
    half_CTF = ends_CTF.reshape(2 * chains, half, features)
    mean_CF = half_CTF.mean(axis=1)
    square_CT = np.square(half_CTF - mean_CF[:, None]).sum(axis=2)
    variance, within = _variances(mean_CF, square_CT, np.repeat(group_C, 2))
    if within <= _ROUNDING * np.square(half_CTF).sum(axis=2).mean():
        return None
    return float(np.sqrt(variance / within))


def _variances(mean_CF: Float64, square_CT: Float64, group_C: NDArray[np.int64]) -> tuple[float, float]:
    """var⁺ and W (BDA3, eq. 11.1 to 11.3), from the means of chains and the squared distances from them."""
    chains, steps = square_CT.shape
    within = float(square_CT.sum() / (chains * (steps - 1)))
    _, group_C = np.unique(group_C, return_inverse=True)
    size_G = np.bincount(group_C)
    if len(size_G) == chains:
        return within, within
    total_GF = np.zeros((len(size_G), mean_CF.shape[1]))
    np.add.at(total_GF, group_C, mean_CF)
    from_group_CF = mean_CF - (total_GF / size_G[:, None])[group_C]
    between = float(np.square(from_group_CF).sum() / (chains - len(size_G)))
    return (steps - 1) / steps * within + between, within


def _half_variogram(deviation_CTF: Float64) -> Float64:
    """Half the mean squared difference of states t apart, summed over features, `[C, T]`.

    Σ (x_{i+t} − x_i)² = Σ x_{i+t}² + Σ x_i² − 2 Σ x_i·x_{i+t}, the last sum for all t by one Fourier transform.
    """
    chains, steps, features = deviation_CTF.shape
    length = 1 << (2 * steps - 1).bit_length()  # room for lags without wrapping around
    power_CK = np.zeros((chains, length // 2 + 1))
    block = max(1, _BLOCK_BYTES // (16 * chains * length))
    for start in range(0, features, block):
        spectrum_CKF = np.fft.rfft(deviation_CTF[:, :, start : start + block], length, axis=1)
        power_CK += (np.square(spectrum_CKF.real) + np.square(spectrum_CKF.imag)).sum(axis=2)
    product_CT = np.fft.irfft(power_CK, length, axis=1)[:, :steps]
    square_CT = np.square(deviation_CTF).sum(axis=2)
    # Sums of the first and of the last T − t squares.
    first_CT = square_CT.cumsum(axis=1)[:, ::-1]
    last_CT = square_CT[:, ::-1].cumsum(axis=1)[:, ::-1]
    half_CT: Float64 = np.maximum(first_CT + last_CT - 2 * product_CT, 0) / (2 * np.arange(steps, 0, -1))
    half_CT[:, 0] = 0
    return half_CT


def _autocorrelation_time(rho_RT: Float64) -> Float64:
    """1 + 2 Σ (1 − t/T)·ρ_t over Geyer's initial monotone sequence, `[R]`, 1 … T.

    Sums of two neighbouring lags are taken while they are positive, none larger than the one before (Geyer,
    "Practical Markov chain Monte Carlo", 1992, section 3.3). The factor 1 − t/T makes it the variance of the mean
    of T states exactly: chains that stand still get T, so that each counts once. It is held to 1 from below: a
    chain that swings from side to side has a better mean than independent draws, but no more images to show.
    """
    rows, steps = rho_RT.shape
    padded_RT = np.pad(rho_RT, ((0, 0), (0, steps % 2)))
    pair_RP2 = padded_RT.reshape(rows, -1, 2)
    weight_P2 = np.maximum(1 - np.arange(padded_RT.shape[1]) / steps, 0).reshape(-1, 2)
    sum_RP = pair_RP2.sum(axis=2)
    kept_RP = np.logical_and.accumulate(sum_RP > 0, axis=1)
    lowered_RP = np.minimum.accumulate(sum_RP, axis=1)
    share_RP = np.divide(lowered_RP, sum_RP, out=np.zeros_like(sum_RP), where=kept_RP)
    weighted_RP = (weight_P2 * pair_RP2).sum(axis=2) * share_RP
    time_R: Float64 = np.clip(2 * weighted_RP.sum(axis=1) - 1, 1, steps)
    return time_R
