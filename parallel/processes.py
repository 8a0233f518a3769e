"""Joining the process group, and the few collectives that training needs beside DeepSpeed's."""

import itertools
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore  # type: ignore[attr-defined]

from ditmoe.model.errors import UserError
from ditmoe.parallel.ranks import ThisProcess, this_process

Value = TypeVar("Value")


class Patience(NamedTuple):
    """How long the processes of a run wait for one another at its start."""

    told_after: float
    """Seconds after which they say whom they wait for."""
    limit: float
    """Seconds after which they give up."""


PATIENCE: Final = Patience(10.0, 600.0)
_POLL_SECONDS: Final = 0.1
_meetings = itertools.count()
"""Numbers this process's meetings, which all processes of a run have alike."""

TIMEOUT = timedelta(minutes=10)
"""Longest wait in a collective: a rank that died without a word ends the others after it."""


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
            store = _meeting_store(process, patience)
        dist.init_process_group(
            _backend(device), store=store, rank=process.rank, world_size=process.ranks, timeout=timeout
        )
    except RuntimeError as error:  # as all of torch.distributed's are
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"rank {process.rank} could not join the {process.ranks} processes of the run: {reason}"
        ) from error
    # What reads the variables by itself, as DeepSpeed does, finds one process alone described too.
    own = {"RANK": process.rank, "WORLD_SIZE": process.ranks, "LOCAL_RANK": process.local_rank or 0}
    for name, value in own.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", process.address)


def _meeting_store(process: ThisProcess, patience: Patience) -> Store:
    """The store that all processes share, once all have come to it. Ctrl-C ends each of its waits."""
    where = f"{process.address}:{process.port} (MASTER_ADDR:MASTER_PORT)"
    begin = time.monotonic()
    assert process.port is not None
    # torchrun's own process holds the store, otherwise rank 0.
    holds = process.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not holds:
        _reach(process, where, patience)
    try:
        store = TCPStore(
            process.address,
            process.port,
            process.ranks,
            is_master=holds,
            timeout=timedelta(seconds=min(60.0, patience.limit)),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        if "EADDRINUSE" in str(error):
            reason = "in use by another program; expected a free port of rank 0's machine"
        raise UserError(f"rank {process.rank} cannot meet the others at {where}: {reason}") from error
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = PrefixStore(f"ditmoe/{restarts}/{next(_meetings)}", store)
    if shared.add(f"rank {process.rank}", 1) > 1:
        raise UserError(f"RANK = {process.rank} is set for two processes that meet at {where}; expected each once")
    if shared.add("arrived", 1) == process.ranks:
        shared.set("all", "here")
    told = False
    while not shared.check(["all"]):
        waited = time.monotonic() - begin
        if waited > patience.limit or (waited > patience.told_after and not told):
            missing = [rank for rank in range(process.ranks) if not shared.check([f"rank {rank}"])]
            names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            those = f"{len(missing)} of {process.ranks} processes (WORLD_SIZE), rank {names}"
            if waited > patience.limit:
                raise UserError(f"rank {process.rank} waited {waited:.0f} s at {where} in vain for {those}")
            _say_waiting(f"rank {process.rank} waits at {where} for {those}", patience)
            told = True
        time.sleep(_POLL_SECONDS)
    return shared


def _reach(process: ThisProcess, where: str, patience: Patience) -> None:
    """Return when somebody listens at the place where the processes meet."""
    begin, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((process.address, process.port), timeout=5).close()
            return
        except OSError as error:
            waited, reason = time.monotonic() - begin, error.strerror or error
        if waited > patience.limit:
            raise UserError(f"rank {process.rank} waited {waited:.0f} s in vain for rank 0 at {where}: {reason}")
        if waited > patience.told_after and not told:
            _say_waiting(f"rank {process.rank} waits for rank 0 at {where}: {reason}", patience)
            told = True
        time.sleep(_POLL_SECONDS)


def _say_waiting(what: str, patience: Patience) -> None:
    print(f"{what}; for {patience.limit:g} s at most", file=sys.stderr, flush=True)


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
