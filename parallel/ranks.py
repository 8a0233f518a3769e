"""Which of a run's processes this one is, which device it has, and where all of them meet.

The variables that torchrun sets say that: RANK and WORLD_SIZE, LOCAL_RANK on its machine, MASTER_ADDR and
MASTER_PORT. `ditmoe` sets them in the processes that it starts, and in the tasks of srun. They are read and
checked here and nowhere else; torch is imported where it is needed, because commands ask before they need it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from ditmoe.model.errors import UserError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]

MEETING_VARIABLE: Final = "DITMOE_MEETING"
"""Names one start of the processes of a run; with it, MASTER_PORT is the first of several ports."""
NODE_TASK_VARIABLE: Final = "DITMOE_NODE_TASK"
"""Set for the only task of a node, one of as many as the step has nodes."""
WORKERS_VARIABLE: Final = "DITMOE_WORKERS_HERE"
"""Set for a worker of a crew: how many workers were started beside it on its machine, itself included."""

_EXPECTED: Final = (
    "expected all of RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them"
)


@dataclass(frozen=True)
class ThisProcess:
    """This process among those of its run; without arguments, the only one."""

    rank: int = 0
    ranks: int = 1
    local_rank: int | None = None
    """Its number on its machine; None: not known."""
    address: str = "127.0.0.1"
    """Where the processes of the run meet: the machine of rank 0."""
    port: int | None = None
    """The port there, or the first of those to try where there is a `meeting`; None: there is nobody to meet."""
    meeting: str | None = None
    """By which the processes of one start know each other; None: a port is all that they know."""
    started: bool = False
    """Whether a launcher, ours or torchrun or srun, started it as a rank."""
    node_task: bool = False
    """Whether srun started it as the only task of its node. Its rank is then the number of the node."""
    processes_here: int = 1
    """Processes of the run, or workers of a crew, that share its machine; itself included."""

    @property
    def first(self) -> bool:
        """Whether it is rank 0, which prints and writes what is needed once."""
        return self.rank == 0

    @property
    def starts_ranks(self) -> bool:
        """Whether it may start ranks of its own on its machine: nobody started it, or it has a node to itself."""
        return self.node_task or not self.started


def this_process(environment: Mapping[str, str] | None = None) -> ThisProcess:
    """What the environment says of this process.

    Args:
        environment: the variables; None: this process's.

    Raises:
        UserError: they contradict one another or are not numbers; names all such problems, a line each.
    """
    variables = os.environ if environment is None else environment
    problems: list[str] = []
    workers = _number(variables, WORKERS_VARIABLE, 1, 2**20, problems) if WORKERS_VARIABLE in variables else None
    if "RANK" not in variables:
        left = {name: variables[name] for name in ("WORLD_SIZE", "LOCAL_RANK") if name in variables}
        if left not in ({}, {"WORLD_SIZE": "1"}):
            found = " and ".join(f"{name} = {value}" for name, value in left.items())
            raise UserError(
                f"{found} in the environment without RANK; {_EXPECTED}, or none of them (`unset {' '.join(left)}`)"
            )
        if problems:
            raise UserError(problems[0])
        return ThisProcess(processes_here=workers or 1)
    ranks = _number(variables, "WORLD_SIZE", 1, 2**20, problems)
    rank = _number(variables, "RANK", 0, (ranks or 2**20) - 1, problems)
    here = _number(variables, "LOCAL_WORLD_SIZE", 1, 2**20, problems) if "LOCAL_WORLD_SIZE" in variables else None
    local_rank = None
    if "LOCAL_RANK" in variables:
        local_rank = _number(variables, "LOCAL_RANK", 0, (here or 2**20) - 1, problems)
    port = None
    if ranks is None or ranks > 1:
        port = _number(variables, "MASTER_PORT", 1, 65535, problems)
    if problems:
        raise UserError("\n".join(problems))
    assert rank is not None and ranks is not None
    return ThisProcess(
        rank,
        ranks,
        local_rank,
        variables.get("MASTER_ADDR") or "127.0.0.1",
        port,
        variables.get(MEETING_VARIABLE) or None,
        started=True,
        node_task=NODE_TASK_VARIABLE in variables,
        processes_here=workers or here or ranks,
    )


def _number(variables: Mapping[str, str], name: str, least: int, most: int, problems: list[str]) -> int | None:
    """A variable's value; None, and a line, where it is no whole number of the range."""
    text = variables.get(name)
    if text is None:
        problems.append(f"RANK is set in the environment without {name}; {_EXPECTED}, or none of them")
    elif not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        found = text if len(text) <= 40 else f"{text[:37]}..."
        problems.append(f"{name} = {found!r} in the environment; expected a whole number from {least} to {most}")
    else:
        return int(text)
    return None


def own_device(choice: Device, option: str) -> "torch.device":
    """This process's device: the CPU, or of a machine's GPUs the one with the process's number.

    Args:
        choice: `auto` is CUDA where there is a GPU.
        option: what sets the number of processes, for the message.

    Raises:
        UserError: the machine has too few GPUs, or processes of several do not know their numbers.
    """
    import torch

    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    process, gpus = this_process(), torch.cuda.device_count()
    if process.local_rank is None and process.ranks > 1:
        raise UserError("LOCAL_RANK is not set in the environment; expected each process's number on its machine")
    local_rank = process.local_rank or 0
    if local_rank >= gpus:
        raise UserError(
            f"process {local_rank} of this machine has no GPU: {gpus} found, and each process needs its own;"
            f" expected {option} {gpus}, or the CPU"
        )
    return torch.device("cuda", local_rank)
