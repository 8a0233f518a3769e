"""How fast a run is: sums between two records, memory, and the share of the hardware's peak (MFU)."""

import resource
import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch

from ditmoe.parallel.engine.training_engine import StepResult
from ditmoe.parallel.planner.gpus import tflops_of_device

TRAINING_PASSES: Final = 3
"""A backward pass costs two forward passes; recomputed activations do not count."""


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Peak of a known GPU, TFLOP/s, or None."""
    if device.type != "cuda":
        return None
    return tflops_of_device(torch.cuda.get_device_name(device), precision)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory that this process has had, GiB: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass
class Sums:
    """What has been summed since the last record; part of a checkpoint, so that a resume changes no record."""

    steps: int = 0
    loss: float = 0.0
    balance_loss: float = 0.0
    grad_norm: float = 0.0
    skipped_steps: list[int] = field(default_factory=list)
    """Steps without an update, which do not count above."""

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self.steps += 1
        self.loss += result.loss
        self.balance_loss += result.balance_loss
        self.grad_norm += result.grad_norm

    def means(self) -> dict[str, float | None]:
        """Mean of each over the steps; None where all were skipped."""
        sums = {"loss": self.loss, "balance_loss": self.balance_loss, "grad_norm": self.grad_norm}
        return {key: value / self.steps if self.steps else None for key, value in sums.items()}

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass
class Clock:
    """Seconds since the last record; a resume starts it anew."""

    steps: int = 0
    step_seconds: float = 0.0
    wait_seconds: float = 0.0

    def add(self, step_seconds: float, wait_seconds: float) -> None:
        """Count a step and, within it, the wait for its data."""
        self.steps += 1
        self.step_seconds += step_seconds
        self.wait_seconds += wait_seconds

    def rates(self, batch: int) -> dict[str, float]:
        """Mean seconds of a step, its wait for data, and images per second."""
        return {
            "step_seconds": self.step_seconds / self.steps,
            "data_wait_seconds": self.wait_seconds / self.steps,
            "images_per_second": batch * self.steps / self.step_seconds,
        }
