"""The Inception Score, from sums over the splits of a set."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

SPLIT: Final = 5000
"""Images per split, as in the ADM protocol."""
_TINY: Final = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class SplitSums:
    """What the score needs of each of S splits, in P classes; those of parts of a set add up to the set's."""

    count_S: NDArray[np.int64]
    probability_SP: Float64
    """Σ p(y|x)."""
    negentropy_S: Float64
    """Σ p(y|x) log p(y|x)."""

    @classmethod
    def of(cls, probabilities_NP: NDArray[np.floating], split_N: NDArray[np.int64], splits: int) -> "SplitSums":
        """The sums of images that belong to some of the splits 0 … `splits` − 1."""
        p_NP = np.asarray(probabilities_NP, dtype=np.float64)
        probability_SP, negentropy_S = np.zeros((splits, p_NP.shape[1])), np.zeros(splits)
        np.add.at(probability_SP, split_N, p_NP)
        np.add.at(negentropy_S, split_N, (p_NP * np.log(np.maximum(p_NP, _TINY))).sum(axis=1))
        return cls(np.bincount(split_N, minlength=splits), probability_SP, negentropy_S)

    def merge(self, other: "SplitSums") -> "SplitSums":
        """The sums of both sets together."""
        return SplitSums(
            self.count_S + other.count_S,
            self.probability_SP + other.probability_SP,
            self.negentropy_S + other.negentropy_S,
        )

    @property
    def scores_S(self) -> Float64:
        """exp of the mean KL(p(y|x) ‖ p(y)) over each split that has images (Salimans et al. 2016)."""
        used = self.count_S > 0
        count_S, probability_SP = self.count_S[used], self.probability_SP[used]
        marginal_SP = probability_SP / count_S[:, None]
        cross_S = (probability_SP * np.log(np.maximum(marginal_SP, _TINY))).sum(axis=1)
        scores_S: Float64 = np.exp((self.negentropy_S[used] - cross_S) / count_S)
        return scores_S


def inception_score(probabilities_NP: NDArray[np.floating], split: int = SPLIT) -> tuple[float, float, int]:
    """Inception Score (Salimans et al. 2016) over splits of `split` images; the last may have fewer.

    Returns:
        Mean and standard deviation over the splits, and the number of splits.
    """
    count = len(probabilities_NP)
    scores_S = SplitSums.of(probabilities_NP, np.arange(count) // split, -(-count // split)).scores_S
    return float(scores_S.mean()), float(scores_S.std()), len(scores_S)
