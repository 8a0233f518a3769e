"""Joining the process group, and the few collectives that training needs beside DeepSpeed's."""

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, TCPStore  # type: ignore[attr-defined]

from ditmoe.model.errors import UserError

Value = TypeVar("Value")

TIMEOUT = timedelta(minutes=10)
"""Longest wait in a collective: a rank that died without a word ends the others after it."""


def join(device: torch.device) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe (one process: alone).

    Raises:
        UserError: there are several processes, and no MASTER_PORT to meet at.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ and os.environ["WORLD_SIZE"] != "1":
        raise UserError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']} is set in the environment without MASTER_PORT; expected"
            " MASTER_ADDR and MASTER_PORT as well, as torchrun sets them"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "MASTER_PORT" not in os.environ:
        store = TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
        dist.init_process_group(_backend(device), store=store, rank=0, world_size=1, timeout=TIMEOUT)
        os.environ["MASTER_PORT"] = str(store.port)
    else:
        dist.init_process_group(_backend(device), timeout=TIMEOUT)
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


def leave() -> None:
    """Leave the process group together; a rank that left alone could abort the others' last collectives."""
    dist.barrier()
    dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def from_first_rank(make: Callable[[], Value]) -> Value:
    """What rank 0 makes, on every rank."""
    made: list[Any] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made, src=0)
    value: Value = made[0]
    return value


def gather_objects(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, on every rank, in rank order; `group` is of all ranks too."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group)
    return gathered
