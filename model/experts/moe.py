"""The mixture-of-experts layer: softmax top-K routing without renormalisation, capacity or dropped tokens.

T tokens (of all images of a micro-batch), N experts, K experts per token, D hidden, F expert width. Experts are
stored as three stacked tensors, so that all of them run in three grouped matrix products.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditmoe.model.experts import paths
from ditmoe.model.experts.balance import BalanceLoss
from ditmoe.model.experts.blocks import block_product
from ditmoe.model.experts.dispatch import assign, combine, dispatch
from ditmoe.model.experts.in_turn import experts_in_turn
from ditmoe.model.kernels.products import linear
from ditmoe.model.kernels.row_bits import linear_by_pieces
from ditmoe.model.layers import DenseMlp, SwiGlu


class Router(nn.Module):
    """Linear scores of each token for each expert, without a bias."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x_TD: Tensor) -> Tensor:
        """`[T, D]` → logits `[T, N]`."""
        return linear(x_TD, self.weight)


class Experts(nn.Module):
    """N bias-free SwiGLU experts as three stacked tensors."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        # Kept beside the tensors: those that ZeRO 3 has put away have no shape, and outside of an expert's own
        # forward pass nothing brings them back.
        self.number, self.width = experts, width
        self.gate_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_AD: Tensor, counts_N: Tensor, block: int | None = None) -> Tensor:
        """Apply expert i to its `counts_N[i]` rows; rows come sorted by expert. `[A, D]` → `[A, D]`.

        Args:
            block: rows of a block, where the products are batched ones of blocks: what the rows are laid out by,
                as `together` asks for. None: as follows from the number of these rows.
        """
        path = paths.expert_path(x_AD, self.width)
        if path == "grouped":
            return self.grouped(x_AD, counts_N)
        if path == "one_by_one":
            return self.one_by_one(x_AD, counts_N)
        if path == "in_turn":
            weights = (self.gate_proj, self.up_proj, self.down_proj)
            return experts_in_turn(x_AD, counts_N.tolist(), *weights)
        if path == "by_pieces":
            return self.by_pieces(x_AD, counts_N)
        return self.batched(x_AD, counts_N, block or paths.block_rows(len(x_AD), len(counts_N)))

    def together(self, x_TD: Tensor, assignments: int) -> int | None:
        """What each expert's rows are to be a multiple of, for so many assignments of these tokens; None
        where it does not matter."""
        path = paths.expert_path(x_TD, self.width)
        return paths.rows_together(path, assignments, self.number)

    def grouped(self, x_AD: Tensor, counts_N: Tensor) -> Tensor:
        """All experts in three grouped matrix products; rows must be multiples of 16 bytes."""
        offsets = counts_N.cumsum(0, dtype=torch.int32)
        gate = F.grouped_mm(x_AD, self.gate_proj.transpose(-2, -1), offs=offsets)
        up = F.grouped_mm(x_AD, self.up_proj.transpose(-2, -1), offs=offsets)
        return F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(-2, -1), offs=offsets)

    def batched(self, x_AD: Tensor, counts_N: Tensor, size: int) -> Tensor:
        """Blocks of `size` rows, which all counts are multiples of, each with its expert's weights."""
        blocks = len(x_AD) // size
        first_G = torch.arange(blocks, device=x_AD.device) * size
        expert_G = torch.searchsorted(counts_N.cumsum(0), first_G, right=True)
        x_GSD = x_AD.view(blocks, size, -1)
        gate = block_product(x_GSD, self.gate_proj, expert_G)
        hidden = F.silu(gate) * block_product(x_GSD, self.up_proj, expert_G)
        return block_product(hidden, self.down_proj, expert_G).view_as(x_AD)

    def one_by_one(self, x_AD: Tensor, counts_N: Tensor) -> Tensor:
        """Each expert's three products in turn, written plainly: what other ways are compared with."""
        runs = torch.split(x_AD, counts_N.tolist())
        weights = zip(self.gate_proj, self.up_proj, self.down_proj, strict=True)
        return torch.cat(
            [
                F.linear(F.silu(F.linear(run, gate)) * F.linear(run, up), down)
                for run, (gate, up, down) in zip(runs, weights, strict=True)
            ]
        )

    def by_pieces(self, x_AD: Tensor, counts_N: Tensor) -> Tensor:
        """Each expert in turn, for inference in fp32: a token's result has the same bits whichever other tokens go
        to its expert. So an image does not depend on those drawn beside it."""
        out_AD = torch.empty_like(x_AD)
        first = 0
        weights = zip(self.gate_proj, self.up_proj, self.down_proj, strict=True)
        for count, (gate, up, down) in zip(counts_N.tolist(), weights, strict=True):
            run = slice(first, first + count)
            hidden = F.silu(linear_by_pieces(x_AD[run], gate)).mul_(linear_by_pieces(x_AD[run], up))
            out_AD[run] = linear_by_pieces(hidden, down)
            first += count
        return out_AD


def route(logits_TN: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax top-K routing (arXiv 2407.11633, eq. 2–3): the K weights are not renormalised.

    Returns:
        scores `[T, K]` float32, selected experts `[T, K]` int64, probabilities `[T, N]` float32.
    """
    probabilities_TN = F.softmax(logits_TN.float(), dim=1)
    selected_TK = torch.topk(probabilities_TN, experts_per_token, dim=-1, sorted=False).indices
    return probabilities_TN.gather(1, selected_TK), selected_TK, probabilities_TN


class MoE(nn.Module):
    """Routed experts plus shared experts, all in one process."""

    def __init__(
        self,
        hidden: int,
        experts: int,
        experts_per_token: int,
        shared_experts: int | Literal["gelu"],
        balance: BalanceLoss,
    ) -> None:
        """Build the layer.

        Args:
            shared_experts: of width D each; `gelu`: the MLP of a dense block in their place.
        """
        super().__init__()
        self.experts_per_token = experts_per_token
        self.balance = balance
        self.gate = Router(hidden, experts)
        self.experts = Experts(experts, hidden, 4 * hidden)
        self.shared_experts: SwiGlu | DenseMlp | None = None
        if shared_experts == "gelu":
            self.shared_experts = DenseMlp(hidden)
        elif shared_experts:
            self.shared_experts = SwiGlu(hidden, shared_experts * hidden)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """`[B, T, D]` → `[B, T, D]`."""
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        scores_TK, selected_TK, probabilities_TN = route(self.gate(x_TD), self.experts_per_token)
        scores_TK = self.balance(scores_TK, probabilities_TN, selected_TK)
        return self.mix(x_TD, scores_TK, selected_TK).view_as(x_BTD)

    def mix(self, x_TD: Tensor, scores_TK: Tensor, selected_TK: Tensor) -> Tensor:
        """Send tokens through their experts, weigh and sum, and add the shared experts. `[T, D]` → `[T, D]`."""
        together = self.experts.together(x_TD, selected_TK.numel())
        assignments = assign(selected_TK, self.balance.experts, together)
        result_AD = self.experts(dispatch(x_TD, assignments), assignments.counts_N, together)
        out_TD = combine(result_AD, scores_TK, assignments)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD
