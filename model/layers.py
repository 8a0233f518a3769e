"""The parts of a diffusion transformer block that are not experts (Peebles & Xie, arXiv 2212.09748).

B images, T tokens, D hidden, H heads; tensors carry their axes in their names.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditmoe.model.kernels.attention import attend
from ditmoe.model.kernels.products import Linear, gated, in_onednn

TIMESTEP_FEATURES = 256
MAX_PERIOD = 10_000.0


def modulate(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """adaLN modulation: x·(1 + scale) + shift, the same for every token of an image."""
    return x_BTD * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


def add_gated(x_BTD: Tensor, gate_B1D: Tensor, added_BTD: Tensor) -> Tensor:
    """How adaLN-Zero adds what a part of a block gives: x + gate·added, one gate for all tokens of an image."""
    return x_BTD + gate_B1D * added_BTD


class PatchEmbed(nn.Module):
    """Images to tokens: each patch×patch square becomes one token, row by row."""

    def __init__(self, channels: int, hidden: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, kernel_size=patch, stride=patch)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, T, D]`."""
        tokens: Tensor = self.proj(x_BCHW)
        return tokens.flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps to vectors: 256 sinusoidal features, then a two-layer MLP."""

    def __init__(self, hidden: int, spacing: Literal["dit", "diffusers"] = "dit") -> None:
        super().__init__()
        self.spacing: Literal["dit", "diffusers"] = spacing
        self.mlp = nn.Sequential(Linear(TIMESTEP_FEATURES, hidden), nn.SiLU(), Linear(hidden, hidden))

    def forward(self, timestep_B: Tensor) -> Tensor:
        """`[B]` → `[B, D]`."""
        angle = timestep_B.float()[:, None] * timestep_frequencies(timestep_B.device, self.spacing)
        features = torch.cat((angle.cos(), angle.sin()), dim=-1)
        embedding: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return embedding


def timestep_frequencies(device: torch.device, spacing: Literal["dit", "diffusers"] = "dit") -> Tensor:
    """ω of the features cos ωt and sin ωt, float32 `[128]`: from 1 to 10000^(−127/128), or to 10000^−1."""
    half = TIMESTEP_FEATURES // 2
    index = torch.arange(half, dtype=torch.float32, device=device)
    if spacing == "diffusers":
        return torch.exp(-math.log(MAX_PERIOD) * index / (half - 1))  # in its order, to round as it does
    return torch.exp(-math.log(MAX_PERIOD) / half * index)


class LabelEmbedder(nn.Module):
    """Class labels to vectors; row `num_classes` is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden: int) -> None:
        super().__init__()
        # Given its (uninitialised) weight: drawing one on the meta device would import half of torch's compiler.
        self.embedding_table = nn.Embedding(num_classes + 1, hidden, _weight=torch.empty(num_classes + 1, hidden))

    def forward(self, label_B: Tensor) -> Tensor:
        """`[B]` → `[B, D]`."""
        embedding: Tensor = self.embedding_table(label_B)
        return embedding


def position_embedding(hidden: int, side: int) -> Tensor:
    """Fixed 2-D sin-cos position embedding, float32 `[1, side², hidden]`.

    The first half of the features encodes the column, the second half the row; each half is all sines and then
    all cosines of a geometric series of frequencies (Vaswani et al. 2017, §3.5, in two dimensions).
    """
    quarter = hidden // 4
    frequency = MAX_PERIOD ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat((angle.sin(), angle.cos()), dim=1)
    column = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat((column, row), dim=2).reshape(1, side * side, hidden).float()


class PlainAttention(nn.Module):
    """Multi-head self-attention with the published names `qkv` and `proj`."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(hidden, 3 * hidden)
        self.proj = Linear(hidden, hidden)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """`[B, T, D]` → `[B, T, D]`."""
        q_BHTd, k_BHTd, v_BHTd = _split_heads(self.qkv(x_BTD), self.heads)
        out: Tensor = self.proj(_merge_heads(attend(q_BHTd, k_BHTd, v_BHTd)))
        return out


class QkNormAttention(nn.Module):
    """Self-attention with per-head LayerNorm on queries and keys, named as in the published XL and G weights."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.Wqkv = Linear(hidden, 3 * hidden)
        self.out_proj = Linear(hidden, hidden)
        self.q_norm = nn.LayerNorm(hidden // heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(hidden // heads, eps=1e-6)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """`[B, T, D]` → `[B, T, D]`."""
        q_BHTd, k_BHTd, v_BHTd = _split_heads(self.Wqkv(x_BTD), self.heads)
        attended = attend(self.q_norm(q_BHTd), self.k_norm(k_BHTd), v_BHTd)
        out: Tensor = self.out_proj(_merge_heads(attended))
        return out


def _split_heads(qkv_BTX: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, T, 3·D]`, laid out as (3, heads, head_dim), → q, k, v of `[B, heads, T, head_dim]`."""
    batch, tokens, width = qkv_BTX.shape
    # Unbound and not indexed: the gradient is one copy, not three of them in zeros that are added up.
    q_BHTd, k_BHTd, v_BHTd = qkv_BTX.view(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return q_BHTd, k_BHTd, v_BHTd


def _merge_heads(x_BHTd: Tensor) -> Tensor:
    return x_BHTd.transpose(1, 2).flatten(2)


class DenseMlp(nn.Module):
    """The MLP of a dense DiT block: two layers of width 4D with a tanh GELU between."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden, 4 * hidden)
        self.fc2 = Linear(4 * hidden, hidden)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """`[B, T, D]` → `[B, T, D]`."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x_BTD), approximate="tanh"))
        return out


class SwiGlu(nn.Module):
    """Bias-free gated MLP, down(SiLU(gate(x))·up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width, bias=False)
        self.up_proj = Linear(hidden, width, bias=False)
        self.down_proj = Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` → `[..., D]`."""
        maps = (self.gate_proj, self.up_proj, self.down_proj)
        weights = [each.weight for each in maps]
        # Tensor ranks have other maps, and a weight that ZeRO 3 has put away has no numbers.
        if not torch.is_grad_enabled() and all(type(each) is Linear for each in maps) and in_onednn(x, *weights):
            return gated(x, *weights)
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear map from tokens to patches."""

    def __init__(self, hidden: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(hidden, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden, 2 * hidden))

    def forward(self, x_BTD: Tensor, condition_BD: Tensor) -> Tensor:
        """`[B, T, D]`, `[B, D]` → `[B, T, patch²·out_channels]`."""
        shift_BD, scale_BD = self.adaLN_modulation(condition_BD).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm_final(x_BTD), shift_BD, scale_BD))
        return out
