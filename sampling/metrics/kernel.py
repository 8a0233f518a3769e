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
ROWS: Final = 128
"""Of a kernel that are in memory at a time."""
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
        return _distances(x_SF, y_SF, None if group_N is None else group_N[rows[0]], groups)

    found = map_in_threads(of_subset, range(subsets), device)
    values = np.array([value for value, _ in found])
    without_G = None if group_N is None else np.mean([each for _, each in found], axis=0)
    return KernelDistance(float(values.mean()), float(values.std()), subsets, images, without_G)


def unbiased_mmd2(x_NF: Tensor, y_MF: Tensor) -> float:
    """The unbiased estimate of MMD² (Gretton et al. 2012, eq. 3) with the kernel (x·y / F + 1)³; float64."""
    return _distances(x_NF, y_MF, None, 0)[0]


def _distances(
    x_NF: Tensor, y_MF: Tensor, group_N: NDArray[np.int64] | None, groups: int
) -> tuple[float, NDArray[np.float64]]:
    """The unbiased MMD², and that with each group of x left out: the same, where it would leave less than two."""
    n, m = len(x_NF), len(y_MF)
    one_M1 = y_MF.new_ones(m, 1)
    if group_N is None:
        of_group_NG = x_NF.new_ones(n, 1)
    else:
        of_group_NG = torch.nn.functional.one_hot(torch.from_numpy(group_N).to(x_NF.device), groups).to(x_NF)
    own_N, own_M = _kernel_of_same(x_NF), _kernel_of_same(y_MF)
    xx_NG, xy_N = _group_sums(x_NF, x_NF, of_group_NG), _group_sums(x_NF, y_MF, one_M1)[:, 0]
    rows_N = xx_NG.sum(1) - own_N
    within_y = (_group_sums(y_MF, y_MF, one_M1).sum() - own_M.sum()) / (m * (m - 1))
    value = float(rows_N.sum() / (n * (n - 1)) + within_y - 2 * xy_N.sum() / (n * m))
    if group_N is None:
        return value, np.empty(0)
    left_G = n - of_group_NG.sum(0)
    inside_G = (of_group_NG * xx_NG).sum(0) - of_group_NG.T @ own_N
    within_G = (rows_N.sum() - 2 * (of_group_NG.T @ rows_N) + inside_G) / (left_G * (left_G - 1))
    across_G = (xy_N.sum() - of_group_NG.T @ xy_N) / (left_G * m)
    found_G = (within_G + within_y - 2 * across_G).cpu().numpy()
    return value, np.where(left_G.cpu().numpy() >= 2, found_G, value)


def _group_sums(x_NF: Tensor, y_MF: Tensor, of_group_MG: Tensor) -> Tensor:
    """The kernel of each x with all y of a group, added up, `[N, G]`; a block of rows in memory at a time."""
    return torch.cat([_kernel(x_RF, y_MF) @ of_group_MG for x_RF in torch.split(x_NF, ROWS)])


def _kernel(x_NF: Tensor, y_MF: Tensor) -> Tensor:
    return (x_NF @ y_MF.T).div_(x_NF.shape[1]).add_(1).pow_(3)


def _kernel_of_same(x_NF: Tensor) -> Tensor:
    """Of each with itself, `[N]`."""
    return x_NF.square().sum(1).div_(x_NF.shape[1]).add_(1).pow_(3)
