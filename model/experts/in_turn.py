"""Experts in turn on a CPU, each result and each gradient written where it belongs.

Autograd would join the experts' results, and stack the gradients of each expert's weights into that of all: copies
as large as the weights, in every layer and step. Here matrix products write into the whole. An expert's rows stay
in cache from one product to the next.

A rows sorted by expert, N experts, D hidden, F expert width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def experts_in_turn(
    x_AD: Tensor, counts_N: Sequence[int], gate_NFD: Tensor, up_NFD: Tensor, down_NDF: Tensor
) -> Tensor:
    """down(SiLU(gate(x))·up(x)) of each expert on its `counts_N[i]` rows, `[A, D]`."""
    inputs = (x_AD, gate_NFD, up_NFD, down_NDF)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        result: Tensor = _InTurn.apply(x_AD, counts_N, gate_NFD, up_NFD, down_NDF)  # type: ignore[no-untyped-call]
        return result
    return _without_gradients(x_AD, counts_N, gate_NFD, up_NFD, down_NDF)


def _runs(counts_N: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and these."""
    first = 0
    for expert, count in enumerate(counts_N):
        if count:
            yield expert, slice(first, first + count)
        first += count


def _without_gradients(
    x_AD: Tensor, counts_N: Sequence[int], gate_NFD: Tensor, up_NFD: Tensor, down_NDF: Tensor
) -> Tensor:
    """Each expert's hidden numbers take the place of the last one's."""
    out_AD = torch.empty_like(x_AD)
    gate_AF, up_AF = (x_AD.new_empty(max(counts_N), gate_NFD.shape[1]) for _ in range(2))
    for expert, run in _runs(counts_N):
        gate, up = (memory_AF[: run.stop - run.start] for memory_AF in (gate_AF, up_AF))
        torch.mm(x_AD[run], gate_NFD[expert].t(), out=gate)
        torch.mm(x_AD[run], up_NFD[expert].t(), out=up)
        torch.mm(F.silu(gate).mul_(up), down_NDF[expert].t(), out=out_AD[run])
    return out_AD


class _InTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_AD: Tensor, counts_N: Sequence[int], gate_NFD: Tensor, up_NFD: Tensor, down_NDF: Tensor
    ) -> Tensor:
        kept: list[Tensor] = []
        out_AD = torch.empty_like(x_AD)
        for expert, run in _runs(counts_N):
            gate, up = (x_AD[run] @ weight[expert].t() for weight in (gate_NFD, up_NFD))
            hidden = F.silu(gate).mul_(up)
            torch.mm(hidden, down_NDF[expert].t(), out=out_AD[run])
            kept += gate, up
        ctx.counts_N = counts_N
        ctx.save_for_backward(x_AD, gate_NFD, up_NFD, down_NDF, *kept)
        return out_AD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_AD: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, gate_NFD, up_NFD, down_NDF, *kept = ctx.saved_tensors
        needs_x, _, *needs_weights = ctx.needs_input_grad
        to_x = torch.empty_like(x_AD) if needs_x else None
        weights = (gate_NFD, up_NFD, down_NDF)
        to_gate, to_up, to_down = (
            torch.empty_like(weight) if needed else None
            for weight, needed in zip(weights, needs_weights, strict=True)
        )
        gradient_AD = gradient_AD.contiguous()
        for (expert, run), gate, up in zip(_runs(ctx.counts_N), kept[::2], kept[1::2], strict=True):
            x, gradient = x_AD[run], gradient_AD[run]
            activated = F.silu(gate)
            if to_down is not None:
                torch.mm(gradient.t(), activated * up, out=to_down[expert])
            hidden = gradient @ down_NDF[expert]
            gradient_gate = torch.ops.aten.silu_backward(hidden * up, gate)
            gradient_up = hidden.mul_(activated)
            if to_gate is not None:
                torch.mm(gradient_gate.t(), x, out=to_gate[expert])
            if to_up is not None:
                torch.mm(gradient_up.t(), x, out=to_up[expert])
            if to_x is not None:
                torch.mm(gradient_gate, gate_NFD[expert], out=to_x[run])
                to_x[run].addmm_(gradient_up, up_NFD[expert])
        for expert, count in enumerate(ctx.counts_N):
            if not count:
                for to_weight in (to_gate, to_up, to_down):
                    if to_weight is not None:
                        to_weight[expert].zero_()
        return to_x, None, to_gate, to_up, to_down
