"""What the ranks see in one optimiser step, summed on each and then over all of them in a single all-reduce.

The sums stay on the device. They say there whether the step counts, and the host reads them when it needs them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ditmoe.model.experts.balance import BalanceLoss
from ditmoe.parallel.copies import HostCopy


@dataclass(frozen=True)
class TotalsOverRanks:
    """The sums over all ranks and micro-steps of a step."""

    loss: float
    """Mean of the objective over the global batch, without the balance loss."""
    balance_loss: float
    """The layers' balance losses, α included, each summed over the micro-batches; then over the layers."""
    load_LN: Tensor
    """Share of layer l's assignments that expert n got, float64 `[L, N]`; rows sum to 1."""
    grad_norm: float
    """Norm of the global gradient, if its square was given."""
    requests: int
    """Ranks that asked to stop."""


class DeviceTotals:
    """The same before the host has read it."""

    _FIGURES = 4
    """Loss, samples, requests and the square of the norm come before what there is of each layer."""

    def __init__(self, sums: Tensor, layers: int, experts: int) -> None:
        self._sums, self._layers, self._experts = sums, layers, experts
        self._copy: HostCopy | None = None

    @cached_property
    def norm(self) -> Tensor:
        """Norm of the global gradient, float64 of no dims."""
        return self._sums[3].sqrt()

    def not_finite(self) -> Tensor:
        """1 where the loss or the gradient's norm is NaN or infinite, otherwise 0; float32 of no dims."""
        return (torch.isfinite(self._sums[0]) & torch.isfinite(self._sums[3])).logical_not().float()

    def load_LN(self) -> Tensor:
        """As `TotalsOverRanks.load_LN`."""
        return _load_LN(self._sums, self._layers, self._experts)

    def start_reading(self) -> None:
        """Begin to bring the sums to the host."""
        self._copy = HostCopy(self._sums)

    def read(self) -> TotalsOverRanks:
        """Wait for the sums."""
        sums = (self._copy or HostCopy(self._sums)).read()
        loss, samples, requests, square = sums[: self._FIGURES].tolist()
        return TotalsOverRanks(
            loss=loss / samples,
            balance_loss=float(sums[self._FIGURES : self._FIGURES + self._layers].sum()),
            load_LN=_load_LN(sums, self._layers, self._experts),
            grad_norm=square**0.5,
            requests=int(requests),
        )


def _load_LN(sums: Tensor, layers: int, experts: int) -> Tensor:
    load_LN = sums[DeviceTotals._FIGURES + layers :].view(layers, experts)
    return load_LN / load_LN.sum(1, keepdim=True)


class StepTotals:
    """One rank's sums, float64 on its device: nothing is waited for."""

    def __init__(self, depth: int, experts: int, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._samples = 0
        self._balance_L = torch.zeros(depth, dtype=torch.float64, device=device)
        self._load_LN = torch.zeros(depth, experts, dtype=torch.float64, device=device)

    def add_loss(self, loss_B: Tensor) -> None:
        """Count the samples of a micro-batch."""
        self._loss += loss_B.detach().double().sum()
        self._samples += len(loss_B)

    def add_routing(self, layers: Iterable[tuple[int, BalanceLoss]]) -> None:
        """Count what a micro-batch's forward pass has left with these layers, given with their numbers."""
        for number, balance in layers:
            loss, load_N = balance.recorded()
            self._balance_L[number] += loss
            self._load_LN[number] += load_N

    def over_ranks(self, stop_requested: bool, square: Tensor | None = None) -> DeviceTotals:
        """Sum over all ranks; a collective call.

        Args:
            square: this rank's part of the square of the gradient's norm, float64 of no dims.
        """
        loss = self._loss.view(1)
        # Filled on the device: a tensor made from Python numbers would be copied there, and the copy waited for.
        counts = [torch.full_like(loss, self._samples), torch.full_like(loss, float(stop_requested))]
        squares = torch.zeros_like(loss) if square is None else square.view(1)
        sums = torch.cat((loss, *counts, squares, self._balance_L, self._load_LN.flatten()))
        dist.all_reduce(sums)
        return DeviceTotals(sums, *self._load_LN.shape)
