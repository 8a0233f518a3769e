"""A rank that joins the others and says what it found: `python -m tests.slurm.joining FOLDER [RANKS]`.

Leaves `rank-N.json` in the folder, or `failed-N.txt`. Where some ranks are given, separated by commas, all others
end at once, and those are what is left of an attempt: they wait for the others.
"""

import json
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

from ditmoe.model.errors import UserError
from ditmoe.slurm.environment import rank_variables

os.environ.update(rank_variables(os.environ))


def main(folder: Path, only: str | None = None) -> None:
    import torch
    import torch.distributed as dist

    from ditmoe.parallel import processes
    from ditmoe.parallel.ranks import this_process

    process = this_process()
    if only is not None and str(process.rank) not in only.split(","):
        return
    (folder / f"started-{process.rank}").touch()
    try:
        processes.meet(torch.device("cpu"), timedelta(minutes=2))
    except UserError as error:
        (folder / f"failed-{process.rank}.txt").write_text(str(error))
        return
    from accelerate import Accelerator, PartialState

    state, accelerator = PartialState(cpu=True), Accelerator(cpu=True).state
    found = {
        "rank": process.rank,
        "local_rank": process.local_rank,
        "host": socket.gethostname(),
        "accelerate": [state.process_index, state.num_processes, state.local_process_index],
        "accelerator": [accelerator.process_index, accelerator.num_processes],
        "ranks": processes.gather_objects(process.rank),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "threads": torch.get_num_threads(),
        "meeting": process.meeting,
    }
    (folder / f"rank-{process.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
