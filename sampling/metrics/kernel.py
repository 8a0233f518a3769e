"""The kernel distance KID (Bińkowski et al. 2018): the squared maximum mean discrepancy of two sets of features.

Shapes: N, M images; F features; S images of a subset; G groups.
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
    without_G: NDArray[np.float64] | None = None
    """The value with each group of the first set left out."""


def kernel_distance(
    a_NF: NDArray[np.floating],
    b_MF: NDArray[np.floating],
    device: torch.device = CPU,
    *,
    subsets: int = SUBSETS,
    images: int = SUBSET_IMAGES,
    group_N: NDArray[np.int64] | None = None,
) -> KernelDistance:
    """The mean of `unbiased_mmd2` over random subsets of both sets, drawn without replacement by SEED.

    Args:
        images: of a subset; half of the smaller set, where that is less, so that subsets differ. Sets have at
            least 2 images.
        group_N: the group of each image of the first set; None: nothing is left out.
    """
    smaller = min(len(a_NF), len(b_MF))
    if smaller < 2:
        raise ValueError(f"{len(a_NF)} and {len(b_MF)} images; at least 2 each")
    images = min(images, max(2, smaller // 2))

    groups = 0 if group_N is None else int(group_N.max()) + 1

    def of_subset(number: int) -> tuple[float, NDArray[np.float64]]:
        random = generator(SEED, "evaluate/kid", number)
        rows = [random.choice(len(each), images, replace=False) for each in (a_NF, b_MF)]
        x_SF, y_SF = (
            torch.from_numpy(each[row_S]).to(device, torch.float64)
            for each, row_S in zip((a_NF, b_MF), rows, strict=True)
        )
        kernels = _kernel(x_SF, x_SF), _kernel(y_SF, y_SF), _kernel(x_SF, y_SF)
        none = np.empty(0)
        return _mmd2(*kernels), none if group_N is None else _without(*kernels, group_N[rows[0]], groups)

    found = map_in_threads(of_subset, range(subsets), device)
    values = np.array([value for value, _ in found])
    without_G = None if group_N is None else np.mean([each for _, each in found], axis=0)
    return KernelDistance(float(values.mean()), float(values.std()), subsets, images, without_G)


def unbiased_mmd2(x_NF: Tensor, y_MF: Tensor) -> float:
    """The unbiased estimate of MMD² (Gretton et al. 2012, eq. 3) with the kernel (x·y / F + 1)³; float64."""
    return _mmd2(_kernel(x_NF, x_NF), _kernel(y_MF, y_MF), _kernel(x_NF, y_MF))


def _mmd2(xx: Tensor, yy: Tensor, xy: Tensor) -> float:
    n, m = xy.shape
    within_x = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1))
    within_y = (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * xy.mean())


def _without(xx: Tensor, yy: Tensor, xy: Tensor, group_S: NDArray[np.int64], groups: int) -> NDArray[np.float64]:
    """`_mmd2` with each group of x left out, from sums over groups; all, where it would leave less than two."""
    n, m = xy.shape
    of_group_SG = torch.nn.functional.one_hot(torch.from_numpy(group_S).to(xx.device), groups).double()
    apart = xx - torch.diag(xx.diagonal())
    rows_G, block_GG = of_group_SG.T @ apart.sum(1), of_group_SG.T @ apart @ of_group_SG
    left_G = n - of_group_SG.sum(0)
    within_G = (apart.sum() - 2 * rows_G + block_GG.diagonal()) / (left_G * (left_G - 1))
    across_G = (xy.sum() - of_group_SG.T @ xy.sum(1)) / (left_G * m)
    within_y = (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    found_G = (within_G + within_y - 2 * across_G).cpu().numpy()
    return np.where(left_G.cpu().numpy() >= 2, found_G, _mmd2(xx, yy, xy))


def _kernel(x_NF: Tensor, y_MF: Tensor) -> Tensor:
    base_NM = (x_NF @ y_MF.T).div_(x_NF.shape[1]).add_(1)
    return base_NM * base_NM * base_NM
