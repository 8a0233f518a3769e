"""The Fréchet distance between two Gaussians, with a bound on what rounding may have moved it by.

The distance has square roots of covariances in it: an eigenvalue that is wrong by ε is wrong by √ε in the root.
So those eigenvalues that a symmetric eigendecomposition cannot tell well, because they are far smaller than the
largest one, are found again in the space of their eigenvectors alone, from products without rounding.

Shapes: F features; L large and S small eigenvalues.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ditmoe.model.threads import one_thread
from ditmoe.sampling.metrics.moments import Gaussian, Moments

EPSILON: Final = float(np.finfo(np.float64).eps)
SMALL: Final = EPSILON**0.5
"""Part of the largest eigenvalue below which eigenvalues are found again."""
_MANTISSA: Final = 53
_SLICES: Final = 4
"""Summands that a factor of a product without rounding is cut into: enough for errors of SMALL · ε of the
largest."""


@dataclass(frozen=True)
class FrechetDistance:
    """The Fréchet distance between two Gaussians, and how far rounding may have moved it."""

    value: float
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)."""
    mean_term: float
    """|μ₁ − μ₂|²."""
    error: float
    """Bound on the numerical error of `value`, for the moments as they are given; not the statistical error of a
    finite number of images."""
    ranks: tuple[int, int]
    """Numerical ranks of Σ₁ and Σ₂; below the number of features when there are too few images."""


def frechet_distance(a: Moments | Gaussian, b: Moments | Gaussian) -> FrechetDistance:
    """FID (Heusel et al. 2017, eq. 6) from factors of the covariances.

    With Σᵢ = RᵢᵀRᵢ, the eigenvalues of Σ₁Σ₂ are the squared singular values of R₁R₂ᵀ: they are real and
    non-negative by construction, also for singular covariances, and tr (Σ₁Σ₂)^½ is the sum of the singular values.
    No square root of a rounded matrix is taken.

    `error`: where Rᵢ is off by Dᵢ in the Frobenius norm, the sum of singular values is off by
    |D₁||R₂| + |R₁||D₂| + |D₁||D₂| at most, with |Rᵢ|² = tr Σᵢ. To it come the backward error F·ε·s_max of each
    singular value and the rounding of traces and means.
    """
    if a.dimension != b.dimension:
        raise ValueError(f"statistics of {a.dimension} and of {b.dimension} features")
    if min(count for count in (a.count, b.count, 2) if count is not None) < 2:
        raise ValueError(f"statistics of {a.count} and {b.count} images; at least 2 each")
    root_a, root_b = _Root.of(a), _Root.of(b)
    with one_thread():
        singular = torch.linalg.svdvals(root_a.factor @ root_b.factor.T)
        trace_root = float(singular.sum())
        largest = float(singular.max()) if len(singular) else 0.0
    trace_a, trace_b = float(np.trace(a.covariance_FF)), float(np.trace(b.covariance_FF))
    mean_term = float(np.sum((a.mean_F - b.mean_F) ** 2))
    value = mean_term + trace_a + trace_b - 2 * trace_root
    off = root_a.error * trace_b**0.5 + root_b.error * trace_a**0.5 + root_a.error * root_b.error
    backward = len(singular) * a.dimension * EPSILON * largest
    sums = a.dimension * EPSILON * (trace_a + trace_b + mean_term)
    return FrechetDistance(value, mean_term, 2 * (off + backward) + sums, (root_a.rank, root_b.rank))


def root_of(moments: Moments | Gaussian) -> Tensor:
    """R [rows, F] with RᵀR = Σ, on the CPU."""
    return _Root.of(moments).factor


@dataclass(frozen=True)
class _Root:
    """R [rows, F] with RᵀR = Σ."""

    factor: Tensor
    error: float
    """Bound on the distance of R to an exact one, in the Frobenius norm."""
    rank: int
    """Eigenvalues that the rounding of Σ itself cannot make of zero."""

    @classmethod
    def of(cls, moments: Moments | Gaussian) -> "_Root":
        """Eigendecomposition, and a second one of the small part.

        With V the computed eigenvectors, VᵀΣV is the diagonal Λ but for errors of δ = F·ε·λ_max. (That V is
        orthogonal to rounding only changes Σ to (1 + O(ε))Σ(1 + O(ε)), and R by as little in proportion.) On the
        large eigenvalues the errors change R by δ√(Σ 1/λ) (Frobenius) at most, and so do those between large and
        small ones, which also change the small block by δ²/λ. The small block is computed without rounding and
        decomposed for itself, with an error of S·ε of *its* largest entry; an error E of a block changes its root
        by √(Σ|eigenvalues of E|) at most (Powers and Størmer 1970).
        """
        covariance_FF = torch.from_numpy((moments.covariance_FF + moments.covariance_FF.T) / 2)
        with one_thread():
            found = torch.linalg.eigh(covariance_FF)
        value_F, vector_FF = found.eigenvalues.flip(0), found.eigenvectors.flip(1)
        if moments.count is not None:  # of N images, N − 1 eigenvalues are not zero
            value_F, vector_FF = value_F[: moments.count - 1], vector_FF[:, : moments.count - 1]
        largest = float(value_F[0])
        if largest <= 0:
            return cls(vector_FF[:, :0].T, float(value_F.abs().sum()) ** 0.5, 0)
        is_large_F = value_F > SMALL * largest
        value_L, vector_FL = value_F[is_large_F], vector_FF[:, is_large_F]
        off = moments.dimension * EPSILON * largest
        rows, error = [value_L.sqrt()[:, None] * vector_FL.T], 2 * off * float((1 / value_L).sum().sqrt())
        rank = len(value_L)
        small_FS = vector_FF[:, ~is_large_F]
        if small_FS.shape[1]:
            block_SS = exact_product(small_FS.T, exact_product(covariance_FF, small_FS)).sum(0)
            with one_thread():
                again = torch.linalg.eigh((block_SS + block_SS.T) / 2)
                vector_FS = small_FS @ again.eigenvectors
            value_S = again.eigenvalues
            kept_S = value_S > 0
            rows.append(value_S[kept_S].sqrt()[:, None] * vector_FS[:, kept_S].T)
            size = float(value_S.abs().max())
            wrong = len(value_S) * (moments.dimension * EPSILON * (size + SMALL * EPSILON * largest))
            wrong += len(value_S) * off**2 / float(value_L[-1])
            negative = float(value_S[~kept_S].abs().sum())  # no covariance has them: they are its own rounding
            error += (wrong + negative) ** 0.5
            rank += int((value_S > off).sum())
        return cls(torch.cat(rows), error, rank)


def exact_product(a_NK: Tensor, b_KM: Tensor) -> Tensor:
    """a·b as a sum of matrices `[terms, N, M]`, the largest first, with almost no rounding.

    `b` may itself be such a sum. Factors are cut into slices of so few bits that products of slices, and sums of
    K of them, are exact in float64 (Ozaki et al. 2012), in any order and any number of threads. Products of slices
    that are below the `_SLICES`-th are left out.
    """
    bits = (_MANTISSA - (a_NK.shape[1] - 1).bit_length() - 1) // 2
    a_slices = _slices(a_NK[None], bits, 1)
    b_slices = _slices(b_KM if b_KM.ndim == 3 else b_KM[None], bits, 0)
    terms = [a_NK.new_zeros(len(a_NK), b_KM.shape[-1])]
    terms += [a @ b for order, a in enumerate(a_slices) for b in b_slices[: _SLICES - order]]
    return _gathered(terms)


def _slices(parts: Tensor, bits: int, dim: int) -> list[Tensor]:
    """Summands of the sum of `parts`, each an integer of `bits` bits times a power of two of its row (`dim` 1) or
    column (`dim` 0)."""
    rest = list(parts)
    found: list[Tensor] = []
    unit = _power_above(sum(part.abs() for part in rest[1:]) + rest[0].abs(), dim)
    while len(found) < _SLICES and any(bool(part.any()) for part in rest):
        unit = unit * 2.0**-bits
        total = torch.zeros_like(rest[0])
        for number, part in enumerate(rest):
            piece = torch.round(part / unit) * unit
            rest[number] = part - piece
            total = total + piece
        found.append(total)
    return found


def _power_above(magnitude: Tensor, dim: int) -> Tensor:
    """The power of two above twice the largest entry of each row or column; 1 where all are zero."""
    largest = magnitude.amax(dim, keepdim=True)
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), exponent + 1)


def _gathered(terms: list[Tensor]) -> Tensor:
    """Two matrices, of which the second has what rounding leaves out of the first (Knuth's two-sum)."""
    high, low = terms[0], torch.zeros_like(terms[0])
    for term in terms[1:]:
        total = high + term
        back = total - high
        low = low + ((high - (total - back)) + (term - back))
        high = total
    return torch.stack((high, low))
