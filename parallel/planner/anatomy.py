"""What a rank holds of a network: its stage's tensors, with the experts and the widths that are dealt out."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch

from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT
from ditmoe.parallel.layout import Layout

_SPLIT: Final = re.compile(
    r"attn\.(qkv|Wqkv)\.(weight|bias)|attn\.(proj|out_proj)\.weight"
    r"|mlp\.fc1\.(weight|bias)|mlp\.fc2\.weight|moe\.(experts\.\w+|shared_experts\.(\w+\.weight|fc1\.bias))"
)
"""The tensors of a block that tensor-parallel ranks share out; all others are whole on each of them."""


@dataclass(frozen=True)
class Weight:
    """One learned tensor of the network."""

    numel: int
    routed: bool
    """Of the routed experts: dealt to the expert ranks."""
    split: bool
    """Shared out over the tensor-parallel ranks."""

    def held(self, layout: Layout) -> int:
        """Elements of it that a rank has before ZeRO shards them."""
        return self.numel // (layout.expert if self.routed else 1) // (layout.tensor if self.split else 1)


@dataclass(frozen=True)
class Anatomy:
    """The tensors of a network, by part; all blocks are alike."""

    embedders: tuple[Weight, ...]
    block: tuple[Weight, ...]
    final_layer: tuple[Weight, ...]
    depth: int

    def stage(self, blocks: range) -> Iterator[Weight]:
        """The tensors of a pipeline stage in the order of the network."""
        if blocks[0] == 0:
            yield from self.embedders
        for _ in blocks:
            yield from self.block
        if blocks[-1] == self.depth - 1:
            yield from self.final_layer


@lru_cache(maxsize=16)
def anatomy(config: ModelConfig) -> Anatomy:
    """Of a complete configuration's network, from its real modules without their memory."""
    with torch.device("meta"):
        network = DiT(config.model_copy(update={"depth": 1}))
    parts: dict[str, list[Weight]] = {"embedders": [], "blocks": [], "final_layer": []}
    for name, tensor in network.named_parameters():
        part, _, rest = name.partition(".")
        inside = rest.partition(".")[2] if part == "blocks" else ""
        weight = Weight(tensor.numel(), inside.startswith("moe.experts."), _SPLIT.fullmatch(inside) is not None)
        parts[part if part in parts else "embedders"].append(weight)
    return Anatomy(tuple(parts["embedders"]), tuple(parts["blocks"]), tuple(parts["final_layer"]), config.depth)


@lru_cache(maxsize=16)
def canonical_parameters(config: ModelConfig) -> tuple[int, int]:
    """How many parameters a checkpoint has of routed experts, each of them by itself, and how many others."""
    experts = max(1, config.experts)
    weights = list(anatomy(config).stage(range(config.depth)))
    routed = sum(weight.routed for weight in weights)
    return experts * routed, len(weights) - routed
