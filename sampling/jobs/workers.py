"""The processes of one evaluation job, as accelerate sees them."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch

from ditmoe.model.errors import UserError
from ditmoe.parallel.expert_group import ExpertGroup
from ditmoe.parallel.ranks import own_device, this_process

CPU = torch.device("cpu")
_LONGEST_WAIT = timedelta(days=2)
"""How long a process waits for another, which may be training a classifier or reading a whole dataset."""


@dataclass(frozen=True)
class Workers:
    """This process among those of the job."""

    rank: int = 0
    ranks: int = 1
    device: torch.device = CPU
    group: ExpertGroup | None = None
    """The ranks that it draws with, where one could not hold the network; None: it draws alone."""
    _all_well: Callable[[bool], bool] = lambda well: well

    @property
    def first(self) -> bool:
        """Whether this process writes what the job writes once."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        self._all_well(True)

    def everywhere(self, here: bool) -> bool:
        """Whether something is so on every process; all of them ask, and all hear the same."""
        return self._all_well(here)

    def leave(self) -> None:
        """Let go of the other processes at the end."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def on_first(self, action: Callable[[], None]) -> None:
        """Let the first process do something while the others wait.

        Raises:
            UserError: on the first process, when the action raised it.
            SystemExit: on the others then, so that the message comes once.
        """
        problem = None
        if self.first:
            try:
                action()
            except UserError as error:
                problem = error
        if not self._all_well(problem is None):
            raise problem if problem is not None else SystemExit(2)


def join_workers(task: str = "", expert_parallel: int = 1) -> Workers:
    """Join the processes that the launcher, torchrun or srun started; alone when there are none.

    Uses gloo on the CPU and NCCL on GPUs, one process per GPU.

    Args:
        task: what this process is to do. Each finds the newest checkpoint by itself, and a run may write another
            meanwhile.
        expert_parallel: ranks that share out the experts of a network, and draw together.

    Raises:
        UserError: the processes do not make whole groups of ranks that draw together; there are more processes
            than GPUs, the others do not come, or come for another task.
        SystemExit: on all but the first, which tells of the other task.
    """
    from accelerate import PartialState
    from accelerate.utils import gather

    from ditmoe.parallel.processes import gather_objects, meet

    device = own_device("auto", "--processes")
    process = this_process()
    if process.started:
        meet(device, _LONGEST_WAIT)
    # `cpu` is given, because accelerate would otherwise choose by what accelerators it believes to see.
    state = PartialState(cpu=device.type == "cpu")

    def all_well(well: bool) -> bool:
        if process.ranks == 1:
            return well
        return bool(gather(torch.tensor([int(well)], device=device)).min().item())

    assert (state.process_index, state.num_processes) == (process.rank, process.ranks)
    tasks = gather_objects(task) if process.ranks > 1 else [task]
    for rank, other in enumerate(tasks):
        if other != tasks[0]:
            if not process.first:
                raise SystemExit(2)
            raise UserError(
                f"rank 0 is to do {task}, but rank {rank} {other}; expected the same of all: name the checkpoint"
            )
    if process.ranks % expert_parallel:
        if not process.first:
            raise SystemExit(2)
        raise UserError(
            f"--expert-parallel {expert_parallel}: there are {process.ranks} processes (WORLD_SIZE), and "
            f"{expert_parallel} of them draw together; expected a multiple of {expert_parallel}"
        )
    group = ExpertGroup.join(expert_parallel, device, _LONGEST_WAIT) if expert_parallel > 1 else None
    return Workers(process.rank, process.ranks, device, group, all_well)
