"""How many processes a run has.

Under torchrun, and under srun with several tasks on a node, that is said; otherwise each machine starts its own.
"""

from ditmoe.model.errors import UserError
from ditmoe.parallel.ranks import Device, this_process


def known_processes(processes: int | None, device: Device) -> int | None:
    """The number of processes of a run where it is known without asking for devices, otherwise None.

    Args:
        processes: `launch.processes`.
        device: `launch.device`.

    Raises:
        UserError: the environment contradicts itself.
    """
    process = this_process()
    if not process.starts_ranks:
        return process.ranks
    here = 1 if processes is None and device == "cpu" else processes
    return None if here is None else here * process.ranks


def process_count(processes: int | None, device: Device) -> int:
    """The number of processes of a run; counts this machine's GPUs where the configuration leaves it out.

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
    return known or (gpus or 1) * this_process().ranks
