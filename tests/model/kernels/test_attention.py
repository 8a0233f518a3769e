"""Attention in bfloat16 on a CPU, whose backward pass is written out, against autograd's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditmoe.model.kernels.attention import attend
from ditmoe.model.layers import _split_heads

SHAPE = (2, 4, 40, 16)


def gradients_of(run, inputs: list[Tensor], towards: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out = run(*inputs)
    out.backward(towards.to(out.dtype))
    return [out.detach(), *(tensor.grad for tensor in inputs)]  # type: ignore[list-item]


@pytest.mark.parametrize("sharpness", [1.0, 8.0])
def test_forward_and_gradients_are_those_of_fp32_as_closely_as_torchs_own(sharpness: float) -> None:
    torch.manual_seed(0)
    inputs, towards = [sharpness * torch.randn(SHAPE), *torch.randn(2, *SHAPE)], torch.randn(SHAPE)
    rounded = [tensor.bfloat16() for tensor in inputs]
    exact = gradients_of(
        F.scaled_dot_product_attention, [tensor.float() for tensor in rounded], towards.bfloat16()
    )
    torchs = gradients_of(F.scaled_dot_product_attention, rounded, towards)
    ours = gradients_of(attend, rounded, towards)
    assert torch.equal(ours[0], torchs[0])
    for name, expected, theirs, found in zip("oqkv", exact, torchs, ours, strict=True):
        error, of_torch = ((each.float() - expected).norm() / expected.norm() for each in (found, theirs))
        assert found.dtype == torch.bfloat16 and error < 0.01 + 1.5 * of_torch, name


def test_in_fp32_it_is_torchs() -> None:
    q, k, v = torch.randn(3, *SHAPE)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_heads_are_those_of_indices() -> None:
    """And so are their gradients."""
    gradients = []
    for split in (lambda x: _split_heads(x, 4), lambda x: x.view(2, 6, 3, 4, 5).permute(2, 0, 3, 1, 4)):
        torch.manual_seed(0)
        x = torch.randn(2, 6, 60, requires_grad=True)
        q, k, v = split(x)
        (q * 2 + k * v).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]
