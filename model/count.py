"""Parameters and floating-point operations of a network, from its real modules on the meta device.

Counted are matrix products (linear maps, patch convolution, attention scores and their application to the values)
of one forward pass of one image, two operations per multiply-accumulate. Element-wise work (norms, softmax,
activations, the top-K choice) is left out, as is usual. The papers of the family print multiply-accumulates under
the name of Gflops: compare those with `Count.macs`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import nn

from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT
from ditmoe.model.experts.moe import Experts, Router
from ditmoe.model.layers import PlainAttention, QkNormAttention
from ditmoe.model.presets import PATCHES, PUBLISHED, parse_preset

TRAINING_PASSES: Final = 3
"""Forward passes that a step of training costs: a backward pass costs two. Recomputed activations do not count."""
LATENT_CHANNELS = 4
LATENT_FACTOR = 8
"""Pixels per latent cell of the Stable Diffusion autoencoder: 256² images are 32² latents."""
IMAGENET_CLASSES = 1000

_QK_NORM = ("DiT-XL/", "DiT-G/")


@dataclass(frozen=True)
class Count:
    """What one network holds and what one forward pass of one image costs."""

    total: int
    """Learned parameters. The fixed position embedding is not one."""
    activated: int
    """Learned parameters that one token meets: K of the N routed experts, and everything else."""
    macs: int
    """Multiply-accumulates of the forward pass of one image, K experts for each token."""

    @property
    def flops(self) -> int:
        """Floating-point operations: two per multiply-accumulate."""
        return 2 * self.macs


def count(config: ModelConfig) -> Count:
    """Count a network of a complete configuration; allocates nothing of its size."""
    modules = _modules(config)
    return Count(
        total=sum(module.times * module.total for module in modules),
        activated=sum(module.times * module.activated for module in modules),
        macs=sum(module.times * module.macs for module in modules),
    )


@dataclass(frozen=True)
class PartMacs:
    """Multiply-accumulates of the forward pass of one image, by part of the network."""

    embedders: int
    """Of patches, timestep and label together."""
    block: int
    """Of one block; all are alike."""
    routed: int
    """Of its routed experts, K for each token, which `block` contains."""
    final_layer: int


@lru_cache(maxsize=64)
def macs_of_parts(config: ModelConfig) -> PartMacs:
    """What each part of a network of a complete configuration costs."""
    sums = {"blocks": 0, "final_layer": 0, "embedders": 0}
    routed = 0
    for module in _modules(config):
        part = module.name.partition(".")[0]
        sums[part if part in sums else "embedders"] += module.macs
        routed += module.macs if module.name.endswith(".moe.experts") else 0
    return PartMacs(sums["embedders"], sums["blocks"], routed, sums["final_layer"])


def macs_by_module(config: ModelConfig) -> dict[str, int]:
    """Multiply-accumulates of the forward pass of one image by the module that does them.

    Of the blocks, which are alike, `blocks.0` alone is there.
    """
    return {module.name: module.macs for module in _modules(config) if module.macs}


class _ModuleCount(NamedTuple):
    """One module's own share, without the modules in it."""

    name: str
    times: int
    """How often the network has it: blocks are alike, and one stands for all."""
    total: int
    activated: int
    macs: int


@lru_cache(maxsize=64)
def _modules(config: ModelConfig) -> tuple[_ModuleCount, ...]:
    """The modules of the network with one of its blocks."""
    with torch.device("meta"):
        network = DiT(config.model_copy(update={"depth": 1}))
    counts = []
    for name, module in network.named_modules():
        times = config.depth if name.startswith("blocks.") else 1
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        active = own * config.experts_per_token // config.experts if isinstance(module, Experts) else own
        counts.append(_ModuleCount(name, times, own, active, _macs(name, module, active, config.tokens)))
    return tuple(counts)


def _macs(name: str, module: nn.Module, active: int, tokens: int) -> int:
    """Multiply-accumulates of one module's own products for one image of `tokens` tokens."""
    if isinstance(module, Experts):
        return tokens * active
    if isinstance(module, Router | nn.Conv2d):
        return tokens * module.weight.numel()
    if isinstance(module, nn.Linear):
        # The condition (timestep and label) is one vector per image, not one per token.
        rows = 1 if "t_embedder" in name or "adaLN_modulation" in name else tokens
        return rows * module.weight.numel()
    if isinstance(module, PlainAttention | QkNormAttention):
        projection = module.proj if isinstance(module, PlainAttention) else module.out_proj
        return 2 * tokens * tokens * projection.in_features  # q·kᵀ, then scores·v
    # Table look-ups and norms multiply no matrices; anything else with weights would be forgotten here.
    assert active == 0 or isinstance(module, nn.Embedding | nn.LayerNorm), f"{name}: cannot count {type(module)}"
    return 0


def flops_per_image(config: ModelConfig) -> int:
    """Forward FLOPs of one image; a training step costs `TRAINING_PASSES` times as much."""
    return count(config).flops


def preset_config(name: str, image_size: int = 256) -> ModelConfig:
    """The published setting of a preset: ImageNet's 1000 classes on 4-channel latents of `image_size` / 8.

    The MoE networks of sizes XL and G have q/k-norm attention, as their published weights have.

    Args:
        name: a preset such as DiT-S/2-8E2A.
        image_size: side of the image in pixels, before the autoencoder.

    Raises:
        ValueError: the name is not a preset.
    """
    experts = parse_preset(name).experts
    return ModelConfig(
        preset=name,
        image_size=image_size // LATENT_FACTOR,
        channels=LATENT_CHANNELS,
        num_classes=IMAGENET_CLASSES,
        attention="qk_norm" if experts and name.startswith(_QK_NORM) else "plain",
    )


def family() -> list[str]:
    """Names of the whole family: dense S, B, L, XL and the published mixtures, with patches 2, 4, 8 (G: 2)."""
    dense = [f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in PATCHES]
    mixtures = [
        name.replace("/2", f"/{patch}")
        for name in PUBLISHED
        for patch in (PATCHES if not name.startswith("DiT-G/") else (2,))
    ]
    return dense + mixtures
