"""Products of float32 by oneDNN, against torch's own."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditmoe.model.experts.moe import Experts
from ditmoe.model.kernels import products

needs_onednn = pytest.mark.skipif(not products.in_onednn(torch.empty(1)), reason="needs oneDNN on an x86 CPU")


def gradients_of(run, inputs: list[Tensor | None]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    inputs = [None if tensor is None else tensor.clone().requires_grad_() for tensor in inputs]
    out = run(*inputs)
    torch.manual_seed(1)
    # A transposed one: what a layer is given backwards need not be contiguous.
    towards = torch.randn(out.shape[::-1]).permute(*reversed(range(out.ndim)))
    out.backward(towards)
    return [out.detach(), *(tensor.grad for tensor in inputs if tensor is not None)]  # type: ignore[misc]


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 3, 5), (1, 1, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_and_its_gradients_are_torchs(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(11, 5), torch.randn(11) if bias else None]
    for ours, theirs in zip(gradients_of(products.linear, inputs), gradients_of(F.linear, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_that_nobody_asks_for_are_not_made() -> None:
    x, weight, bias = torch.randn(3, 5), torch.randn(11, 5, requires_grad=True), torch.randn(11)
    products.linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(11, 5))
    assert products.linear(x, weight.detach(), bias).grad_fn is None


def test_other_numbers_stay_torchs() -> None:
    x, weight = torch.randn(3, 5), torch.randn(11, 5)
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(products.linear(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
    assert products.linear(x.to("meta"), weight.to("meta")).shape == (3, 11)
    with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
        assert torch.equal(products.linear(x, weight), F.linear(x, weight))


@needs_onednn
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_among_any_number_of_rows(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        x, gate, up, down = torch.randn(130, 48), *torch.randn(2, 96, 48), torch.randn(48, 96)
        whole, whole_gated = products.product(x, gate), products.gated(x, gate, up, down)
        for rows, first in itertools.product((*range(1, 34), 64, 97), (0, 33)):
            some = slice(first, first + rows)
            assert torch.equal(products.product(x[some], gate), whole[some])
            assert torch.equal(products.gated(x[some], gate, up, down), whole_gated[some])
    finally:
        torch.set_num_threads(before)


@needs_onednn
@pytest.mark.parametrize("counts", [[6] * 4, [24, 0, 0, 0], [0, 1, 20, 3]])
def test_experts_at_inference_are_the_plain_ones_and_do_not_use_onednn(counts: list[int]) -> None:
    torch.manual_seed(0)
    experts = Experts(4, 32, 64)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x_AD, counts_N = torch.randn(24, 32), torch.tensor(counts)
    with torch.inference_mode():
        plain, found = experts.one_by_one(x_AD, counts_N), experts(x_AD, counts_N)
        with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
            blocks = experts(x_AD, counts_N)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(blocks, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, blocks)  # a kernel would be made and kept for each number of rows
