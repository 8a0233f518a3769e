"""For the workers, which run many engines in one process after the other."""

import gc

import torch.distributed as dist
from deepspeed.utils import groups
from torch.distributed import distributed_c10d


def end_groups() -> None:
    """End the process groups of an engine that was closed; all ranks call it.

    DeepSpeed would take some of them for the next engine, which may be of another grid. And each has threads that
    wake up a hundred times a second.
    """
    dist.barrier()
    groups._release_process_group_references()
    gc.collect()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
