"""What the ranks see in one optimiser step, summed on each and then over all of them in a single all-reduce."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ditmoe.model.experts.balance import BalanceLoss


@dataclass(frozen=True)
class TotalsOverRanks:
    """The sums over all ranks and micro-steps of a step."""

    loss: float
    """Mean of the objective over the global batch, without the balance loss."""
    balance_loss: float
    """The layers' balance losses, α included, each summed over the micro-batches; then over the layers."""
    load_LN: Tensor
    """Share of layer l's assignments that expert n got, float64 `[L, N]`; rows sum to 1."""
    requests: int
    """Ranks that asked to stop."""


class StepTotals:
    """One rank's sums, float64 on its device: nothing is waited for until the step's passes are done."""

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

    def over_ranks(self, stop_requested: bool) -> TotalsOverRanks:
        """Sum over all ranks; a collective call, and the one place where a step waits for the device."""
        counts = torch.tensor([self._samples, stop_requested], dtype=torch.float64, device=self._loss.device)
        sums = torch.cat((self._loss.view(1), counts, self._balance_L, self._load_LN.flatten()))
        dist.all_reduce(sums)
        sums, layers = sums.cpu(), len(self._balance_L)
        loss, samples, requests = sums[:3].tolist()
        load_LN = sums[3 + layers :].view(self._load_LN.shape)
        return TotalsOverRanks(
            loss=loss / samples,
            balance_loss=float(sums[3 : 3 + layers].sum()),
            load_LN=load_LN / load_LN.sum(1, keepdim=True),
            requests=int(requests),
        )
