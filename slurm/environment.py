"""What Slurm tells each task of a step: its rank, and where all of them meet.

srun sets SLURM_PROCID and its kind, never RANK. Everything else here reads the names that torchrun sets, and so do
accelerate and DeepSpeed. Only what srun starts is a rank: neither a batch script nor an interactive shell is one.
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import printable
from ditmoe.slurm.hostlist import hosts_of

_RESERVED_STEPS: Final = 0xFFFF_FFF0
"""From here on a step's number says that it is none that srun numbers: a batch script, an interactive shell."""
FIRST_PORT: Final = 10_000
PORTS: Final = 22_000
"""A step's processes meet at one of so many ports from the first on, or at one of the next few where that is in
use. All are below those that Linux hands out by itself."""
_GROUP: Final = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")
"""`4(x2)`: two nodes with four tasks each."""


@dataclass(frozen=True)
class Step:
    """A task of a step that srun started, and what it knows of the others."""

    job: int
    number: int
    """Of the step in its job; a job that is requeued counts its steps from 0 again."""
    restart: int
    """How often the job was requeued."""
    launch: str
    """Another word for this start: srun's own port, which also differs where srun does not pass `restart` on."""
    rank: int
    tasks_per_node: tuple[int, ...]
    node: int
    """Number of this node in the step."""
    local_rank: int
    hosts: tuple[str, ...]

    @property
    def tasks(self) -> int:
        """Of the whole step."""
        return sum(self.tasks_per_node)

    @property
    def meeting(self) -> str:
        """Names this start, and no earlier or later one of the same job."""
        return ".".join(filter(None, (str(self.job), str(self.number), str(self.restart), self.launch)))

    @property
    def port(self) -> int:
        """The first port at which its tasks try to meet; that of another start is most likely another."""
        return FIRST_PORT + zlib.crc32(self.meeting.encode()) % PORTS


def step_of(environment: Mapping[str, str]) -> Step | None:
    """The step that a process is a task of; None where srun did not start it.

    Raises:
        UserError: the variables of a step contradict each other or are not Slurm's; names the variable.
    """
    number = _number(environment, "SLURM_STEP_ID")
    if number is None or number >= _RESERVED_STEPS or "SLURM_PROCID" not in environment:
        return None
    hosts = hosts_of(_text(environment, "SLURM_STEP_NODELIST"))
    if not set(hosts) <= set(hosts_of(environment.get("SLURM_JOB_NODELIST") or ",".join(hosts))):
        return None  # of the step in which `sbatch` was called, which passed it on: this is the batch script
    tasks_per_node = _tasks_per_node(_text(environment, "SLURM_STEP_TASKS_PER_NODE"))
    if len(tasks_per_node) != len(hosts):
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE: tasks of {len(tasks_per_node)} nodes, but SLURM_STEP_NODELIST names"
            f" {len(hosts)}; expected as many"
        )
    node = _needed(environment, "SLURM_NODEID", len(hosts))
    return Step(
        job=_needed(environment, "SLURM_JOB_ID"),
        number=number,
        restart=_number(environment, "SLURM_RESTART_COUNT") or 0,
        launch=str(_number(environment, "SLURM_STEP_LAUNCHER_PORT") or ""),
        rank=_needed(environment, "SLURM_PROCID", sum(tasks_per_node)),
        tasks_per_node=tasks_per_node,
        node=node,
        local_rank=_needed(environment, "SLURM_LOCALID", tasks_per_node[node]),
        hosts=tuple(hosts),
    )


def rank_variables(environment: Mapping[str, str], cores: int | None = None) -> dict[str, str]:
    """The variables that torchrun would set, for a task of a step of several; none for any other process.

    They are for the process itself to set before it imports torch. Where RANK is set, a launcher below srun has
    done this. MASTER_ADDR, MASTER_PORT and OMP_NUM_THREADS stay as they are where they are set.

    Args:
        environment: of the process.
        cores: that the process may use; None: as the system says.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and DITMOE_MEETING; and either
        DITMOE_NODE_TASK, where each node has one task, which may then start several ranks; or OMP_NUM_THREADS, the
        task's share of the node's cores.

    Raises:
        UserError: the variables contradict each other.
    """
    if "RANK" in environment:
        return {}
    step = step_of(environment)
    if step is None or step.tasks == 1:
        return {}
    here = step.tasks_per_node[step.node]
    own_gpu = _has_one_of_the_gpus(environment)
    found = {
        "RANK": str(step.rank),
        "WORLD_SIZE": str(step.tasks),
        # Torch, DeepSpeed and accelerate take it for the number of the GPU.
        "LOCAL_RANK": "0" if own_gpu else str(step.local_rank),
        "LOCAL_WORLD_SIZE": "1" if own_gpu else str(here),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(step),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(step.port),
        "DITMOE_MEETING": step.meeting,
    }
    if environment.get("WORLD_SIZE", found["WORLD_SIZE"]) != found["WORLD_SIZE"]:
        raise UserError(
            f"WORLD_SIZE = {printable(environment['WORLD_SIZE'])} in the environment of a step of {step.tasks}"
            " tasks; expected it unset, or RANK set as well"
        )
    if set(step.tasks_per_node) == {1}:
        found["DITMOE_NODE_TASK"] = "1"
    elif "OMP_NUM_THREADS" not in environment:
        usable = cores or len(os.sched_getaffinity(0))
        allocated = _number(environment, "SLURM_CPUS_ON_NODE") or usable
        found["OMP_NUM_THREADS"] = str(max(1, min(usable, allocated // here)))
    return found


def _first_host(step: Step) -> str:
    """The node of rank 0. UserError where that is not the first of the step."""
    if step.rank == 0 and step.node != 0:
        raise UserError(
            f"rank 0 is on {step.hosts[step.node]}, but the first node of the step is {step.hosts[0]}; expected"
            f" tasks that are dealt out from the first node on, or MASTER_ADDR={step.hosts[step.node]} in the"
            " environment of all"
        )
    return step.hosts[0]


def _has_one_of_the_gpus(environment: Mapping[str, str]) -> bool:
    """Whether a task sees one of several GPUs that its step has on the node: then it is this task's alone."""
    seen = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return len(seen) == 1 < (_number(environment, "SLURM_GPUS_ON_NODE") or 0)


def _tasks_per_node(text: str) -> tuple[int, ...]:
    """`2(x3),1` as 2, 2, 2 and 1."""
    tasks: list[int] = []
    for part in text.split(","):
        match = _GROUP.fullmatch(part)
        if match is None or len(tasks) + int(match[2] or 1) > 65536:
            raise _wrong("SLURM_STEP_TASKS_PER_NODE", text, "such as 4(x2),3")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tuple(tasks)


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise UserError(f"SLURM_STEP_ID is set in the environment without {name}; expected all that srun sets")
    return environment[name]


def _needed(environment: Mapping[str, str], name: str, end: int | None = None) -> int:
    """A variable that a step has, below `end`."""
    _text(environment, name)
    number = _number(environment, name)
    assert number is not None
    if end is not None and number >= end:
        raise _wrong(name, environment[name], f"a number below {end}")
    return number


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """A variable's whole number; None where it is not set. UserError where it is none."""
    text = environment.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 10):
        raise _wrong(name, text, "a whole number")
    return int(text)


def _wrong(name: str, found: str, expected: str) -> UserError:
    shown = found if len(found) <= 40 else f"{found[:37]}..."
    return UserError(f"{name} = {printable(shown)!r} in the environment; expected {expected}, as Slurm sets it")
