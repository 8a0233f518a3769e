"""DeepSpeed's expert-parallel layer with routing that is given instead of computed.

AutoEP's layer asks its router how many tokens go where and waits for the numbers, which fake tensors cannot
answer. This one has the same parameters, makes the same tensors in the same order and sends the same collectives
(`deepspeed/module_inject/auto_ep_layer.py`, the path of a GPU), with numbers that it is told.
tests/parallel/planner/test_planner_proof.py compares the two on real processes.

A assignments (a token and one of its experts), T tokens, K experts per token, N experts, D hidden.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ditmoe.model.experts.moe import MoE

_ALIGNMENT: Final = 8
"""Rows of an expert are padded to a multiple of this (DeepSpeed's TOKEN_GROUP_ALIGN_SIZE_M)."""
_FUSED: Final = "ditmoe_swiglu"
"""Our name for the fused activation in DeepSpeed's registry."""


@dataclass(frozen=True)
class Routing:
    """Assignments that a rank sends and receives in one pass of one layer."""

    send: tuple[int, ...]
    """To each expert rank."""
    receive: tuple[int, ...]
    """From each expert rank."""


def even_routing(assignments: int, ranks: int, rank: int, imbalance: float = 1.0) -> Routing:
    """The routing of an expert rank where all ranks send alike.

    Args:
        assignments: of a rank's micro-batch, T·K.
        ranks: expert ranks.
        rank: the one that is asked for.
        imbalance: expert rank 0 gets this many times the mean, from 1 to `ranks`; the others share the rest alike.
    """
    assert 1 <= imbalance <= ranks and 0 <= rank < ranks
    fullest = round(imbalance * assignments / ranks)
    rest, others = assignments - fullest, ranks - 1
    send = (fullest, *(rest // others + (number < rest % others) for number in range(others)))
    return Routing(send, (send[rank],) * ranks)


class PlannedExpertLayer(nn.Module):
    """One block's mixture as one rank of AutoEP runs it."""

    tokens_per_expert: Tensor

    def __init__(self, source: MoE, ranks: int, planned: Routing, group: Any, fused: bool = True) -> None:
        """Take the place of a block's `MoE`.

        Args:
            source: holds all experts, of which this rank keeps its share.
            ranks: expert ranks.
            group: their process group.
            fused: SwiGLU is the Triton kernel that GPUs have, which keeps two tensors for the backward pass
                instead of three.
        """
        from deepspeed.moe.ep_experts import EXPERT_ACTIVATIONS, GroupedExperts, register_expert_activation
        from deepspeed.moe.ep_router import TokenChoiceTopKRouter

        super().__init__()
        if _FUSED not in EXPERT_ACTIVATIONS:
            register_expert_activation(_FUSED, _fused_swiglu)
        experts, hidden = source.gate.weight.shape
        self.top_k = source.experts_per_token
        self.held = experts // ranks
        self.planned = planned
        self.group = group
        self.balance = source.balance
        # What is off: limited groups of experts, normalised scores, a bias.
        self.router = TokenChoiceTopKRouter(hidden, experts, None, None, self.top_k, "softmax", False, 1.0, False)
        self.router.gate.register_forward_hook(self._keep_logits)
        self._logits_TN: Tensor | None = None
        self.experts = GroupedExperts(
            hidden, source.experts.gate_proj.shape[1], self.held, activation=_FUSED if fused else "swiglu"
        )
        self.shared_experts = source.shared_experts
        self.register_buffer("tokens_per_expert", torch.zeros(experts, dtype=torch.float32), persistent=False)

    def _keep_logits(self, _module: nn.Module, _inputs: Any, logits_TN: Tensor) -> None:
        self._logits_TN = logits_TN

    def forward(self, x_BTD: Tensor) -> Tensor:
        """`[B, T, D]` → `[B, T, D]`."""
        from deepspeed.module_inject.auto_ep_layer import combine_from_routed

        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        scores_TK, selected_TK, counts_N = self.router(x_TD)
        logits_TN, self._logits_TN = self._logits_TN, None
        assert logits_TN is not None
        scores_TK = self.balance(scores_TK, logits_TN.float().softmax(1), selected_TK)
        with torch.no_grad():
            self.tokens_per_expert += counts_N
        order_A = torch.argsort(selected_TK.view(-1), stable=True)
        routed_AD = x_TD[order_A // self.top_k]
        self._exchange_counts(counts_N)

        send, receive = self.planned.send, self.planned.receive
        routed_AD = _exchange(routed_AD, send, receive, self.group)
        rows = sum(receive)
        padded = -(-(rows + self.held * _ALIGNMENT) // _ALIGNMENT) * _ALIGNMENT
        place_P = torch.zeros(padded, dtype=torch.int32, device=x_TD.device)
        inverse_A = torch.zeros(rows + padded, dtype=torch.int64, device=x_TD.device)[:rows]
        counts_E = torch.zeros(self.held, dtype=torch.int32, device=x_TD.device)
        sorted_PD = _Permute.apply(routed_AD, place_P, inverse_A)  # type: ignore[no-untyped-call]
        result_PD = self.experts(sorted_PD, counts_E)
        result_AD = _Permute.apply(result_PD, inverse_A, place_P)  # type: ignore[no-untyped-call]
        result_AD = _exchange(result_AD, receive, send, self.group)

        out_BTD: Tensor = combine_from_routed(
            result_AD, scores_TK, order_A, self.top_k, "post", "weighted_sum", tuple(x_BTD.shape)
        )
        return out_BTD if self.shared_experts is None else out_BTD + self.shared_experts(x_BTD)

    def _exchange_counts(self, counts_N: Tensor) -> None:
        """Tell each rank how many assignments of each of its experts come from here."""
        dist.all_to_all_single(torch.empty_like(counts_N), counts_N, group=self.group)


def _exchange(rows: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: Any) -> Tensor:
    """Rows to the expert ranks and from them."""
    out: Tensor = _Exchange.apply(rows, send, receive, group)  # type: ignore[no-untyped-call]
    return out


class _Exchange(torch.autograd.Function):
    """An all-to-all whose gradient is the all-to-all in the other direction."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: Any) -> Tensor:
        ctx.routing = send, receive, group
        out = rows.new_empty((sum(receive), rows.shape[1]))
        dist.all_to_all_single(out, rows.contiguous(), list(receive), list(send), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, group = ctx.routing
        out = gradients[0].new_empty((sum(send), gradients[0].shape[1]))
        dist.all_to_all_single(out, gradients[0].contiguous(), list(send), list(receive), group=group)
        return out, None, None, None


class _Permute(torch.autograd.Function):
    """A gather of rows whose gradient is the gather in the other direction."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return rows.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        _, back = ctx.saved_tensors
        return gradients[0].index_select(0, back), None, None


class _FusedSwiglu(torch.autograd.Function):
    """SiLU(gate)·up that keeps its two inputs, as DeepSpeed's Triton kernel does."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        # The kernel makes these two tensors and nothing else; the arithmetic is left to it.
        gate, up = ctx.saved_tensors
        return torch.empty_like(gate), torch.empty_like(up)


def _fused_swiglu(gate: Tensor, up: Tensor, _alpha: float, _limit: float) -> Tensor:
    out: Tensor = _FusedSwiglu.apply(gate, up)  # type: ignore[no-untyped-call]
    return out
