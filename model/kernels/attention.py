"""Attention's scores and values, and on CPUs a backward pass in bfloat16 that multiplies matrices."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def attend(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v, `[B, H, T, d]`."""
    if q_BHTd.device.type == "cpu" and q_BHTd.dtype == torch.bfloat16 and torch.is_grad_enabled():
        out: Tensor = _AttentionOnCpu.apply(q_BHTd, k_BHTd, v_BHTd)  # type: ignore[no-untyped-call]
        return out
    return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd)


class _AttentionOnCpu(torch.autograd.Function):
    """torch's forward pass, of which nothing but its inputs is kept; its backward pass, slower than these
    products (docs/performance.md), is written out."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        share_BHTT = torch.softmax((q * scale) @ k.transpose(-2, -1), dim=-1)
        gradient_v = share_BHTT.transpose(-2, -1) @ gradient
        of_share = gradient @ v.transpose(-2, -1)
        of_score = torch._softmax_backward_data(of_share, share_BHTT, -1, share_BHTT.dtype)
        return (of_score @ k).mul_(scale), (of_score.transpose(-2, -1) @ q).mul_(scale), gradient_v
