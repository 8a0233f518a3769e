"""What the set of the balance loss changes: the routers' gradient, with the means over 1 image, 8, 32 or all.

    python benchmarks/balance_sets.py

A small network is trained on scikit-learn's digits for a few hundred steps with the default set. Then the balance
loss of one batch is taken over each set, and its gradient on the routers' weights compared with the exact one over
the whole batch: norm relative to it, and cosine. The default takes the experts' shares of the batch before.
"""

from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor

from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT, balance_losses
from ditmoe.model.initialise import initialise
from ditmoe.model.objective import Draws, Objective, make_objective

BATCH = 64
"""Images of a step of training."""
MEASURED = 1024
"""Images of the batch that the gradients are measured on."""
STEPS = (50, 500, 1500)
GROUPS = (1, 8, 32, MEASURED)


@cache
def _digits() -> tuple[NDArray[Any], NDArray[Any]]:
    images, labels = load_digits(return_X_y=True)
    return images, labels


def batch_of(number: int, size: int, objective: Objective) -> tuple[Tensor, Tensor, Draws]:
    """Images, labels and draws of a batch."""
    images, labels = _digits()
    positions = list(range(number * size, (number + 1) * size))
    chosen = [position % len(images) for position in positions]
    x_BCHW = torch.tensor(images[chosen], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    draws = objective.draw(0, positions, (1, 8, 8), label_dropout=0.1)
    label_B = torch.where(draws.drop_B, 10, torch.tensor(labels[chosen]))
    return x_BCHW, label_B, draws


def keep_shares(network: DiT) -> None:
    """Keep what the experts got in the batch that has just been through."""
    for balance in balance_losses(network):
        _, load_N = balance.recorded()
        balance.batch_share_N = load_N / load_N.sum()


def router_gradients(network: DiT, number: int, objective: Objective, group: int) -> Tensor:
    """Gradient of the balance loss of a batch alone, of all routers' weights together."""
    for balance in balance_losses(network):
        balance.group = group
    network.zero_grad()
    loss_B = objective.loss(network, *batch_of(number, MEASURED, objective))
    (0 * loss_B.mean()).backward()
    routers = [weight for name, weight in network.named_parameters() if name.endswith("moe.gate.weight")]
    return torch.cat([weight.grad.flatten() for weight in routers if weight.grad is not None])


def train(network: DiT, first: int, last: int, objective: Objective) -> None:
    """Train over the global batch."""
    adam = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0)
    for balance in balance_losses(network):
        balance.group = 0
    for step in range(first, last):
        adam.zero_grad()
        objective.loss(network, *batch_of(step, BATCH, objective)).mean().backward()
        adam.step()
        keep_shares(network)


def main() -> None:
    """Print a table."""
    torch.manual_seed(0)
    config = ModelConfig(
        depth=3,
        hidden=32,
        heads=4,
        patch=2,
        experts=8,
        experts_per_token=2,
        image_size=8,
        channels=1,
        num_classes=10,
    )
    network, objective = DiT(config), make_objective(ObjectiveConfig(kind="rectified_flow"))
    initialise(network, seed=0)
    done = 0
    for steps in STEPS:
        train(network, done, steps, objective)
        done = steps
        router_gradients(network, 0, objective, MEASURED)
        keep_shares(network)
        exact = router_gradients(network, 1, objective, MEASURED)
        print(f"after {steps} steps: means over | norm | cosine")
        for group in (*GROUPS, 0):
            found = router_gradients(network, 1, objective, group)
            cosine = torch.cosine_similarity(found, exact, dim=0)
            name = {0: "the batch, shares of the one before", MEASURED: "the batch"}.get(group, f"{group} images")
            print(f"  {name:<40} {float(found.norm() / exact.norm()):.2f}  {float(cosine):.3f}", flush=True)


if __name__ == "__main__":
    main()
