"""`--dry-run`: what a run would be, without starting it: grid, parameters, and memory of the training state."""

from dataclasses import dataclass

import torch

from ditmoe.launcher.checks import layout_of
from ditmoe.launcher.config import RunConfig
from ditmoe.launcher.run_folder import config_yaml
from ditmoe.model.config import ModelConfig
from ditmoe.model.count import count
from ditmoe.model.dit import DiT
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.stages import stage_blocks

_GIB = 2**30


@dataclass(frozen=True)
class Parameters:
    """Parameters of a network, by how they are spread over ranks."""

    common: int
    """On every rank: all but the routed experts."""
    routed: int
    """Of the routed experts of all blocks."""


@dataclass(frozen=True)
class StateMemory:
    """Bytes of the training state on one rank; activations and buffers come on top."""

    weights: int
    """In the type of the computation."""
    gradients: int
    """In the same type."""
    optimizer: int
    """AdamW's two fp32 moments, and with ZeRO the fp32 weights that it updates."""
    ema: int
    """fp32."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.ema


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of a complete configuration's network, from its real modules without their memory."""
    with torch.device("meta"):
        network = DiT(config)
    routed = sum(p.numel() for name, p in network.named_parameters() if ".moe.experts." in name)
    return Parameters(sum(p.numel() for p in network.parameters()) - routed, routed)


def state_memory(parameters: Parameters, layout: Layout, precision: str) -> StateMemory:
    """Memory of the training state of one rank (ZeRO, arXiv 1910.02054, section 3).

    The experts are dealt to the expert ranks; ZeRO shards what a rank holds over the ranks that hold the same:
    all data ranks, and for experts the data / expert copies of them.
    """
    held_experts = parameters.routed // layout.expert

    def spread(bytes_each: int, sharded: bool) -> int:
        if not sharded:
            return bytes_each * (parameters.common + held_experts)
        common = -(-parameters.common // layout.data)
        return bytes_each * (common - (held_experts // -layout.expert_copies))

    compute = 2 if precision == "bf16" else 4
    return StateMemory(
        weights=spread(compute, layout.zero >= 3),
        gradients=spread(compute, layout.zero >= 2),
        optimizer=spread(12 if layout.zero else 8, layout.zero >= 1),
        ema=spread(4, layout.zero >= 1),
    )


def dry_run(config: RunConfig) -> str:
    """The text that `--dry-run` prints for a resolved configuration."""
    layout = layout_of(config)
    counts = count(config.model)
    memory = state_memory(count_parameters(config.model), layout, config.train.precision)
    rows = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimiser": memory.optimizer,
        "EMA": memory.ema,
        "total": memory.total,
    }
    facts = "\n".join(
        [
            "rank grid",
            layout.picture(config.model.experts, stage_blocks(config.model, layout.pipe)),
            "",
            "parameters",
            f"total      {counts.total:>15,}",
            f"activated  {counts.activated:>15,}",
            "",
            "training state of each rank, GiB (activations come on top)",
            *(f"{name:<10} {size / _GIB:>15.3f}" for name, size in rows.items()),
        ]
    )
    # As comments, so that all of the output is YAML.
    return config_yaml(config) + "\n" + "\n".join(f"# {line}".rstrip() for line in facts.splitlines())
