"""Experts in turn on a CPU, each result and each gradient written where it belongs.

Autograd would join the experts' results, and stack the gradients of each expert's weights into that of all: copies
as large as the weights, in every layer and step. Here matrix products write into the whole. An expert's rows stay
in cache from one product to the next.

oneDNN, which computes products of 16-bit numbers, makes a kernel for each shape, in milliseconds, and keeps it. An
expert's rows differ in number each time. So they are filled up with zeros to one of few numbers.

A rows sorted by expert, P those with what fills them up, N experts, D hidden, F expert width.
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
    rows_N = _rows_of_products(x_AD, counts_N)
    out_PD = _without_gradients(_filled_up(x_AD, counts_N, rows_N), rows_N, gate_NFD, up_NFD, down_NDF)
    return _taken_out(out_PD, counts_N, rows_N)


def rounded_up(count: int) -> int:
    """To 16 rows, and from 128 on to a number of three or four significant bits: by an eighth at most."""
    step = max(16, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _rows_of_products(x_AD: Tensor, counts_N: Sequence[int]) -> Sequence[int]:
    if x_AD.dtype not in (torch.bfloat16, torch.float16):
        return counts_N
    return [rounded_up(count) for count in counts_N]


def _filled_up(x_AD: Tensor, counts_N: Sequence[int], rows_N: Sequence[int]) -> Tensor:
    """Each expert's rows, and zeros behind them, `[P, D]`."""
    if rows_N == counts_N:
        return x_AD
    x_PD = x_AD.new_empty(sum(rows_N), x_AD.shape[1])
    begin = 0
    for run_RD, count, rows in zip(torch.split(x_AD, list(counts_N)), counts_N, rows_N, strict=True):
        x_PD[begin : begin + count] = run_RD
        x_PD[begin + count : begin + rows] = 0
        begin += rows
    return x_PD


def _taken_out(x_PD: Tensor, counts_N: Sequence[int], rows_N: Sequence[int]) -> Tensor:
    """What `_filled_up` was given, `[A, D]`."""
    if rows_N == counts_N:
        return x_PD
    runs = torch.split(x_PD, list(rows_N))
    return torch.cat([run_RD[:count] for run_RD, count in zip(runs, counts_N, strict=True)])


def _runs(counts_N: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and these."""
    first = 0
    for expert, count in enumerate(counts_N):
        if count:
            yield expert, slice(first, first + count)
        first += count


def _without_gradients(
    x_PD: Tensor, rows_N: Sequence[int], gate_NFD: Tensor, up_NFD: Tensor, down_NDF: Tensor
) -> Tensor:
    """Each expert's hidden numbers take the place of the last one's."""
    out_PD = torch.empty_like(x_PD)
    gate_PF, up_PF = (x_PD.new_empty(max(rows_N), gate_NFD.shape[1]) for _ in range(2))
    for expert, run in _runs(rows_N):
        gate, up = (memory_PF[: run.stop - run.start] for memory_PF in (gate_PF, up_PF))
        torch.mm(x_PD[run], gate_NFD[expert].t(), out=gate)
        torch.mm(x_PD[run], up_NFD[expert].t(), out=up)
        torch.mm(F.silu(gate).mul_(up), down_NDF[expert].t(), out=out_PD[run])
    return out_PD


class _InTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_AD: Tensor, counts_N: Sequence[int], gate_NFD: Tensor, up_NFD: Tensor, down_NDF: Tensor
    ) -> Tensor:
        kept: list[Tensor] = []
        rows_N = _rows_of_products(x_AD, counts_N)
        x_PD = _filled_up(x_AD, counts_N, rows_N)
        out_PD = torch.empty_like(x_PD)
        for expert, run in _runs(rows_N):
            gate, up = (x_PD[run] @ weight[expert].t() for weight in (gate_NFD, up_NFD))
            hidden = F.silu(gate).mul_(up)
            torch.mm(hidden, down_NDF[expert].t(), out=out_PD[run])
            kept += gate, up
        ctx.counts_N, ctx.rows_N = counts_N, rows_N
        ctx.save_for_backward(x_PD, gate_NFD, up_NFD, down_NDF, *kept)
        return _taken_out(out_PD, counts_N, rows_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_AD: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, gate_NFD, up_NFD, down_NDF, *kept = ctx.saved_tensors
        needs_x, _, *needs_weights = ctx.needs_input_grad
        to_x = torch.empty_like(x_PD) if needs_x else None
        weights = (gate_NFD, up_NFD, down_NDF)
        to_gate, to_up, to_down = (
            torch.empty_like(weight) if needed else None
            for weight, needed in zip(weights, needs_weights, strict=True)
        )
        gradient_PD = _filled_up(gradient_AD.contiguous(), ctx.counts_N, ctx.rows_N)
        for (expert, run), gate, up in zip(_runs(ctx.rows_N), kept[::2], kept[1::2], strict=True):
            x, gradient = x_PD[run], gradient_PD[run]
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
        if to_x is not None:
            to_x = _taken_out(to_x, ctx.counts_N, ctx.rows_N)
        return to_x, None, to_gate, to_up, to_down
