"""The kernel distance KID (Bińkowski et al. 2018): the squared maximum mean discrepancy of two sets of features.

Shapes: N, M images; F features; S images of a subset.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditmoe.model.randomness import generator
from ditmoe.model.threads import map_in_threads

SUBSETS: Final = 100
SUBSET_IMAGES: Final = 1000
SEED: Final = 0
"""Of the choice of subsets."""
CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class KernelDistance:
    """KID as a mean over pairs of random subsets."""

    value: float
    deviation: float
    """Standard deviation over the subsets; the mean's error is smaller."""
    subsets: int
    images: int
    """Of each subset, of either set."""


def kernel_distance(
    a_NF: NDArray[np.floating],
    b_MF: NDArray[np.floating],
    device: torch.device = CPU,
    *,
    subsets: int = SUBSETS,
    images: int = SUBSET_IMAGES,
) -> KernelDistance:
    """The mean of `unbiased_mmd2` over random subsets of both sets, drawn without replacement by SEED.

    Args:
        images: of a subset; half of the smaller set, where that is less, so that subsets differ. Sets have at
            least 2 images.
    """
    smaller = min(len(a_NF), len(b_MF))
    if smaller < 2:
        raise ValueError(f"{len(a_NF)} and {len(b_MF)} images; at least 2 each")
    images = min(images, max(2, smaller // 2))

    def of_subset(number: int) -> float:
        random = generator(SEED, "evaluate/kid", number)
        chosen = [each[random.choice(len(each), images, replace=False)] for each in (a_NF, b_MF)]
        x_SF, y_SF = (torch.from_numpy(each).to(device, torch.float64) for each in chosen)
        return unbiased_mmd2(x_SF, y_SF)

    found = np.array(map_in_threads(of_subset, range(subsets), device))
    return KernelDistance(float(found.mean()), float(found.std()), subsets, images)


def unbiased_mmd2(x_NF: Tensor, y_MF: Tensor) -> float:
    """The unbiased estimate of MMD² (Gretton et al. 2012, eq. 3) with the kernel (x·y / F + 1)³; float64."""
    n, m = len(x_NF), len(y_MF)
    xx, yy, xy = _kernel(x_NF, x_NF), _kernel(y_MF, y_MF), _kernel(x_NF, y_MF)
    within_x = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1))
    within_y = (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * xy.mean())


def _kernel(x_NF: Tensor, y_MF: Tensor) -> Tensor:
    base_NM = (x_NF @ y_MF.T).div_(x_NF.shape[1]).add_(1)
    return base_NM * base_NM * base_NM
