"""The balance loss of a mixture-of-experts layer, and how its gradient enters at the layer itself.

α · Σ_i f_i·P_i, where f_i = N · (share of the assignments that go to expert i) and P_i is the mean router
probability of expert i (arXiv 2407.11633, §3.2; Fedus et al., arXiv 2101.03961, eq. 4). Being a product of two
means it depends on the set they are taken over: the whole global batch, or groups of `group` consecutive samples
of the global order, never "what this rank happens to hold".

Over a small set the loss asks of every image that its tokens use all experts alike, which keeps experts from
specialising; over the global batch it asks that of the batch alone (arXiv 2501.11873). A batch is computed in
micro-batches, and the backward pass of the first needs the shares f of all: so f, which has no gradient, is that
of the step before. It moves little from one step to the next.

The gradient is added where the router's scores leave the layer, so nothing has to cross layers, pipeline
stages or the engine that replaces the layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _WithGradientOf(torch.autograd.Function):
    """Identity on the scores; its backward pass also sends `scale` into the loss given beside them."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.loss_dtype = loss.dtype
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        # Filled on the device: a tensor made from a Python number would be copied there, and the copy waited for.
        return gradient, torch.full((), ctx.scale, dtype=ctx.loss_dtype, device=gradient.device), None


class BalanceLoss:
    """Computes, injects and records the balance loss of one layer.

    Not a module: it has no parameters, and stays beside a layer that an engine replaces.
    """

    def __init__(self, experts: int, weight: float, tokens_per_sample: int, group: int) -> None:
        self.experts = experts
        self.weight = weight
        self.tokens_per_sample = tokens_per_sample
        self.group = group
        """0: the global batch."""
        self.batch_share_N: Tensor | None = None
        """For the global batch: the experts' shares of the assignments in the step before, float32, sum 1."""
        self.gradient_scale = 1.0
        """What the training loss of a micro-batch is multiplied by before its backward pass."""
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None
        """Sums a tensor over the data ranks: set when a group is the whole global micro-step."""
        self.ranks = 1
        """Data ranks that `sum_over_ranks` sums over."""
        self.last_loss: Tensor | None = None
        """Mean loss of the layer over the last training micro-batch's groups, α included."""
        self.last_load_N: Tensor | None = None
        """Assignments that each expert got in the last forward pass."""

    def recorded(self) -> tuple[Tensor, Tensor]:
        """`last_loss` and `last_load_N` of a micro-batch that has just been through the layer."""
        assert self.last_loss is not None and self.last_load_N is not None
        return self.last_loss, self.last_load_N

    def __call__(self, scores_TK: Tensor, probabilities_TN: Tensor, selected_TK: Tensor) -> Tensor:
        """Return the scores, unchanged in value, carrying the balance loss's gradient.

        Args:
            scores_TK: routing weights of the selected experts.
            probabilities_TN: softmax of the router's logits, float32.
            selected_TK: the selected experts' numbers.
        """
        chosen = torch.zeros_like(probabilities_TN).scatter_(1, selected_TK, 1.0)
        self.last_load_N = chosen.sum(0)
        if not torch.is_grad_enabled():
            return scores_TK  # sampling: any number of images, which need not make whole groups
        samples = probabilities_TN.shape[0] // self.tokens_per_sample
        local_group = min(self.group // self.ranks, samples) or samples
        by_group = (samples // local_group, local_group * self.tokens_per_sample, self.experts)
        if self.group == 0:
            share_GN = self._share_of_batch(probabilities_TN)
        else:
            share_GN = chosen.view(by_group).mean(1) / selected_TK.shape[1]
        if self.sum_over_ranks is not None:
            share_GN = self.sum_over_ranks(share_GN) / self.ranks
        mean_GN = probabilities_TN.view(by_group).mean(1)
        loss = self.weight * self.experts * (share_GN * mean_GN).sum(1).mean()
        self.last_loss = loss.detach()
        if self.weight == 0:
            return scores_TK
        carried: Tensor = _WithGradientOf.apply(scores_TK, loss, self.gradient_scale)  # type: ignore[no-untyped-call]
        return carried

    def _share_of_batch(self, probabilities_TN: Tensor) -> Tensor:
        """The shares of the step before, `[1, N]`; in the first step all alike, which has no gradient."""
        if self.batch_share_N is None:
            return torch.full_like(probabilities_TN[:1], 1 / self.experts)
        return self.batch_share_N.unsqueeze(0)
