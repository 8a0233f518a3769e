"""The workers of a crew on this machine: how many, and which GPU and how many threads each has."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ditmoe.launcher.local.launch import threads_per_process
from ditmoe.model.errors import UserError

if TYPE_CHECKING:
    from ditmoe.data.crew.leader import Crew


def worker_environments(processes: int | None) -> list[dict[str, str]]:
    """The variables of each worker.

    Args:
        processes: how many; None: one per GPU, or 1.

    Raises:
        UserError: there are fewer GPUs.
    """
    import torch

    gpus = torch.cuda.device_count()
    count = (gpus or 1) if processes is None else processes
    if gpus and count > gpus:
        raise UserError(f"--processes {count}: each has a GPU to itself, and {gpus} are found; expected {gpus}")
    threads = os.environ.get("OMP_NUM_THREADS") or str(threads_per_process(max(count, 1)))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(number) for number in range(gpus)]
    return [
        {"OMP_NUM_THREADS": threads, **({"CUDA_VISIBLE_DEVICES": visible[number]} if gpus else {})}
        for number in range(count)
    ]


def own_address() -> str:
    """The address at which other machines find this one."""
    from distributed.utils import get_ip

    return str(get_ip())


@contextmanager
def leads_crew(
    folder: Path | None, processes: int | None, part_minutes: float, log: Callable[[str], None]
) -> "Iterator[Crew]":
    """Lead a crew for the body.

    Args:
        folder: at which workers of any machine join; None: a temporary one, for this machine alone.
        processes: workers of this machine; None: one per GPU, or 1.
        part_minutes: how long a worker may take to make a part.
        log: takes lines to show.

    Raises:
        UserError: as `lead_crew`.
    """
    from ditmoe.data.crew.leader import LOOPBACK, lead_crew

    environments = worker_environments(processes)
    with tempfile.TemporaryDirectory(prefix="ditmoe-crew-") as scratch:
        where = Path(scratch) / "crew" if folder is None else folder
        host = LOOPBACK if folder is None else own_address()
        with lead_crew(where, environments, host=host, part_seconds=60 * part_minutes, log=log) as crew:
            yield crew
