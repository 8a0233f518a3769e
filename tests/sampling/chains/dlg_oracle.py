"""What a chain of Langevin–Gibbs steps on one-dimensional data settles at, from its transition matrix on a grid.

X grid points, N levels. Nothing is sampled, so that biases far below any sampling error show.
"""

import torch
from torch import Tensor

from tests.sampling.mixture import GaussianMixture, MixturePosterior


def stationary(
    mixture: GaussianMixture,
    level_N: Tensor,
    step_size: float,
    *,
    level_rule: str = "sample",
    proportional: bool = True,
    drift: float = 0.5,
    noise: float = 1.0,
    points: int = 800,
    reach: float = 4.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The joint distribution of x and σ after many steps x ← x + drift·η·s + √(noise·η)·z, σ | x.

    Returns:
        the grid `[X]`, the chain's joint distribution `[X, N]` and the true one, each summing to 1.
    """
    widest = float(level_N[-1].square() + mixture.deviations_K.max().square()) ** 0.5
    centre = mixture.means_KD[:, 0]
    grid_X = torch.linspace(
        float(centre.min()) - reach * widest, float(centre.max()) + reach * widest, points, dtype=torch.float64
    )
    narrowest = (noise * step_size * (float(level_N[0]) ** 2 if proportional else 1)) ** 0.5
    assert float(grid_X[1] - grid_X[0]) < 0.6 * narrowest, "the grid does not resolve the shortest step"
    x_X1, labels_X = grid_X[:, None], torch.zeros(points, dtype=torch.int64)
    choice_XN = MixturePosterior(mixture, level_N)(x_X1, labels_X).exp()
    if level_rule == "argmax":
        choice_XN = torch.nn.functional.one_hot(choice_XN.argmax(1), len(level_N)).double()
    true_XN = torch.stack([mixture.log_density(x_X1, level.expand(points)).exp() for level in level_N], dim=1)
    move_XX = torch.zeros(points, points, dtype=torch.float64)
    for level, chosen_X in zip(level_N, choice_XN.T, strict=True):
        eta = step_size * float(level) ** 2 if proportional else step_size
        mean_X = grid_X + drift * eta * mixture.score(x_X1, level.expand(points))[:, 0]
        kernel_XX = (-0.5 * (grid_X - mean_X[:, None]).square() / (noise * eta)).exp()
        move_XX += chosen_X[:, None] * kernel_XX / kernel_XX.sum(1, keepdim=True)
    # The left eigenvector of eigenvalue 1: solve (Mᵀ − 1)p = 0 with one equation replaced by Σp = 1.
    system_XX = move_XX.T - torch.eye(points, dtype=torch.float64)
    system_XX[-1] = 1
    right_X = torch.zeros(points, dtype=torch.float64)
    right_X[-1] = 1
    chain_X = torch.linalg.solve(system_XX, right_X).clamp(min=0)
    return grid_X, chain_X[:, None] * choice_XN, true_XN / true_XN.sum()


def distance(first: Tensor, second: Tensor) -> float:
    """Total variation between two distributions of one shape, 0 … 1."""
    return 0.5 * (first - second).abs().sum().item()
