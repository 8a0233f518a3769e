"""Ranks that share out one copy of the experts to sample: each holds its part, and tokens go to their experts.

Everything but the routed experts is on each rank, which draws images of its own. At each mixture layer the ranks
of a group send the tokens of their batches to the ranks that hold their experts, and get the results back, so that
all of them must come to each layer together. A rank that has nothing to draw, or is done before the others, comes
to the layers without tokens (`NetworkOfGroup.finish`): samplers may evaluate the network as often as they like.

Shapes: A assignments of a rank's tokens to experts, N experts, of which a rank holds H; E ranks; R rows that come
to a rank; D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ditmoe.model.dit import DiT
from ditmoe.model.experts import paths
from ditmoe.model.experts.dispatch import assign
from ditmoe.model.experts.moe import Experts, MoE
from ditmoe.parallel.layout import Layout


@dataclass(frozen=True)
class ExpertGroup:
    """The group that this process is in."""

    rank: int
    """Place of this process in the group."""
    size: int
    """Processes of the group, E."""
    number: int
    """Of this group among all."""
    count: int
    """Groups."""
    device: torch.device
    tokens: ProcessGroup
    """Moves tensors on the device."""
    words: ProcessGroup
    """Moves objects, by the CPU."""

    @classmethod
    def join(cls, size: int, device: torch.device, timeout: timedelta) -> "ExpertGroup":
        """Join the group of so many consecutive ranks; every rank of the run calls it, and `size` divides them.

        Args:
            timeout: how long a rank waits for the others of its group.
        """
        rank = dist.get_rank()
        grid = Layout(
            pipe=1, data=dist.get_world_size(), expert=size, tensor=1, zero=0, micro_batch=1, accumulation=1
        )
        joined: list[ProcessGroup] = []
        for first in range(0, grid.data, size):
            members = grid.expert_ranks(first)
            groups = [dist.new_group(members, timeout=timeout, backend=backend) for backend in (None, "gloo")]
            if rank in members:
                joined = groups
        tokens, words = joined
        return cls(grid.expert_rank(rank), size, rank // size, grid.expert_copies, device, tokens, words)

    @property
    def first(self) -> bool:
        """Whether this process leads the group."""
        return self.rank == 0

    def experts(self, total: int) -> range:
        """Numbers of the experts that this process holds, of so many in each block."""
        held = total // self.size
        return range(self.rank * held, (self.rank + 1) * held)

    def tell(self, value: Any) -> None:
        """Let the others hear something; the first of the group calls it."""
        assert self.first
        dist.broadcast_object_list([value], group=self.words, group_src=0)

    def hear(self) -> Any:
        """What the first of the group tells; waits for it."""
        assert not self.first
        told: list[Any] = [None]
        dist.broadcast_object_list(told, group=self.words, group_src=0)
        return told[0]

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, on each rank of the group, in their order."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.words)
        return gathered

    def any_draws(self, here: bool) -> Tensor:
        """Whether any rank of the group comes with tokens, int64 of no dims, > 0 where one does."""
        flag = torch.full((), int(here), dtype=torch.int64, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.tokens)
        return flag

    def exchange_counts(self, sent_EH: Tensor) -> Tensor:
        """Row r goes to rank r, and what rank r sends comes as row r; int64, of one shape everywhere."""
        received_EH = torch.empty_like(sent_EH)
        dist.all_to_all_single(received_EH, sent_EH.contiguous(), group=self.tokens)
        return received_EH

    def exchange_rows(self, rows: Tensor, sent_E: Sequence[int], received_E: Sequence[int]) -> Tensor:
        """The first `sent_E[0]` rows go to rank 0, and so on; what comes follows the ranks' order, bit for bit."""
        received = rows.new_empty(sum(received_E), rows.shape[1])
        dist.all_to_all_single(
            received.view(torch.uint8),  # not every backend knows every type
            rows.contiguous().view(torch.uint8),
            list(received_E),
            list(sent_E),
            group=self.tokens,
        )
        return received


class DealtExperts(nn.Module):
    """The routed experts of a layer, of which this rank holds some; stands in for all of them."""

    def __init__(self, group: ExpertGroup, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self._group = group
        self._experts = experts
        self.local = Experts(len(group.experts(experts)), hidden, width)

    def together(self, x_TD: Tensor, assignments: int) -> None:
        """As `Experts.together`: rows are laid out where they arrive."""

    def forward(self, x_AD: Tensor, counts_N: Tensor, block: int | None = None) -> Tensor:
        """As `Experts`: expert i is applied to its `counts_N[i]` rows, wherever it is. `[A, D]` → `[A, D]`."""
        assert block is None
        group = self._group
        sent_EH = counts_N.view(group.size, -1)
        # Beside its counts each rank says how many rows it has in all.
        rows_E1 = torch.full_like(sent_EH[:, :1], len(x_AD))
        told = group.exchange_counts(torch.cat((sent_EH, rows_E1), dim=1))
        received_EH = told[:, :-1]
        # The one thing in the layer that the host waits for: NCCL wants the sizes from it.
        sent_E, received_E, rows_E = torch.stack((sent_EH.sum(1), received_EH.sum(1), told[:, -1])).tolist()
        rows_RD = group.exchange_rows(x_AD, sent_E, received_E)
        result_RD = torch.empty_like(rows_RD)
        if len(rows_RD):
            # They come by rank, and of each rank by expert.
            held = torch.arange(received_EH.shape[1], device=x_AD.device).repeat(group.size)
            expert_R = held.repeat_interleave(received_EH.flatten(), output_size=len(rows_RD))
            path = paths.expert_path(rows_RD, self.local.width)
            together = paths.rows_together(path, max(rows_E), self._experts)
            assignments = assign(expert_R.unsqueeze(1), received_EH.shape[1], together)
            # In blocks as long as those of a process that has all experts, a token's result has the same bits.
            block = together or paths.block_rows(max(rows_E), self._experts)
            rows = rows_RD.index_select(0, assignments.token_A)
            result = self.local(rows, assignments.counts_N, block)
            result_RD = result.index_select(0, assignments.slot_TK[:, 0])
        return group.exchange_rows(result_RD, received_E, sent_E)


class NetworkOfGroup(nn.Module):
    """A network whose routed experts are dealt to the ranks of a group."""

    def __init__(self, network: DiT, group: ExpertGroup) -> None:
        """Take a network, on the meta device still, and give it this rank's experts alone."""
        super().__init__()
        self.network = network
        self.group = group
        config = network.config
        self._hidden = config.hidden
        self._layers = [module for module in network.modules() if isinstance(module, MoE)]
        for layer in self._layers:
            kept = layer.experts.gate_proj
            with kept.device:
                dealt = DealtExperts(group, config.experts, config.hidden, 4 * config.hidden).to(kept.dtype)
            layer.experts = dealt  # type: ignore[assignment]

    def forward(self, x_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """As `DiT`. The other ranks of the group evaluate it too, or `finish`."""
        self.group.any_draws(True)
        predicted: Tensor = self.network(x_BCHW, timestep_B, label_B)
        return predicted

    def hidden(self, x_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """As `DiT.hidden`. The other ranks of the group evaluate the network too, or `finish`."""
        self.group.any_draws(True)
        return self.network.hidden(x_BCHW, timestep_B, label_B)

    def predict_hidden(self, x_BTD: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """As `DiT.predict_hidden`, by this rank alone."""
        return self.network.predict_hidden(x_BTD, timestep_B, label_B)

    @torch.inference_mode()
    def finish(self) -> None:
        """Hold this rank's experts ready until every rank of the group has come here."""
        weight = next(self.network.parameters())
        none_AD = weight.new_empty(0, self._hidden)
        while self.group.any_draws(False).item():
            for layer in self._layers:
                counts_N = torch.zeros(layer.balance.experts, dtype=torch.int64, device=weight.device)
                layer.experts(none_AD, counts_N)
