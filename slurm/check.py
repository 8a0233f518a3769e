"""The check of a job's nodes before its ranks start: a broken node is named now, not blamed for a hang later.

Every task of the step runs `python -m ditmoe.slurm.check` and prints one line. The first task of each node looks
at the node: its devices, its memory, whether the shared folder can be written, and its clock. Then all tasks sum a
number over all of them, by the library that training uses.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final

from ditmoe.model.errors import UserError
from ditmoe.model.outside.files import replacing
from ditmoe.model.outside.text import printable
from ditmoe.slurm.environment import Step, rank_variables, step_of
from ditmoe.slurm.supervision.patience import Shared

MARK: Final = "ditmoe-check "
"""Begins the line of a report; other lines of a task are not meant for the supervisor."""
FOLDER_SECONDS: Final = 60.0
MEETING_SECONDS: Final = 120.0
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
            self.failed.setdefault(other, "did not come to the sum over all tasks")

    def finish(self, hosts: Sequence[str], late: float | None, code: int | None, words: str) -> None:
        """Once the step has ended: hosts that said nothing have failed, unless none said anything.

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
    # A task that fails lets the others say what they found.
    kept = [word for word in srun if not word.startswith("--kill-on-bad-exit")]
    return [*kept, "-m", "ditmoe.slurm.check", str(folder), str(gpus), f"{now:.3f}"]


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
        problems.append(f"shows {torch.cuda.device_count()} GPUs of {expected}")
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


def group_problems(step: Step, variables: Mapping[str, str], gpus: int) -> tuple[list[str], list[str]]:
    """What kept all tasks from summing a number over all of them, and the hosts that did not come."""
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    rank, ranks = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    patience = timedelta(seconds=MEETING_SECONDS)
    store = None
    try:
        store = TCPStore(
            variables["MASTER_ADDR"],
            int(variables["MASTER_PORT"]),
            ranks,
            is_master=rank == 0,
            timeout=patience,
            wait_for_workers=False,
        )
        store.set(f"rank {rank}", "here")
        store.wait([f"rank {other}" for other in range(ranks)], patience)
        meeting = PrefixStore("sum", store)
        device = torch.device("cuda", int(variables["LOCAL_RANK"])) if gpus else torch.device("cpu")
        dist.init_process_group(
            "nccl" if gpus else "gloo", store=meeting, rank=rank, world_size=ranks, timeout=patience
        )
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        dist.destroy_process_group()
        return ([] if float(total) == ranks else [f"the sum over all tasks is {float(total):g}, not {ranks}"]), []
    except RuntimeError as error:
        missing = [] if store is None else [other for other in range(ranks) if not store.check([f"rank {other}"])]
        words = str(error).splitlines()[0]
        return [f"the sum over all tasks failed on {socket.gethostname()}: {words}"], _hosts_of_ranks(
            step, missing
        )


def _hosts_of_ranks(step: Step, ranks: Sequence[int]) -> list[str]:
    """The hosts of these ranks, each once; tasks are dealt out node by node."""
    hosts = [host for host, tasks in zip(step.hosts, step.tasks_per_node, strict=True) for _ in range(tasks)]
    return list(dict.fromkeys(hosts[rank] for rank in ranks))


def main() -> None:
    """Check this node, and the connection to the others; the exit code is 1 where something is wrong."""
    folder, gpus, now = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    problems: list[str] = []
    if os.environ.get("SLURM_LOCALID", "0") == "0":
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
        found = [clock_problem(time.time(), now), memory_problem(meminfo), folder_problem(folder, host)]
        problems += [problem for problem in found if problem is not None] + device_problems(gpus)
    step, variables = step_of(os.environ), rank_variables(os.environ)
    group: list[str] = []
    missing: list[str] = []
    if step is not None and variables and not problems:
        group, missing = group_problems(step, variables, gpus)
    report = {"host": host, "problems": problems, "group": group, "missing": missing}
    print(MARK + json.dumps(report), flush=True)
    # A thread that waits for the folder would hold up the interpreter's own end.
    os._exit(1 if problems or group else 0)


if __name__ == "__main__":
    main()
