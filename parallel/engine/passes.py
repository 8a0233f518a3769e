"""The forward and backward passes of one optimiser step, and its end, where one rank holds the whole network.

`pipeline.py` has their counterpart for pipeline stages.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ditmoe.model.dit import DiT, balance_losses
from ditmoe.model.experts.balance import BalanceLoss
from ditmoe.model.objective import Draws, Objective
from ditmoe.parallel.engine.step_totals import StepTotals


@dataclass(frozen=True)
class MicroBatch:
    """One data rank's samples of one micro-step, on the training device."""

    x_BCHW: Tensor
    """float32, −1…1."""
    label_B: Tensor
    """Classes, dropped ones already null."""
    draws: Draws


class Passes(ABC):
    """Drives a DeepSpeed engine through a step, in two halves: what is seen between them decides if it counts."""

    def __init__(self, network: DiT, objective: Objective) -> None:
        self.network = network
        self.objective = objective
        self.layers: dict[int, BalanceLoss] = {
            int(number): balance for number, balance in zip(network.blocks, balance_losses(network), strict=False)
        }
        """The balance loss of each layer here, by the number of its block; empty for a dense network."""
        self.module: nn.Module = network
        """What DeepSpeed is given to train."""
        self.engine: Any = None
        """The engine that it has made of it."""

    @abstractmethod
    def forward_backward(self, micro_batches: Sequence[MicroBatch], totals: StepTotals) -> None:
        """Run all micro-batches, count what they show, and average the gradients over the data ranks.

        The weights are not touched.
        """

    @abstractmethod
    def step(self) -> None:
        """Step the optimiser."""

    @abstractmethod
    def sampling_network(self) -> nn.Module:
        """The whole network, for a collective call of all ranks that hold a part of it."""


class WholeNetworkPasses(Passes):
    """All blocks on every rank (of the experts, its share)."""

    def forward_backward(self, micro_batches: Sequence[MicroBatch], totals: StepTotals) -> None:
        """One micro-batch after the other; DeepSpeed averages the gradients in the last backward pass."""
        self.engine.train()
        for index, batch in enumerate(micro_batches):
            loss_B = self.objective.loss(self.engine, batch.x_BCHW, batch.label_B, batch.draws)
            totals.add_loss(loss_B)
            totals.add_routing(self.layers.items())
            self.engine.backward(loss_B.mean())
            if index < len(micro_batches) - 1:
                self.engine.step()  # counts the micro-step; the weights change at the last one only

    def step(self) -> None:
        """The weights change here."""
        self.engine.step()

    def sampling_network(self) -> nn.Module:
        """The network itself."""
        return self.network
