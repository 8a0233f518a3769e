"""The mixture-of-experts layer against a plain loop, and its balance loss against autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditmoe.model.experts.balance import BalanceLoss
from ditmoe.model.experts.dispatch import assign
from ditmoe.model.experts.moe import MoE, route

HIDDEN, EXPERTS, ACTIVE, TOKENS = 32, 8, 2, 24


def make_layer(weight: float = 0.0, group: int = 1, dtype: torch.dtype = torch.float32) -> MoE:
    torch.manual_seed(0)
    layer = MoE(HIDDEN, EXPERTS, ACTIVE, 2, BalanceLoss(EXPERTS, weight, TOKENS // 4, group))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return layer.to(dtype)


def token_by_token(layer: MoE, x_BTD: Tensor) -> Tensor:
    """The definition: every token asks its own experts, one after the other."""
    out = []
    for x_D in x_BTD.reshape(-1, HIDDEN):
        probability_N = F.softmax(layer.gate(x_D).float(), dim=0)
        total_D = layer.shared_experts(x_D) if layer.shared_experts is not None else torch.zeros_like(x_D)
        for expert in probability_N.topk(ACTIVE).indices.tolist():
            hidden = F.silu(layer.experts.gate_proj[expert] @ x_D) * (layer.experts.up_proj[expert] @ x_D)
            total_D = total_D + probability_N[expert] * (layer.experts.down_proj[expert] @ hidden)
        out.append(total_D)
    return torch.stack(out).view_as(x_BTD)


def test_forward_and_gradients_equal_the_definition() -> None:
    layer, x_BTD = make_layer(), torch.randn(4, TOKENS // 4, HIDDEN)
    gradients = []
    for run in (layer, lambda x: token_by_token(layer, x)):
        x = x_BTD.clone().requires_grad_()
        layer.zero_grad()
        out = run(x)
        out.square().mean().backward()
        gradients.append([out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])  # type: ignore[union-attr]
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize(
    "counts", [[6, 6, 6, 6, 6, 6, 6, 6], [48, 0, 0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 0, 0, 40, 2]]
)
def test_grouped_products_equal_one_by_one(counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
    """Also with experts that get no token; the grouped path is the one GPUs take."""
    experts = make_layer(dtype=dtype).experts
    x_AD, counts_N = torch.randn(48, HIDDEN).to(dtype), torch.tensor(counts)
    results = []
    for run in (experts.grouped, experts.one_by_one):
        experts.zero_grad()
        out = run(x_AD, counts_N)
        out.float().square().sum().backward()
        results.append([out, *(p.grad.clone() for p in experts.parameters())])  # type: ignore[union-attr]
    for grouped, plain in zip(*results, strict=True):
        scale = plain.float().abs().max().item() + 1e-6
        assert (grouped.float() - plain.float()).abs().max().item() <= tolerance * scale


def test_scores_are_not_renormalised() -> None:
    scores_TK, selected_TK, probabilities_TN = route(torch.randn(10, EXPERTS), ACTIVE)
    torch.testing.assert_close(scores_TK, probabilities_TN.gather(1, selected_TK))
    assert (scores_TK.sum(1) < 1).all()
    torch.testing.assert_close(scores_TK.sort(1).values, probabilities_TN.sort(1).values[:, -ACTIVE:])


@pytest.mark.parametrize("group", [1, 2, 4])
def test_balance_loss_and_its_gradient(group: int) -> None:
    """α·Σ f_i·P_i by its definition; the injected gradient is what adding it to the loss would give."""
    alpha, scale = 0.7, 0.25
    layer, x_BTD = make_layer(alpha, group), torch.randn(4, TOKENS // 4, HIDDEN)
    layer.balance.gradient_scale = scale
    layer(x_BTD).sum().backward()
    injected = layer.gate.weight.grad.clone()  # type: ignore[union-attr]

    layer.zero_grad()
    layer.balance.weight = 0.0
    out = layer(x_BTD)
    probabilities_TN = F.softmax(layer.gate(x_BTD.view(-1, HIDDEN)), dim=1)
    terms = []
    for probability_TN in probabilities_TN.view(4 // group, -1, EXPERTS):
        chosen = probability_TN.topk(ACTIVE).indices
        share_N = torch.bincount(chosen.flatten(), minlength=EXPERTS) / chosen.numel()
        terms.append(alpha * (EXPERTS * share_N * probability_TN.mean(0)).sum())
    expected = torch.stack(terms).mean()
    (out.sum() + scale * expected).backward()
    torch.testing.assert_close(injected, layer.gate.weight.grad, rtol=1e-4, atol=1e-6)

    layer.balance.weight = alpha
    layer(x_BTD)
    torch.testing.assert_close(layer.balance.last_loss, expected.detach())
    assert layer.balance.last_load_N is not None and layer.balance.last_load_N.sum() == TOKENS * ACTIVE


def test_over_the_global_batch_micro_batches_add_up() -> None:
    """With given shares each micro-batch adds its part of one gradient; with the batch's own, of the exact one."""
    alpha, x_BTD = 0.02, torch.randn(4, TOKENS // 4, HIDDEN)

    def gradient(group: int, parts: int, share_N: Tensor | None) -> tuple[Tensor, float]:
        layer = make_layer(alpha, group)
        layer.balance.gradient_scale = 1 / parts
        layer.balance.batch_share_N = share_N
        losses = []
        for part in x_BTD.chunk(parts):
            (0 * layer(part).sum()).backward()
            losses.append(float(layer.balance.recorded()[0]))
        assert layer.gate.weight.grad is not None
        return layer.gate.weight.grad, sum(losses) / parts

    layer = make_layer(alpha, group=4)
    layer(x_BTD)
    _, load_N = layer.balance.recorded()
    exact, loss = gradient(4, 1, None)
    for parts in (1, 2, 4):
        found, found_loss = gradient(0, parts, load_N / load_N.sum())
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-8)
        assert found_loss == pytest.approx(loss, rel=1e-5)
    first, first_loss = gradient(0, 2, None)
    assert first_loss == pytest.approx(alpha) and first.abs().max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("images", [1, 3, 4, 6])
def test_sampling_takes_any_number_of_images(images: int) -> None:
    """Groups are a matter of training: what is drawn at once need not be a multiple of one."""
    layer, x_BTD = make_layer(0.01, group=4), torch.randn(images, TOKENS // 4, HIDDEN)
    with torch.no_grad():
        assert layer(x_BTD).shape == x_BTD.shape
    assert layer.balance.last_load_N is not None
    assert layer.balance.last_load_N.sum() == images * TOKENS // 4 * ACTIVE


def test_assignments_are_counted_for_experts_without_any() -> None:
    assert assign(torch.tensor([[3, 1], [1, 3], [5, 1]]), 7).counts_N.tolist() == [0, 3, 0, 2, 0, 1, 0]


def test_a_perfectly_balanced_router_has_loss_alpha() -> None:
    balance = BalanceLoss(EXPERTS, 0.01, EXPERTS, group=1)
    probabilities_TN = torch.full((EXPERTS, EXPERTS), 1 / EXPERTS)
    selected_TK = torch.stack((torch.arange(EXPERTS), (torch.arange(EXPERTS) + 1) % EXPERTS), dim=1)
    balance(probabilities_TN[:, :2], probabilities_TN, selected_TK)
    assert balance.last_loss is not None
    assert balance.last_loss.item() == pytest.approx(0.01)
