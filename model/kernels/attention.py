"""Attention's scores and values, and on CPUs a backward pass in bfloat16 that multiplies matrices.

In a compiled region that pass is one operator: the compiler's own code for it is not the products that were tuned.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def attend(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v, `[B, H, T, d]`."""
    if q_BHTd.device.type == "cpu" and q_BHTd.dtype == torch.bfloat16 and torch.is_grad_enabled():
        if torch.compiler.is_compiling():
            out_BTHd: Tensor = attention_operator(q_BHTd, k_BHTd, v_BHTd)
            return out_BTHd.transpose(1, 2)
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
        return _gradients(gradient, *ctx.saved_tensors)


def _gradients(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    share_BHTT = torch.softmax((q * scale) @ k.transpose(-2, -1), dim=-1)
    gradient_v = share_BHTT.transpose(-2, -1) @ gradient
    of_share = gradient @ v.transpose(-2, -1)
    of_score = torch._softmax_backward_data(of_share, share_BHTT, -1, share_BHTT.dtype)
    return (of_score @ k).mul_(scale), (of_score.transpose(-2, -1) @ q).mul_(scale), gradient_v


@torch.library.custom_op("ditmoe::attention", mutates_args=())
def attention_operator(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor) -> Tensor:
    """Attention of bfloat16 on CPUs, `[B, T, H, d]`, contiguous: heads can be joined without a copy."""
    return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd).transpose(1, 2).contiguous()


@torch.library.custom_op("ditmoe::attention_gradients", mutates_args=())
def attention_gradients_operator(
    gradient_BTHd: Tensor, q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, `[B, H, T, d]` each, contiguous."""
    gradient_q, gradient_k, gradient_v = _gradients(gradient_BTHd.transpose(1, 2), q_BHTd, k_BHTd, v_BHTd)
    return gradient_q.contiguous(), gradient_k.contiguous(), gradient_v.contiguous()


@attention_operator.register_fake
def _(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor) -> Tensor:
    batch, heads, tokens, width = q_BHTd.shape
    return q_BHTd.new_empty(batch, tokens, heads, width)


@attention_gradients_operator.register_fake
def _(gradient_BTHd: Tensor, q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (tensor.new_empty(tensor.shape) for tensor in (q_BHTd, k_BHTd, v_BHTd))
    return first, second, third


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient_BTHd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = attention_gradients_operator(gradient_BTHd, *ctx.saved_tensors)
    return gradients


attention_operator.register_autograd(_backward, setup_context=_keep_inputs)
