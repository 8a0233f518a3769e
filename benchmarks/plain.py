"""The baseline: DiT-MoE as its papers write it down, in plain PyTorch, to be measured against and compared with.

The network is that of arXiv 2407.11633 (on arXiv 2212.09748): every expert is a module of its own, and a layer
loops over them. Training is in fp32 with torch's AdamW, one parameter after the other, and an EMA by a loop.
Sampling is Euler's method with guidance, the network asked twice. Nothing is fused, sorted or grouped.

Weights load by their published names, so that both networks can be given the same ones
(`tests/benchmarks/test_plain.py` holds their outputs, losses and steps to each other).

B images, T tokens, D hidden, H heads, N experts, K experts per token.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditmoe.model.config import ModelConfig
from ditmoe.model.layers import position_embedding

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]` → `[B, T, D]`."""
        batch, tokens, hidden = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        result: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, hidden))
        return result


class Expert(nn.Module):
    """down(SiLU(gate(x)) · up(x))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[…, D]` → `[…, D]`."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Gate(nn.Module):
    """The router's weight."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))


class MixtureLayer(nn.Module):
    """Each token's K best experts of N, weighted by the router's softmax, and experts that all tokens share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.config = config
        self.gate = Gate(hidden, config.experts)
        self.experts = nn.ModuleList(Expert(hidden, 4 * hidden) for _ in range(config.experts))
        self.shared_experts = Expert(hidden, config.shared_experts * hidden)
        self.balance_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]` → `[B, T, D]`."""
        flat = x.reshape(-1, x.shape[-1])
        probability = F.softmax(F.linear(flat, self.gate.weight), dim=-1)
        weight, chosen = torch.topk(probability, self.config.experts_per_token, dim=-1)
        if self.training:
            # α · Σ f_i · P_i over all tokens: f_i is N times the share of assignments, P_i the mean probability.
            share = F.one_hot(chosen, self.config.experts).float().mean((0, 1))
            mean = probability.mean(0)
            self.balance_loss = self.config.balance_weight * self.config.experts * (share * mean).sum()
        repeated = flat.repeat_interleave(self.config.experts_per_token, dim=0)
        expert_of_row = chosen.flatten()
        result = torch.empty_like(repeated)
        for number, expert in enumerate(self.experts):
            rows = expert_of_row == number
            result[rows] = expert(repeated[rows])
        mixed = (result.view(*weight.shape, -1) * weight.unsqueeze(-1)).sum(dim=1)
        return (mixed + self.shared_experts(flat)).view_as(x)


class Block(nn.Module):
    """Attention and mixture, each modulated and gated by the condition."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden, config.heads)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.moe = MixtureLayer(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`[B, T, D]`, `[B, D]` → `[B, T, D]`."""
        a_shift, a_scale, a_gate, m_shift, m_scale, m_gate = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        x = x + a_gate * self.attn(self.norm1(x) * (1 + a_scale) + a_shift)
        x = x + m_gate * self.moe(self.norm2(x) * (1 + m_scale) + m_shift)
        return x


class Final(nn.Module):
    """From tokens to patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.norm_final = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden, config.patch**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`[B, T, D]`, `[B, D]` → `[B, T, patch² · channels]`."""
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, -1)
        result: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return result


class PlainDiT(nn.Module):
    """The whole network of a mixture with plain attention and SwiGLU shared experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.complete and config.experts and config.shared_experts and config.attention == "plain"
        assert config.image_size and config.channels and config.num_classes
        hidden, side = config.hidden, config.image_size // config.patch
        self.config = config
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.channels, hidden, config.patch, config.patch)})
        time = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.t_embedder = nn.ModuleDict({"mlp": time})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, hidden)})
        self.register_buffer("pos_embed", position_embedding(hidden, side))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = Final(config)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """`[B, C, H, W]`, `[B]`, `[B]` → `[B, out_channels, H, W]`."""
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        frequency = torch.exp(-math.log(10_000) / 128 * torch.arange(128, device=x.device))
        angle = timestep[:, None] * frequency
        condition = self.t_embedder["mlp"](torch.cat((angle.cos(), angle.sin()), -1))
        condition = condition + self.y_embedder["embedding_table"](label)
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = self.final_layer(tokens, condition)
        patch, channels = self.config.patch, self.config.out_channels
        side = x.shape[-1] // patch
        grid = patches.reshape(len(x), side, side, patch, patch, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(x), channels, side * patch, side * patch)


def flow_loss(predict: Predict, x: Tensor, label: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Rectified flow: mean of |v(z, t) − (ε − x)|² with z = (1 − t)·x + t·ε (arXiv 2209.03003)."""
    at = t.view(-1, 1, 1, 1)
    prediction = predict((1 - at) * x + at * noise, t, label)
    return (prediction[:, : x.shape[1]] - (noise - x)).square().mean()


class PlainTraining:
    """A network, its optimiser and its EMA."""

    def __init__(self, network: PlainDiT, lr: float = 1e-4, decay: float = 0.9999) -> None:
        self.network = network.train()
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0, foreach=False)
        self.decay = decay
        self.ema = {name: value.detach().clone() for name, value in network.named_parameters()}

    def step(self, x: Tensor, label: Tensor, noise: Tensor, t: Tensor) -> float:
        """One step on one batch; its loss, without the balance loss."""
        loss = flow_loss(self.network, x, label, noise, t)
        balance = [block.moe.balance_loss for block in self.network.blocks]
        self.optimizer.zero_grad()
        (loss + sum(balance)).backward()
        self.optimizer.step()
        with torch.no_grad():
            for name, value in self.network.named_parameters():
                self.ema[name].mul_(self.decay).add_(value, alpha=1 - self.decay)
        return loss.item()


@torch.no_grad()
def sample(network: PlainDiT, noise: Tensor, label: Tensor, steps: int, cfg_scale: float) -> Tensor:
    """Euler's method from t = 1 to 0 in equal steps, guided: v = null + s·(class − null)."""
    network.eval()
    x, null = noise, torch.full_like(label, network.config.num_classes or 0)
    channels = x.shape[1]
    for number in range(steps):
        t = torch.full((len(x),), 1 - number / steps, device=x.device)
        of_class = network(x, t, label)[:, :channels]
        of_null = network(x, t, null)[:, :channels]
        x = x - (of_null + cfg_scale * (of_class - of_null)) / steps
    return x
