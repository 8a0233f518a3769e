"""The check of a job's nodes before its ranks start: a broken node is named now, not blamed for a hang later.

Every task of the step runs `python -m ditmoe.slurm.check` and prints one line. The first task of each node looks
at the node: its devices, its memory, whether the shared folder can be written, and its clock. Then all tasks meet,
as the ranks of a run do, and sum a number over all of them: by gloo, and on GPUs by NCCL.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ditmoe.model.errors import MissingProcessesError, UserError
from ditmoe.model.outside.files import replacing
from ditmoe.model.outside.text import counted, printable
from ditmoe.slurm.environment import Step, rank_variables, step_of
from ditmoe.slurm.supervision.patience import Shared

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

MARK: Final = "ditmoe-check "
"""Begins the line of a report; other lines of a task are not meant for the supervisor."""
FOLDER_SECONDS: Final = 60.0
MEETING_SECONDS: Final = 120.0
"""How long tasks wait for those that have not come."""
SUM_SECONDS: Final = 40.0
"""For making a group, for each sum, and for leaving together. All these limits one after the other are within the
supervisor's for the whole check, so that tasks say what they miss before they are killed."""
MEMINFO: Final = Path("/proc/meminfo")
CLOCK_SECONDS: Final = 300.0
"""How far a node's clock may be from the batch node's, the time that srun takes to start tasks included."""
FREE_MEMORY: Final = 0.05
"""Share of a node's memory that must be free; of a GPU's, `FREE_GPU_MEMORY`: nothing else may run on it."""
FREE_GPU_MEMORY: Final = 0.5


class NodeReports:
    """What the tasks of a check have said, taken in line by line."""

    def __init__(self, problem: str | None = None) -> None:
        self.failed: dict[str, str] = {}
        """Host → what is wrong with it."""
        self.problem = problem
        """What is wrong, where that names no host."""
        self._heard: set[str] = set()
        self._group: list[str] = []
        self._missed: dict[str, set[str]] = {}
        """Host → the hosts that waited for it in vain."""

    @property
    def passed(self) -> bool:
        """Whether nothing is known to be wrong."""
        return not self.failed and self.problem is None

    @property
    def shown(self) -> str:
        """What is wrong, in a line."""
        found = [f"{host}: {problem}" for host, problem in sorted(self.failed.items())]
        return "; ".join([*found, *([self.problem] if self.problem else [])])

    def take(self, line: str) -> None:
        """Take in a line that a task printed."""
        if not line.startswith(MARK):
            return
        try:
            report = json.loads(line.removeprefix(MARK))
            host = str(report["host"])
            problems = [printable(problem) for problem in report["problems"]]
            self._group += [printable(problem) for problem in report["group"]]
            missing = [str(other) for other in report["missing"]]
        except (ValueError, KeyError, TypeError):
            return
        self._heard.add(host)
        if problems:
            self.failed[host] = ", ".join(filter(None, [self.failed.get(host), *problems]))
        for other in missing:
            self._missed.setdefault(other, set()).add(host)

    def finish(self, hosts: Sequence[str], late: float | None, code: int | None, words: str) -> None:
        """Once the step has ended: hosts that said nothing have failed, unless none said anything.

        So have those that most others waited for in vain. Two that miss each other say nothing of which is at
        fault: where all hosts are missed alike, none is named. A job's only host is at fault for all.

        Args:
            hosts: of the job.
            late: seconds after which the step was killed; None: it ended by itself.
            code: srun's exit code.
            words: what srun said.
        """
        silent = [host for host in hosts if host not in self._heard]
        within = f"within {late:g} s" if late is not None else f"({words or f'exit code {code}'})"
        if silent and len(silent) < len(hosts):
            for host in silent:
                self.failed.setdefault(host, f"gave no answer {within}")
        elif silent:
            self.problem = f"no node gave an answer {within}"
        most = max(map(len, self._missed.values()), default=0)
        absent = [host for host, others in self._missed.items() if len(others) == most]
        if len(absent) < len(hosts):
            for host in absent:
                self.failed.setdefault(host, "did not come to the sum over all tasks")
        if len(hosts) == 1 and self._group:
            self.failed.setdefault(hosts[0], self._group[0])  # there is no other that could be at fault
        if self.passed and (self._group or code):
            self.problem = self._group[0] if self._group else words or f"exit code {code}"


def check_command(srun: Sequence[str], folder: Path, gpus: int, now: float) -> list[str]:
    """The command that checks the nodes.

    Args:
        srun: with what starts a task, up to its Python.
        folder: that must be writable from everywhere.
        gpus: of each node.
        now: seconds since 1970 on this node.
    """
    # A task that fails lets the others say what they found, whatever the cluster's settings are; and a rank's host
    # is known where tasks are dealt out node by node.
    own = ["--kill-on-bad-exit=0", "--wait=0", "--distribution=block"]
    place = srun.index("--kill-on-bad-exit=1")
    return [
        *(*srun[:place], *own, *srun[place + 1 :]),
        *("-m", "ditmoe.slurm.check", str(folder), str(gpus), f"{now:.3f}"),
    ]


def clock_problem(now: float, others: float) -> str | None:
    """What is wrong with a clock that shows `now` where another showed `others` some seconds before."""
    ahead = now - others
    if -CLOCK_SECONDS <= ahead <= CLOCK_SECONDS:
        return None
    return f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the batch node's"


def memory_problem(meminfo: str) -> str | None:
    """What is wrong with the memory that /proc/meminfo describes."""
    values = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.splitlines() if ":" in line}
    total, free = values["MemTotal"], values["MemAvailable"]
    if free >= FREE_MEMORY * total:
        return None
    return f"{free / 2**20:.1f} GiB of its {total / 2**20:.1f} GiB of memory are free"


def folder_problem(folder: Path, host: str, seconds: float = FOLDER_SECONDS) -> str | None:
    """What is wrong with a shared folder, seen from this node."""

    def write_and_read() -> None:
        file, text = folder / f"check-{host}.txt", f"{time.time()}".encode()
        with replacing(file) as written:
            written.write(text)
        if file.read_bytes() != text:
            raise UserError(f"{file}: holds something else than was written")
        file.unlink()

    try:
        Shared().ask(write_and_read, seconds)
    except TimeoutError:
        return f"{folder} gave no answer within {seconds:g} s"
    except (UserError, OSError) as error:
        return str(error)
    return None


def device_problems(gpus: int) -> list[str]:
    """What is wrong with the GPUs that this task sees; `gpus` has each node."""
    if not gpus:
        return []
    import torch

    if not torch.cuda.is_available():
        return ["shows no GPU that works"]
    seen = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    expected = len(seen) or gpus
    problems = []
    if torch.cuda.device_count() < expected:
        problems.append(f"shows {counted(torch.cuda.device_count(), 'GPU')} of {expected}")
    for number in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(number)
            if free < FREE_GPU_MEMORY * total:
                problems.append(f"GPU {number}: {free / 2**30:.1f} GiB of {total / 2**30:.1f} GiB are free")
            ones = torch.ones(256, 256, device=f"cuda:{number}")
            if float((ones @ ones).sum()) != 256.0**3:
                problems.append(f"GPU {number}: computes a wrong product")
        except RuntimeError as error:
            problems.append(f"GPU {number}: {str(error).splitlines()[0]}")
    return problems


def node_problems(folder: Path, host: str, gpus: int, now: float) -> list[str]:
    """What is wrong with this node; arguments as of the functions above, `now` the batch node's clock."""
    meminfo = MEMINFO.read_text(encoding="utf-8")
    found = [clock_problem(time.time(), now), memory_problem(meminfo), folder_problem(folder, host)]
    return [problem for problem in found if problem is not None] + device_problems(gpus)


def group_problems(step: Step, gpus: int, sound: bool) -> tuple[list[str], list[str]]:
    """What kept all tasks from summing a number over all of them, and the hosts that did not come.

    Args:
        step: of which this process is a task, with the variables of a rank in its environment.
        gpus: of each node.
        sound: whether this node is. Tasks of others come as well, so that nobody waits for them, and then none
            tries its GPU.
    """
    import torch
    import torch.distributed as dist

    from ditmoe.parallel import processes
    from ditmoe.parallel.meeting import Patience
    from ditmoe.parallel.ranks import own_device

    limit = timedelta(seconds=SUM_SECONDS)
    try:
        processes.meet(torch.device("cpu"), limit, Patience(told_after=30.0, limit=MEETING_SECONDS))
        unsound = _sum(torch.tensor([0.0 if sound else 1.0, 1.0]))
        sums = [unsound[1]]
        if gpus and unsound[0] == 0:
            device = own_device("cuda", "--gpus-per-node")
            torch.cuda.set_device(device)
            by_nccl = dist.new_group(backend="nccl", timeout=limit)
            sums += _sum(torch.ones(1, device=device), by_nccl)
        processes.leave()  # rank 0 holds the store, which the others need until they have their sums
    except MissingProcessesError as error:
        return [_failed(error)], _hosts_of_ranks(step, error.ranks)
    except (UserError, RuntimeError) as error:
        return [_failed(error)], []
    wrong = [total for total in sums if total != step.tasks]
    return [f"the sum over all tasks is {total:g}, not {step.tasks}" for total in wrong], []


def _sum(values: "torch.Tensor", group: "dist.ProcessGroup | None" = None) -> list[float]:
    """The sums of the values of all tasks."""
    import torch.distributed as dist

    dist.all_reduce(values, group=group)
    return [float(value) for value in values]


def _failed(error: Exception) -> str:
    first = str(error).partition("\n")[0]
    return f"the sum over all tasks failed on {socket.gethostname()}: {first}"


def _hosts_of_ranks(step: Step, ranks: Sequence[int]) -> list[str]:
    """The hosts of these ranks, each once; tasks are dealt out node by node."""
    hosts = [host for host, tasks in zip(step.hosts, step.tasks_per_node, strict=True) for _ in range(tasks)]
    return list(dict.fromkeys(hosts[rank] for rank in ranks))


def main() -> None:
    """Check this node, and the connection to the others; the exit code is 1 where something is wrong."""
    folder, gpus, now = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    problems = node_problems(folder, host, gpus, now) if os.environ.get("SLURM_LOCALID", "0") == "0" else []
    group: list[str] = []
    missing: list[str] = []
    try:
        step = step_of(os.environ)
        os.environ.update(rank_variables(os.environ))
        if step is not None and step.tasks > 1:
            group, missing = group_problems(step, gpus, sound=not problems)
    except UserError as error:  # variables that contradict each other, which is no node's fault
        group = [str(error)]
    report = {"host": host, "problems": problems, "group": group, "missing": missing}
    print(MARK + json.dumps(report), flush=True)
    # A thread that waits for the folder would hold up the interpreter's own end.
    os._exit(1 if problems or group else 0)


if __name__ == "__main__":
    main()
