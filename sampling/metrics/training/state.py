"""What a small training keeps of itself, so that one that was killed goes on as if nothing had been.

A file has the network, the moments of its optimiser and whatever else the next step depends on, and is replaced as
a whole. The learning rate and what is drawn for a step follow from the step's number.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ditmoe.data.storage.files import replacing

KEEP_SECONDS: Final = 1.0
"""Between two states, at least: work that a kill loses."""
KEEP_SHARE: Final = 20
"""A state takes one part in so many of a training's time, at most."""
_MOMENTS: Final = ("exp_avg", "exp_avg_sq", "step")


class DamagedState(ValueError):
    """A file that cannot be gone on from."""


class Kept(NamedTuple):
    """What a training goes on from."""

    step: int
    """Steps that are done."""
    more: dict[str, Tensor]


class TrainingState:
    """The state of a training by Adam or AdamW, in a file.

    Args:
        path: of the file.
        identity: of what is trained; a file of another is passed over.
    """

    def __init__(self, path: Path, identity: str, network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.path = path
        self._identity = identity
        self._network = network
        self._optimiser = optimiser
        self._due = time.monotonic() + KEEP_SECONDS

    def load(self) -> Kept:
        """Take up where the file is; step 0 where there is none of this training.

        Raises:
            DamagedState: it cannot be read. Network and optimiser may have parts of it.
        """
        if not self.path.is_file():
            return Kept(0, {})
        try:
            with safe_open(self.path, framework="pt") as stored:
                facts = stored.metadata()
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if facts["identity"] != self._identity:
                return Kept(0, {})
            self._network.load_state_dict(_under("network", tensors))
            for name, parameter in self._network.named_parameters():
                self._optimiser.state[parameter] = {
                    key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else parameter.device)
                    for key in _MOMENTS
                    if f"{key}.{name}" in tensors
                }
            return Kept(int(facts["step"]), _under("more", tensors))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DamagedState(f"{self.path}: unreadable state of a training ({error})") from error

    def keep(self, step: int, more: Mapping[str, Tensor]) -> None:
        """Write the file. UserError where the file system refuses."""
        tensors = {f"network.{name}": tensor for name, tensor in self._network.state_dict().items()}
        tensors |= {f"more.{name}": tensor for name, tensor in more.items()}
        for name, parameter in self._network.named_parameters():
            moments = self._optimiser.state[parameter]
            tensors |= {f"{key}.{name}": moments[key] for key in _MOMENTS if key in moments}
        begun = time.monotonic()
        with replacing(self.path) as file:
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            file.write(save(whole, metadata={"step": str(step), "identity": self._identity}))
        now = time.monotonic()
        self._due = now + max(KEEP_SECONDS, KEEP_SHARE * (now - begun))

    def keep_at_times(self, step: int, more: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write the file where it is time to."""
        if time.monotonic() >= self._due:
            self.keep(step, more())

    def remove(self) -> None:
        """Remove the file: what was trained is kept elsewhere."""
        self.path.unlink(missing_ok=True)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}.")
    }
