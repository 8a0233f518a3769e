"""What the families of figures are measured on."""

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.suite.machine import Limits
from ditmoe.model.config import ModelConfig
from ditmoe.model.count import preset_config

TINY = ModelConfig(
    depth=2,
    hidden=32,
    heads=4,
    patch=2,
    experts=4,
    experts_per_token=2,
    image_size=8,
    channels=4,
    num_classes=10,
)


@dataclass(frozen=True)
class Settings:
    """Of one run of the suite."""

    limits: Limits
    device: torch.device
    small: bool
    """Tiny sizes and few rounds, which only show that everything runs."""
    folder: Path
    """For files, removed afterwards."""
    rounds: int | None = None
    """None: each family's own number."""

    def rounds_of(self, usual: int) -> int:
        """How many rounds to count."""
        return self.rounds or (2 if self.small else usual)

    @property
    def model(self) -> ModelConfig:
        """The network that training and sampling are measured with: 256² pixels, as latents of 32²."""
        if self.small:
            return TINY
        config = preset_config("DiT-B/2-8E2A" if self.device.type == "cuda" else "DiT-S/2-8E2A")
        return config.model_copy(update={"attention": "plain"})

    @property
    def model_name(self) -> str:
        """For the names of figures."""
        return "tiny" if self.small else self.model.preset or ""

    @property
    def batch(self) -> int:
        """Images of a step."""
        return 2 if self.small else 64 if self.device.type == "cuda" else 4
