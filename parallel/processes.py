"""Joining the process group, and the few collectives that training needs beside DeepSpeed's."""

import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Store, TCPStore  # type: ignore[attr-defined]

from ditmoe.model.errors import MissingProcessesError
from ditmoe.parallel import meeting
from ditmoe.parallel.alone import TIMEOUT
from ditmoe.parallel.meeting import PATIENCE, Patience
from ditmoe.parallel.ranks import this_process


def join(device: torch.device) -> None:
    """Join the run's processes (alone: by itself), and make the group DeepSpeed's as well.

    Raises:
        UserError: the environment describes no group, or the others do not come.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    meet(device, TIMEOUT)
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime import compiler

    # Beside its ZeRO stages DeepSpeed imports an optimiser that is not used here, a function of which is compiled:
    # only to mark it, each process would import the compiler of torch, which takes a second.
    compiler.compile = lambda: compiler.dummy_decorator

    # On CPUs DeepSpeed would compile a shared-memory all-reduce at start, which takes minutes; gloo serves.
    __compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 is retiring.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(dist_backend=_backend(device), verbose=False)


def meet(device: torch.device, timeout: timedelta, patience: Patience = PATIENCE) -> None:
    """Make torch's process group of all processes of the run, once each has said that it is there.

    Args:
        device: gloo for the CPU, NCCL for a GPU.
        timeout: longest wait in a later collective.
        patience: how long the processes wait for one another here, and when they say so.

    Raises:
        UserError: the place where they meet cannot be used or reached, or some do not come in time.
    """
    process = this_process()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        if process.ranks == 1:
            alone = TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
            store: Store = alone
            os.environ["MASTER_PORT"] = str(alone.port)  # DeepSpeed asks for it
        else:
            met = meeting.meet(process, patience)
            store = met.store
            if met.interface is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", met.interface)
        dist.init_process_group(
            _backend(device),
            store=store,
            rank=process.rank,
            world_size=process.ranks,
            timeout=timeout,
            # NCCL connects at once, to this device, and makes later groups out of the first.
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:  # as all of torch.distributed's are
        reason = str(error).partition("\n")[0]
        raise MissingProcessesError(
            f"rank {process.rank} could not join the {process.ranks} processes of the run: {reason}"
        ) from error
    # What reads the variables by itself, as DeepSpeed does, finds one process alone described too.
    own = {"RANK": process.rank, "WORLD_SIZE": process.ranks, "LOCAL_RANK": process.local_rank or 0}
    for name, value in own.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", process.address)


def leave() -> None:
    """Leave the process group together; a rank that left alone could abort the others' last collectives."""
    dist.barrier()
    dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def gather_objects(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, on every rank, in rank order; `group` is of all ranks too."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group)
    return gathered
