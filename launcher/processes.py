"""How many processes a run has."""

from ditmoe.model.errors import UserError
from ditmoe.parallel.ranks import Device, this_process


def in_worker() -> bool:
    """Whether this process is one of several that were started, by us or by torchrun.

    Raises:
        UserError: the environment contradicts itself.
    """
    return this_process().started


def known_processes(processes: int | None, device: Device) -> int | None:
    """The number of processes where it is known without asking for devices, otherwise None.

    Args:
        processes: `launch.processes`.
        device: `launch.device`.

    Raises:
        UserError: the environment contradicts itself.
    """
    if in_worker():
        return this_process().ranks
    if processes is None and device == "cpu":
        return 1
    return processes


def process_count(processes: int | None, device: Device) -> int:
    """The number of processes of a run; counts the GPUs where the configuration leaves it out.

    Raises:
        UserError: `launch.device` is cuda and this machine shows no GPU; the environment contradicts itself.
    """
    known = known_processes(processes, device)
    if known is not None and device != "cuda":
        return known
    import torch

    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus == 0:
        raise UserError("launch.device = cuda: this machine shows no GPU; expected auto or cpu")
    return known or gpus or 1
