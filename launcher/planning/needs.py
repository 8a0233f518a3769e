"""What a whole run of a plan needs: time to its end, disk, host memory, and samples in time."""

from dataclasses import asdict, dataclass
from typing import Any, Final

from ditmoe.data.stream.dataset import open_index
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.model.errors import UserError
from ditmoe.parallel.planner.estimate import Machine, Plan
from ditmoe.parallel.planner.host import HostMemory, checkpoint_bytes, host_memory

GIB: Final = 2**30
PIXEL_CHANNELS: Final = (1, 3)
"""Of images; what has another number is latents."""
MOMENTS_BYTES: Final = 4
"""Of a number of a latent in its shard: mean and deviation in fp16, as `ditmoe data encode` writes them."""


@dataclass(frozen=True)
class Sample:
    """The size of a sample in its shard."""

    size: float
    """Bytes, the mean."""
    origin: str
    """Where that is known from."""


@dataclass(frozen=True)
class Needs:
    """Of one plan, to the end of the run."""

    images: int
    """That the run takes."""
    hours: float
    """To its end, without checkpoints, previews and waits for data."""
    gpu_hours: float
    """The same, times the GPUs."""
    checkpoint_bytes: int
    """Of one checkpoint."""
    disk_bytes: int
    """Of all that are kept, and one that is being written."""
    host: HostMemory
    """Of a rank."""
    ranks_of_machine: int
    samples_per_second: float
    """That the data must deliver, over all ranks."""
    bytes_per_second: float
    sample: Sample

    @property
    def host_of_machine(self) -> int:
        """Bytes of host memory of a machine that is full of ranks."""
        return self.host.total * self.ranks_of_machine

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        values = asdict(self)
        parts = {**asdict(self.host), "total": self.host.total}
        values["host"] = {f"{name}_bytes": size for name, size in parts.items()}
        values["host_of_machine_bytes"] = self.host_of_machine
        values["days"] = self.hours / 24
        return values


def needs(config: RunConfig, plan: Plan, machine: Machine, sample: Sample) -> Needs:
    """Of a plan for a configuration with a complete model."""
    layout, train, kept = plan.layout, config.train, config.checkpoint
    hours = plan.step_seconds * train.steps / 3600
    size = checkpoint_bytes(config.model)
    forever = train.steps // kept.keep_every if kept.keep_every else 0
    host = host_memory(
        config.model,
        layout,
        plan.workload,
        plan.memory,
        on_cpu=machine.gpu.is_cpu,
        asynchronous=kept.asynchronous,
        workers=config.data.workers,
    )
    return Needs(
        images=train.steps * layout.batch,
        hours=hours,
        gpu_hours=hours * layout.processes,
        checkpoint_bytes=size,
        disk_bytes=size * (kept.keep_last + forever + kept.keep_best + 1),
        host=host,
        ranks_of_machine=min(layout.processes, machine.gpu.gpus_per_node),
        samples_per_second=plan.images_per_second,
        bytes_per_second=plan.images_per_second * sample.size,
        sample=sample,
    )


def sample_of(config: RunConfig) -> Sample:
    """The size of the run's samples: as the first source's shards are, where its index can be read."""
    source, model = config.data.sources[0], config.model
    try:
        index = open_index(source)
    except UserError:
        assert model.complete and model.channels is not None and model.image_size is not None
        numbers = model.channels * model.image_size**2
        if model.channels in PIXEL_CHANNELS:
            return Sample(numbers, "uncompressed, because there are no shards to look at")
        return Sample(MOMENTS_BYTES * numbers, "as encoded in fp16, because there are no shards to look at")
    shards = index.shards
    mean = sum(shard.bytes for shard in shards) / sum(shard.samples for shard in shards)
    return Sample(mean, f"as in {source.shown}")


def needs_lines(found: Needs, machine: Machine) -> list[str]:
    """As text, a line each."""
    unit, host = machine.gpu.unit, found.host
    parts = {
        "the saver's copy": host.copy,
        "the optimiser, offloaded": host.offload,
        "training": host.training,
        "processes": host.processes,
    }
    if host.start == host.total:
        parts = {"at the start": host.start}
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return [
        f"to the end: {span(found.hours)} and {found.gpu_hours:,.1f} {unit}-hours, for {found.images:,} images",
        f"checkpoint: {amount(found.checkpoint_bytes)}; {amount(found.disk_bytes)} of disk for all that are kept"
        " and one that is being written",
        f"host memory: {host.total / GIB:.2f} GiB a rank ({listed}),"
        f" {found.host_of_machine / GIB:.1f} GiB a machine of {found.ranks_of_machine}",
        f"data: {found.samples_per_second:,.0f} samples/s, {found.bytes_per_second / 1e6:,.1f} MB/s"
        f" ({amount(found.sample.size)} a sample, {found.sample.origin})",
    ]


def span(hours: float) -> str:
    """A time: in minutes, or in days and in hours."""
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours / 24:.2f} days ({hours:,.2f} hours)"


def amount(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:.0f} bytes"
