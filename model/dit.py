"""DiT-MoE: a class-conditional diffusion transformer whose MLPs are mixtures of experts (arXiv 2407.11633).

With `experts: 0` the blocks have a dense MLP and the network is the DiT of arXiv 2212.09748. Parameters carry
the published state-dict names, except that experts are stacked (see `ditmoe.model.canonical`).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditmoe.model.config import ModelConfig
from ditmoe.model.experts.balance import BalanceLoss
from ditmoe.model.experts.moe import MoE
from ditmoe.model.kernels.products import Linear
from ditmoe.model.layers import (
    DenseMlp,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    PlainAttention,
    QkNormAttention,
    TimestepEmbedder,
    add_gated,
    modulate,
    position_embedding,
)


class Block(nn.Module):
    """Attention and MLP (or experts), each modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden
        attention = QkNormAttention if config.attention == "qk_norm" else PlainAttention
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.attn = attention(hidden, config.heads)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        if config.experts:
            balance = BalanceLoss(config.experts, config.balance_weight, config.tokens, group=config.balance_group)
            shared: int | Literal["gelu"] = config.shared_experts if config.shared_mlp == "swiglu" else "gelu"
            self.moe = MoE(hidden, config.experts, config.experts_per_token, shared, balance)
        else:
            self.mlp = DenseMlp(hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden, 6 * hidden))

    @property
    def feed_forward(self) -> nn.Module:
        """The mixture of experts, or the MLP of a dense network."""
        return self.moe if hasattr(self, "moe") else self.mlp

    def forward(self, x_BTD: Tensor, condition_BD: Tensor) -> Tensor:
        """`[B, T, D]`, `[B, D]` → `[B, T, D]`."""
        x_BTD, modulated_BTD, gate_B1D = self.attend(x_BTD, condition_BD)
        return add_gated(x_BTD, gate_B1D, self.feed_forward(modulated_BTD))

    def attend(self, x_BTD: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All that comes before the feed-forward part.

        Returns:
            The tokens after attention `[B, T, D]`, what the feed-forward part is given of them `[B, T, D]`, and
            the gate of what it gives `[B, 1, D]`.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition_BD).chunk(6, dim=1)
        attended_BTD = self.attn(modulate(self.norm1(x_BTD), shift_a, scale_a))
        x_BTD = add_gated(x_BTD, gate_a.unsqueeze(1), attended_BTD)
        return x_BTD, modulate(self.norm2(x_BTD), shift_m, scale_m), gate_m.unsqueeze(1)


ComputeBlock = Callable[[Block, Tensor, Tensor], Tensor]
"""(block, x_BTD, condition_BD) → what the block gives, `[B, T, D]`."""


def call_block(block: Block, x_BTD: Tensor, condition_BD: Tensor) -> Tensor:
    """What a block gives, by itself."""
    given_BTD: Tensor = block(x_BTD, condition_BD)
    return given_BTD


class DiT(nn.Module):
    """The network, or a stretch of its blocks.

    Its weights are uninitialised until `ditmoe.model.initialise` or a load fills them. The whole network is
    `predict(*transform(*embed(…)))`; a pipeline stage holds some of the blocks and is asked for its part alone.
    Blocks keep their numbers, so that parameters have the same names in a part as in the whole.
    """

    pos_embed: Tensor

    def __init__(self, config: ModelConfig, blocks: range | None = None) -> None:
        """Build the network of a complete configuration (input size, channels and classes known).

        Args:
            blocks: numbers of the blocks to hold; None: all. The embedders come with the first block and the
                final layer with the last.
        """
        super().__init__()
        assert config.complete, "the model's image_size, channels and num_classes are not known yet"
        assert config.image_size and config.channels and config.num_classes
        blocks = range(config.depth) if blocks is None else blocks
        assert blocks and blocks[0] >= 0 and blocks[-1] < config.depth, f"{blocks} of {config.depth} blocks"
        self.config = config
        self.has_first = blocks[0] == 0
        """Whether the embedders are here."""
        self.has_last = blocks[-1] == config.depth - 1
        """Whether the final layer is here."""
        self.checkpoint_blocks = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.compute_block: ComputeBlock = call_block
        """How a block is computed: by itself, or by code that was compiled for all of them."""
        if self.has_first:
            self.x_embedder = PatchEmbed(config.channels, config.hidden, config.patch)
            self.t_embedder = TimestepEmbedder(config.hidden, config.timestep_frequencies)
            self.y_embedder = LabelEmbedder(config.num_classes, config.hidden)
            side = config.image_size // config.patch
            if torch.get_default_device().type == "meta":  # where this arithmetic would import torch's compiler
                embedding = torch.empty(1, side**2, config.hidden)
            else:
                embedding = position_embedding(config.hidden, side)
            self.register_buffer("pos_embed", embedding)
        self.blocks = nn.ModuleDict({str(number): Block(config) for number in blocks})
        if self.has_last:
            self.final_layer = FinalLayer(config.hidden, config.patch, config.out_channels)

    def forward(self, x_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """Predict from noisy images, with all blocks.

        Args:
            x_BCHW: noisy images or latents.
            timestep_B: 0…999 for DDPM, 0…1 for rectified flow.
            label_B: classes; `num_classes` is the null class.

        Returns:
            float32 `[B, out_channels, H, W]`.
        """
        return self.predict(*self.transform(*self.embed(x_BCHW, timestep_B, label_B)))

    def embed(self, x_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the first block: tokens `[B, T, D]` and condition `[B, D]`, in the weights' type."""
        dtype = self.x_embedder.proj.weight.dtype
        x_BTD = self.x_embedder(x_BCHW.to(dtype)) + self.pos_embed.to(dtype)
        return x_BTD, self.t_embedder(timestep_B) + self.y_embedder(label_B)

    def transform(self, x_BTD: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks that are here, one after the other: new tokens, and the condition as it was."""
        for block in self.blocks.values():
            assert isinstance(block, Block)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_BTD = checkpoint(self.compute_block, block, x_BTD, condition_BD, use_reentrant=False)
            else:
                x_BTD = self.compute_block(block, x_BTD, condition_BD)
        return x_BTD, condition_BD

    def predict(self, x_BTD: Tensor, condition_BD: Tensor) -> Tensor:
        """The prediction from what leaves the last block, float32 `[B, out_channels, H, W]`."""
        return self._unpatchify(self.final_layer(x_BTD, condition_BD)).float()

    def hidden(self, x_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """What leaves the last block, `[B, T, D]`: `forward` without its end, which is `predict_hidden`."""
        return self.transform(*self.embed(x_BCHW, timestep_B, label_B))[0]

    def predict_hidden(self, x_BTD: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """The prediction from what leaves the last block, or stands for it, float32 `[B, out_channels, H, W]`."""
        return self.predict(x_BTD, self.t_embedder(timestep_B) + self.y_embedder(label_B))

    def _unpatchify(self, patches_BTP: Tensor) -> Tensor:
        """`[B, T, patch²·C]` → `[B, C, H, W]`; within a patch the channel runs fastest."""
        patch, channels = self.config.patch, self.config.out_channels
        side = int(self.config.tokens**0.5)
        grid = patches_BTP.reshape(-1, side, side, patch, patch, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)


def balance_losses(network: nn.Module) -> list[BalanceLoss]:
    """The balance losses of the network's layers, first block first; empty for a dense network."""
    return [module.balance for module in network.modules() if isinstance(module, MoE)]
