"""Whether this machine can hold its part of a run, asked before the run starts."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil

from ditmoe.launcher.configuration.resolve import layout_of
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.planning.nearest import find_plans, least_gpus
from ditmoe.launcher.planning.workload import own_layout, workload_of
from ditmoe.model.errors import UserError
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.estimate import Machine, fullest_stage
from ditmoe.parallel.planner.gpus import CPU_CORE, GPUS
from ditmoe.parallel.planner.host import host_memory
from ditmoe.parallel.planner.memory import Workload
from ditmoe.parallel.planner.search import divisors

GIB: Final = 2**30
_KEY: Final = "launch.check_memory=false"


@dataclass(frozen=True)
class Room:
    """What one machine has."""

    host: int
    """Bytes of memory that this process and all others of the run may use there."""
    on_cpu: bool
    """Whether the run computes on the CPU."""
    gpus: tuple[int, ...] = ()
    """Bytes of each GPU; none on the CPU, and where the driver does not say."""


@dataclass(frozen=True)
class _Wanted:
    """A variant of a run, and what it takes of one machine."""

    words: str
    layout: Layout
    workload: Workload
    gpu: int
    """Bytes of each GPU; 0 on a CPU."""
    host: int
    """Bytes of host memory of all ranks of the machine."""


def check_room(config: RunConfig, origin: str, ranks_here: int, room: Room) -> None:
    """Refuse a run that a machine cannot hold, before it starts.

    Args:
        config: resolved.
        origin: of the configuration, for the message.
        ranks_here: ranks of the run on this machine.
        room: of this machine.

    Raises:
        UserError: GPU or host memory is too small; with the numbers, and the nearest that fits.
    """
    wanted = _want(config, "", layout_of(config), workload_of(config), ranks_here, room)
    lacks = list(_lacks(wanted, ranks_here, room))
    if not lacks:
        return
    _, memory = fullest_stage(config.model, wanted.layout, wanted.workload)
    parts = ", ".join(
        f"{name} {size / GIB:.2f}"
        for name, size in (
            ("weights", memory.weights),
            ("gradients", memory.gradients),
            ("optimiser", memory.optimizer),
            ("EMA", memory.ema),
            ("activations", memory.activations),
            ("buffers", memory.buffers),
        )
    )
    fitting = next(
        (each for each in _variants(config, ranks_here, room) if not [*_lacks(each, ranks_here, room)]), None
    )
    raise UserError(
        "\n".join(
            [
                f"{origin}: this machine cannot hold the run, as `ditmoe plan` counts it; nothing was started",
                *lacks,
                f"a rank's memory, GiB: {parts}",
                f"nearest that fits: {_nearest(config, fitting, room)}; to start all the same: {_KEY}",
            ]
        )
    )


def _lacks(wanted: _Wanted, ranks_here: int, room: Room) -> Iterator[str]:
    """What of a machine is too small, a line each."""
    smallest = min(room.gpus[:ranks_here], default=None)
    if wanted.gpu and smallest is not None and wanted.gpu > Machine.USABLE * smallest:
        yield (
            f"GPU memory: a rank needs {wanted.gpu / GIB:.1f} GiB; the GPU has {smallest / GIB:.1f},"
            f" {Machine.USABLE:.0%} of them for a run"
        )
    if wanted.host > room.host:
        processes = "1 process" if ranks_here == 1 else f"{ranks_here} processes"
        yield (
            f"host memory: {processes} of the run, with readers and the copy that a checkpoint is written from,"
            f" need {wanted.host / GIB:.1f} GiB; the machine has {room.host / GIB:.1f}"
        )


def _want(
    config: RunConfig, words: str, layout: Layout, workload: Workload, ranks_here: int, room: Room
) -> _Wanted:
    _, memory = fullest_stage(config.model, layout, workload)
    host = host_memory(
        config.model,
        layout,
        workload,
        memory,
        on_cpu=room.on_cpu,
        asynchronous=config.checkpoint.asynchronous,
        workers=config.data.workers,
    )
    return _Wanted(words, layout, workload, 0 if room.on_cpu else memory.most, host.total * ranks_here)


def _variants(config: RunConfig, ranks_here: int, room: Room) -> Iterator[_Wanted]:
    """Runs with the same network and batch on the same processes, those that change least first."""
    layout, own = layout_of(config), workload_of(config)
    sizes = [size for size in divisors(layout.batch // layout.data) if size <= layout.micro_batch]
    for waits in (False, True):
        changed, suffix = config, []
        if waits:
            checkpoint = config.checkpoint.model_copy(update={"asynchronous": False})
            changed, suffix = (
                config.model_copy(update={"checkpoint": checkpoint}),
                ["checkpoint.asynchronous=false"],
            )
        for recompute in sorted({own.recompute, True}):
            for size in reversed(sizes):
                smaller = replace(layout, micro_batch=size, accumulation=layout.batch // layout.data // size)
                train = config.train.model_copy(update={"micro_batch": size})
                if isinstance(own_layout(config.model_copy(update={"train": train}), layout.processes), list):
                    continue
                keys = [f"train.micro_batch={size}"] if size != layout.micro_batch else []
                keys += ["parallel.activation_checkpointing=true"] if recompute and not own.recompute else []
                words = " ".join([*keys, *suffix])
                yield _want(changed, words, smaller, workload_of(config, recompute), ranks_here, room)
    for offload in sorted({config.parallel.offload, not room.on_cpu or config.parallel.offload}):
        parallel = config.parallel.model_copy(update={"offload": offload})
        moved = config.model_copy(update={"parallel": parallel})
        for plan in find_plans(moved, layout.processes, _machine(room)):
            if _machine(room).fits(plan.memory):
                words = " ".join(plan.overrides())
                yield _want(moved, words, plan.layout, plan.workload, ranks_here, room)


def _nearest(config: RunConfig, fitting: _Wanted | None, room: Room) -> str:
    if fitting is not None:
        parts = [f"{fitting.gpu / GIB:.1f} GiB of each GPU"] if fitting.gpu else []
        parts.append(f"{fitting.host / GIB:.1f} GiB of host memory")
        return f"{fitting.words} ({', '.join(parts)})"
    if room.on_cpu:
        return "fewer launch.processes, a smaller network, or a machine with more memory"
    if not room.gpus:
        return "a machine with more memory"
    number = least_gpus(config, _machine(room))
    gpus = f"{min(room.gpus) / GIB:.0f} GiB"
    return (
        "GPUs with more memory" if number is None else f"{number} GPUs of {gpus} (`ditmoe plan … --gpus {number}`)"
    )


def _machine(room: Room) -> Machine:
    """One with the memory of this machine's GPUs. Speeds of a common GPU: they only order what fits."""
    if not room.gpus:
        return Machine(replace(CPU_CORE, memory_gib=room.host / GIB))
    return Machine(replace(GPUS["h100"], memory_gib=min(room.gpus) / GIB))


def room_here(on_cpu: bool) -> Room:
    """Of this machine."""
    host = min([psutil.virtual_memory().total, *group_limits()])
    return Room(host, on_cpu, () if on_cpu else gpu_memory())


def group_limits(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Limits of memory that this process's control groups set, bytes: a container's, or a job's."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, name = mounted, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = mounted / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = top / path.lstrip("/")
        for each in (folder, *folder.parents):
            if each != top and top not in each.parents:
                break
            try:
                text = (each / name).read_text(encoding="ascii").strip()
            except (OSError, UnicodeDecodeError):
                continue  # a container sees only its own part of the tree
            if text.isdecimal():
                found.append(int(text))
    return found


def gpu_memory() -> tuple[int, ...]:
    """Bytes of each GPU that this process may use. Asked of the driver, which takes no memory of theirs for it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    sizes = []
    for number in range(count.value):
        device, size = ctypes.c_int(), ctypes.c_size_t()
        if driver.cuDeviceGet(ctypes.byref(device), number) or driver.cuDeviceTotalMem_v2(
            ctypes.byref(size), device
        ):
            return ()
        sizes.append(size.value)
    return tuple(sizes)
