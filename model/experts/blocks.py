"""Products of blocks of rows with each block's own matrix out of a stack, as batched products.

G blocks, B rows in each, N matrices, I in, O out.
"""

from typing import Any

import torch
from torch import Tensor


def block_product(x_GBI: Tensor, weight_NOI: Tensor, number_G: Tensor) -> Tensor:
    """`x_GBI[g] @ weight_NOI[number_G[g]].T` of every block, `[G, B, O]`."""
    out: Tensor = _BlockProduct.apply(x_GBI, weight_NOI, number_G)  # type: ignore[no-untyped-call]
    return out


class _BlockProduct(torch.autograd.Function):
    """Takes the matrices out of the stack again in the backward pass: they are larger than what they act on."""

    @staticmethod
    def forward(ctx: Any, x_GBI: Tensor, weight_NOI: Tensor, number_G: Tensor) -> Tensor:
        ctx.save_for_backward(x_GBI, weight_NOI, number_G)
        return torch.bmm(x_GBI, weight_NOI.index_select(0, number_G).transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient_GBO,) = gradients
        x_GBI, weight_NOI, number_G = ctx.saved_tensors
        gradient_x_GBI = torch.bmm(gradient_GBO, weight_NOI.index_select(0, number_G))
        of_block_GOI = torch.bmm(gradient_GBO.transpose(1, 2), x_GBI)
        # Summed by a product, in a fixed order; adding by index has none on GPUs.
        numbers_N1 = torch.arange(len(weight_NOI), device=number_G.device).unsqueeze(1)
        chosen_NG = (numbers_N1 == number_G).to(of_block_GOI.dtype)
        gradient_weight = (chosen_NG @ of_block_GOI.flatten(1)).view_as(weight_NOI)
        return gradient_x_GBI, gradient_weight, None
