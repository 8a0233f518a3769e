"""How many processes a run has, and whether this one is among them."""

import os
from typing import Literal

from ditmoe.model.errors import UserError

Device = Literal["auto", "cpu", "cuda"]


def in_worker() -> bool:
    """Whether this process is one of several, started by us, torchrun or a batch system: RANK is set."""
    return "RANK" in os.environ


def known_processes(processes: int | None, device: Device) -> int | None:
    """The number of processes where it is known without asking for devices, otherwise None.

    Args:
        processes: `launch.processes`.
        device: `launch.device`.
    """
    if in_worker():
        return world_size()
    if processes is None and device == "cpu":
        return 1
    return processes


def process_count(processes: int | None, device: Device) -> int:
    """The number of processes of a run; counts the GPUs where the configuration leaves it out.

    Raises:
        UserError: `launch.device` is cuda and this machine shows no GPU.
    """
    known = known_processes(processes, device)
    if known is not None and device != "cuda":
        return known
    import torch

    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus == 0:
        raise UserError("launch.device = cuda: this machine shows no GPU; expected auto or cpu")
    return known or gpus or 1


def world_size() -> int:
    """WORLD_SIZE of a worker.

    Raises:
        UserError: RANK is set and WORLD_SIZE is not a number.
    """
    text = os.environ.get("WORLD_SIZE", "")
    if not text.isdigit() or int(text) < 1:
        raise UserError(
            f"RANK = {os.environ.get('RANK')} is set in the environment with WORLD_SIZE = {text or 'nothing'};"
            " expected the number of processes, or neither of them"
        )
    return int(text)
