"""Sending tokens to their experts and summing what comes back, by row copies alone in both directions.

T tokens, K experts per token, A rows sorted by expert, D hidden. Rows are the T·K assignments, and where experts'
rows must begin at multiples of a number, some more between them, whose results nobody takes. Each gather's
gradient is another gather through the inverse order, so that nothing is scattered: autograd's own index gradients
add row by row, which is slow on CPUs and in no fixed order on GPUs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignments:
    """Which rows go where."""

    token_A: Tensor
    """Token of each row; of a row between experts, any."""
    order_A: Tensor
    """Place of each row in the tokens' order (token·K + k); of a row between experts, T·K."""
    slot_TK: Tensor
    """Row of a token's k-th assignment."""
    counts_N: Tensor
    """Rows of each expert; they sum to A."""


def assign(selected_TK: Tensor, experts: int, together: int | None = None) -> Assignments:
    """Sort the T·K assignments by expert; those of one expert stay in the tokens' order.

    Args:
        together: each expert has a multiple of so many rows, and at least one. Then A follows from T·K alone, and
            the last expert has what is left.
    """
    expert_A, order_A = selected_TK.flatten().sort(stable=True)
    numbers_A = torch.arange(len(order_A), device=order_A.device)
    # Counted where each expert's run begins: torch.bincount makes the host wait for a GPU.
    begins = torch.searchsorted(expert_A, torch.arange(experts + 1, device=expert_A.device))
    counts_N = begins.diff()
    slot_A = torch.empty_like(order_A)
    if together is None:
        slot_A[order_A] = numbers_A
        token_A = order_A // selected_TK.shape[1]
        return Assignments(token_A, order_A, slot_A.view_as(selected_TK), counts_N)
    rows_N = (counts_N.clamp(min=1) + together - 1) // together * together
    rows = (len(order_A) // together + experts) * together
    row_A = numbers_A + (rows_N.cumsum(0) - rows_N - begins[:-1])[expert_A]
    slot_A[order_A] = row_A
    order = order_A.new_full((rows,), len(order_A))
    order[row_A] = order_A
    # The last expert's rows go on to the end, so that each row belongs to one.
    rows_N[-1] += rows - rows_N.sum()
    token = order.clamp(max=len(order_A) - 1) // selected_TK.shape[1]
    return Assignments(token, order, slot_A.view_as(selected_TK), rows_N)


def dispatch(x_TD: Tensor, assignments: Assignments) -> Tensor:
    """Each assignment's token, `[T, D]` → `[A, D]`."""
    rows: Tensor = _Dispatch.apply(x_TD, assignments)  # type: ignore[no-untyped-call]
    return rows


def combine(result_AD: Tensor, scores_TK: Tensor, assignments: Assignments) -> Tensor:
    """Each token's results weighted by its scores and summed, `[A, D]` → `[T, D]`."""
    total: Tensor = _Combine.apply(result_AD, scores_TK, assignments)  # type: ignore[no-untyped-call]
    return total


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, assignments: Assignments) -> Tensor:
        ctx.save_for_backward(assignments.slot_TK)
        return x_TD.index_select(0, assignments.token_A)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_AD,) = gradients
        (slot_TK,) = ctx.saved_tensors
        first, *others = slot_TK.unbind(1)
        gradient_TD = gradient_AD.index_select(0, first)
        for slot_T in others:
            gradient_TD += gradient_AD.index_select(0, slot_T)
        return gradient_TD, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result_AD: Tensor, scores_TK: Tensor, assignments: Assignments) -> Tensor:
        weight_TK = scores_TK.to(result_AD.dtype)
        ctx.save_for_backward(result_AD, weight_TK, assignments.token_A, assignments.order_A, assignments.slot_TK)
        ctx.scores_dtype = scores_TK.dtype
        first, *others = assignments.slot_TK.unbind(1)
        total_TD = result_AD.index_select(0, first).mul_(weight_TK[:, :1])
        for k, slot_T in enumerate(others, start=1):
            total_TD.addcmul_(result_AD.index_select(0, slot_T), weight_TK[:, k : k + 1])
        return total_TD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient_TD,) = gradients
        result_AD, weight_TK, token_A, order_A, slot_TK = ctx.saved_tensors
        gradient_AD = gradient_TD.index_select(0, token_A)
        gradient_scores_A = torch.linalg.vecdot(gradient_AD, result_AD)
        weights = weight_TK.flatten()
        if len(order_A) > len(weights):
            weights = torch.cat((weights, weights.new_zeros(1)))  # of the rows between experts
        gradient_AD.mul_(weights[order_A].unsqueeze(1))
        return gradient_AD, gradient_scores_A[slot_TK].to(ctx.scores_dtype), None
