"""How fast a run is: sums between two records, memory, and the share of the hardware's peak (MFU)."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from torch.profiler import record_function

from ditmoe.launcher.profiling.parts import DATA, PREFIX, RECORDS
from ditmoe.parallel.engine.training_engine import StepResult
from ditmoe.parallel.planner.gpus import tflops_of_device


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


PARTS: Final = ("compute", "data_wait", "record", "save", "preview")
"""What a run's time goes to: the steps themselves, and what they wait for."""


class Clock:
    """Seconds since the last record, each of them counted to exactly one part; a resume starts it anew.

    It runs all the time, on `compute` where nothing else is said. So nothing that a run waits for is left out.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """Start it.

        Args:
            now: the time, s.
        """
        self._now = now
        self._part = PARTS[0]
        self._since = now()
        self._start_interval()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time within to this part, and what comes after to the part of before."""
        before = self._switch(name)
        try:
            with record_function(PREFIX + (DATA if name == "data_wait" else RECORDS)):  # for a profile
                yield
        finally:
            self._switch(before)

    def step(self, update: bool = True) -> None:
        """Count a step.

        Args:
            update: whether it trained the network; one that is skipped did not.
        """
        self._steps += 1
        self._updates += update

    def share_trained(self) -> float:
        """Share of the steps since the last record that trained the network."""
        return self._updates / self._steps

    def parts(self) -> dict[str, float]:
        """Seconds of each part since the last record."""
        self._switch(self._part)
        return dict(self._seconds)

    def take(self, batch: int) -> dict[str, float]:
        """What has passed since the last call, and begin anew.

        Returns:
            `step_seconds`, the mean of all the time for each step; its parts by their names, which sum to it; and
            `images_per_second` of the whole time.
        """
        means = {f"{name}_seconds": seconds / self._steps for name, seconds in self.parts().items()}
        whole = sum(means.values())
        self._start_interval()
        return {"images_per_second": batch / whole, "step_seconds": whole, **means}

    def _start_interval(self) -> None:
        self._steps = self._updates = 0
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def _switch(self, name: str) -> str:
        """Count the time until now to the part that it ran on, and go on with another one; the part of before."""
        now, before = self._now(), self._part
        self._seconds[before] += now - self._since
        self._since, self._part = now, name
        return before
